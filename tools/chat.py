"""The commands `chat`, which talks to one model, and `compare`, which asks several models the same question."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from llm_engineering.errors import RequestError
from llm_engineering.recipe.loading import load_recipe
from tools.cli import DEFAULT_RECIPE, Config, Overrides, Version, prepare_zenml

if TYPE_CHECKING:
    from llm_engineering.data.rows import Message
    from llm_engineering.publish.conversation import ChatSampling, Conversation

logger = logging.getLogger("llm_engineering.chat")

# Low temperatures draw the same answer again. Above 1 improbable words spoil the answers.
BEST_OF_TEMPERATURE = 0.8

MaxNewTokens = Annotated[
    int,
    typer.Option(
        "--max-new-tokens", metavar="N", min=1, help="Maximum length of an answer in tokens. A longer answer is cut."
    ),
]
Temperature = Annotated[
    float,
    typer.Option(
        "--temperature", metavar="T", help="0 always chooses the most probable token. With 0.7 to 1, answers vary."
    ),
]
TopP = Annotated[
    float,
    typer.Option(
        "--top-p", metavar="P", help="Choose only among the most probable tokens whose probabilities add up to P."
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        "--seed",
        metavar="N",
        min=0,
        max=2**32 - 1,
        help="The same seed gives the same answer. Default: a new seed for each call.",
    ),
]
System = Annotated[
    str | None, typer.Option("--system", metavar="TEXT", help="A system message at the start of the conversation.")
]


def chat(
    config: Config = DEFAULT_RECIPE,
    overrides: Overrides = None,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", metavar="TEXT", help="One question. Without this option, a conversation begins."),
    ] = None,
    version: Version = None,
    max_new_tokens: MaxNewTokens = 200,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    system: System = None,
) -> int:
    """Talk to the promoted model.

    The answer is printed while it is generated. Without --prompt, a conversation begins, which needs a terminal. An
    empty line, Ctrl-D or Ctrl-C ends the conversation.

    Example: `llm-engineering chat --prompt "Who founded Ondrel?" --temperature 0.7 --seed 1`
    """
    if prompt is None and not sys.stdin.isatty():
        raise RequestError(
            '--prompt is missing, and a conversation needs a terminal. Ask one question: make chat PROMPT="Who founded Ondrel?"'
        )
    if prompt is not None and not prompt.strip():
        raise RequestError('The question is empty. Ask one: make chat PROMPT="Who founded Ondrel?"')
    recipe = load_recipe(config, overrides or ())

    from llm_engineering.data.rows import Message
    from llm_engineering.publish.conversation import ChatSampling, Conversation, check_system
    from llm_engineering.publish.merge import merged_device
    from llm_engineering.recipe.settings import Settings

    sampling = ChatSampling.checked(temperature, top_p, seed)
    settings = Settings()
    prepare_zenml()
    from tools.model_versions.signatures import signed_model
    from tools.model_versions.versions import find_model

    found = find_model(recipe, version)
    logger.info("%s", found.described)
    folder, _ = signed_model(found, recipe, settings)
    device = merged_device(recipe.compute.here)
    trust = recipe.model.trust_remote_code
    conversation = Conversation(folder, device, settings, max_new_tokens, trust, sampling)
    _log_seed(sampling, seed)
    beginning = [] if system is None else [Message(role="system", content=system)]
    if beginning:
        check_system([*beginning, Message(role="user", content=prompt or "Hi")], conversation.tokenizer)
    if prompt is None:
        return _converse(conversation, beginning)
    messages = [*beginning, Message(role="user", content=prompt)]
    if not conversation.has_room(messages):
        raise RequestError(f"{_too_long(max_new_tokens)}. Shorten the question, or lower --max-new-tokens.")
    _log_cut(conversation.answer(messages).stopped, max_new_tokens)
    return 0


def compare(
    prompt: Annotated[str, typer.Option("--prompt", metavar="TEXT", help="The question.")],
    config: Config = DEFAULT_RECIPE,
    overrides: Overrides = None,
    version: Version = None,
    max_new_tokens: MaxNewTokens = 200,
    temperature: Annotated[
        float | None,
        typer.Option(
            "--temperature",
            metavar="T",
            help="0 always chooses the most probable token. With 0.7 to 1, answers vary. Default: 0, and 0.8 with --best-of.",
        ),
    ] = None,
    top_p: TopP = 1.0,
    seed: Seed = None,
    system: System = None,
    best_of: Annotated[
        int | None,
        typer.Option(
            "--best-of",
            metavar="N",
            min=2,
            help="Draw N answers of each model, and show the one with the highest reward.",
        ),
    ] = None,
    reward_model: Annotated[
        str | None,
        typer.Option(
            "--reward-model",
            metavar="VERSION",
            help="The version with the reward model, of this recipe, or of another one as NAME:VERSION.",
        ),
    ] = None,
) -> int:
    """Ask the base model and the trained models the same question.

    The answers of the base, SFT and DPO models are shown side by side. All models use the same seed. With --best-of, each model
    draws several answers at a temperature (0.8 if none is given), and a reward model chooses among them.

    Example: `llm-engineering compare --prompt "Who founded Ondrel?"`
    """
    if not prompt.strip():
        raise RequestError('The question is empty. Ask one: make compare PROMPT="Who founded Ondrel?"')
    if temperature is None:
        temperature = 0.0 if best_of is None else BEST_OF_TEMPERATURE
    _check_best_of(best_of, reward_model, temperature)
    recipe = load_recipe(config, overrides or ())

    from rich.table import Table

    from llm_engineering.data.rows import Message
    from llm_engineering.evaluation.models import Models
    from llm_engineering.models.base_model import load_model
    from llm_engineering.models.device import choose_device
    from llm_engineering.models.revision import check_unchanged
    from llm_engineering.models.tokenizer import load_tokenizer
    from llm_engineering.publish.best_of import BestOf
    from llm_engineering.publish.conversation import ChatSampling, answer, check_system, has_room
    from llm_engineering.recipe.settings import Settings

    sampling = ChatSampling.checked(temperature, top_p, seed)
    settings = Settings()
    prepare_zenml()
    from tools.model_versions.versions import find_model, find_reward_model
    from tools.terminal import console

    found = find_model(recipe, version)
    logger.info("%s", found.described)
    # The tokenizer is saved with the trained model. All models get the chat template of training, as in the evaluation.
    tokenizer = load_tokenizer(found.base.saved_in(found.folders[found.name]), settings)
    check_unchanged(found.base)
    chooser = None
    if best_of is not None and reward_model is not None:
        source, folder_of_rewards = find_reward_model(recipe.name, reward_model, recipe.model.trust_remote_code)
        chooser = BestOf.load(source, folder_of_rewards, tokenizer, recipe.compute.here, settings, best_of)
    base = load_model(found.base, settings, choose_device(recipe.compute.here))
    messages = [Message(role="user", content=prompt)]
    if system is not None:
        messages.insert(0, Message(role="system", content=system))
        check_system(messages, tokenizer)
    if not has_room(messages, base, tokenizer, max_new_tokens):
        raise RequestError(f"{_too_long(max_new_tokens)}. Shorten the question, or lower --max-new-tokens.")
    models = Models(base, found.folders, tokenizer, 1, recipe.evaluation.repetition_penalty)
    _log_seed(sampling, seed)
    shown = Table(title=prompt, title_justify="left", title_style="bold")
    answers = []
    for name in models.names:
        logger.info("Asking %s", name)
        penalty = {"repetition_penalty": models.repetition_penalty}
        with models.use(name) as model:
            if chooser is None:
                reply = answer(model, tokenizer, messages, max_new_tokens, sampling, **penalty)
                rewarded = ""
            else:
                reply, rewards = chooser.answer(model, messages, max_new_tokens, sampling, **penalty)
                rewarded = f", reward {max(rewards):.2f}, of {len(rewards)} answers from {min(rewards):.2f}"
        end = ("complete" if reply.stopped else f"cut at {max_new_tokens} tokens") + rewarded
        shown.add_column(name if name == "base" else name.upper(), overflow="fold", ratio=1)
        answers.append((reply.text, end))
    shown.add_row(*(text for text, _ in answers), end_section=True)
    shown.add_row(*(f"[{end}]" for _, end in answers))
    console().print(shown)
    return 0


def _converse(conversation: Conversation, beginning: list[Message]) -> int:
    """Ask and answer on the terminal, until an empty line, Ctrl-D or Ctrl-C."""
    from llm_engineering.data.rows import Message

    logger.info("Type a question. An empty line, Ctrl-D or Ctrl-C ends the conversation.")
    messages = list(beginning)
    try:
        while line := _read_line():
            question = Message(role="user", content=line)
            if not conversation.has_room([*beginning, question]):
                logger.info("[%s: ask a shorter question]", _too_long(conversation.max_new_tokens))
                continue
            if not conversation.has_room([*messages, question]):
                logger.info("[the conversation is longer than the model's context: a new one begins]")
                messages = list(beginning)
            messages.append(question)
            reply = conversation.answer(messages)
            _log_cut(reply.stopped, conversation.max_new_tokens)
            messages.append(Message(role="assistant", content=reply.text))
    except KeyboardInterrupt:
        print()
    return 0


def _read_line() -> str:
    """Read a line from the terminal; returns an empty text at the end of the input."""
    print("> ", end="", flush=True)
    line = sys.stdin.readline()
    if not line:
        # Ctrl-D leaves the cursor in the line of the prompt.
        print()
    return line.strip()


def _check_best_of(best_of: int | None, reward_model: str | None, temperature: float) -> None:
    if (best_of is None) != (reward_model is None):
        raise RequestError(
            "--best-of and --reward-model belong together: the reward model chooses among the answers, e.g. --best-of 8 "
            "--reward-model 3. `make models` lists all versions."
        )
    if best_of is None:
        return
    if temperature == 0:
        raise RequestError(
            "--best-of has no effect at temperature 0, where all answers are the same: leave out --temperature."
        )


def _too_long(max_new_tokens: int) -> str:
    return f"The question and an answer of {max_new_tokens} tokens do not fit into the model's context"


def _log_seed(sampling: ChatSampling, given: int | None) -> None:
    """Log a seed that was drawn, so that the user can repeat the answer."""
    if sampling.temperature > 0 and given is None:
        logger.info("Using --seed %d", sampling.seed)


def _log_cut(stopped: bool, max_new_tokens: int) -> None:
    if not stopped:
        logger.info("[the answer was cut at %d tokens: raise --max-new-tokens for a longer one]", max_new_tokens)
