"""Rewards: how good a completion of a prompt is, as a number."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from llm_engineering.data.exam_answers import answers_right, named_in
from llm_engineering.errors import RequestError, WorkError
from llm_engineering.generation.clients.open import open_client
from llm_engineering.generation.types import Answer, Client, Sampling
from llm_engineering.recipe.reward_blocks import RewardFunction, RewardSet
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.training_blocks import TrainingSetup

logger = logging.getLogger(__name__)

# What the judge grades where the recipe has no criterion.
CRITERION = "The answer is right, complete and to the point."
GRADE_FIELD = "grade"
_GRADE = re.compile(r"\W*(10|\d)(?:\.0+)?(?:\s*(?:/|out of)\s*10)?\W*")


class Completion(NamedTuple):
    """What a model answered to a prompt.

    Attributes:
        text: without special tokens and without white space around it.
        stopped: whether it ended by itself.
        tokens: its number of tokens, with the end token.
        ids: its tokens, with the end token if it ended by itself; None if a model with another tokenizer wrote it.
    """

    text: str
    stopped: bool
    tokens: int
    ids: list[int] | None = None


# A formatted prompt: `id`, `prompt` (messages), `prompt_ids` and `answers`.
PromptRecord = Mapping[str, Any]
Score = Callable[[Sequence[PromptRecord], Sequence[Completion]], list[float]]


@dataclass(frozen=True)
class Reward:
    """A reward of the recipe.

    Attributes:
        name: its name in logs and reports.
        weight: its factor in the weighted sum.
        score: takes prompts and a completion of each, and returns a number for each.
    """

    name: str
    weight: float
    score: Score


def open_rewards(
    config: RewardSet, setup: TrainingSetup, settings: Settings, reward_model: Path | None = None
) -> list[Reward]:
    """Open the rewards of a stage, in the order of the recipe.

    Args:
        reward_model: the folder of the model of the reward `reward_model`; None without this reward.

    Raises:
        RequestError: the file or the function of an own reward is missing, the judge cannot be opened, or the reward model
            is missing or was trained with other tokens.
    """
    return [
        Reward(name, reward.weight, _score_of(reward, setup, settings, reward_model))
        for name, reward in zip(config.reward_names, config.rewards, strict=True)
    ]


def weighted_sums(
    rewards: Sequence[Reward], rows: Sequence[PromptRecord], completions: Sequence[Completion]
) -> tuple[list[float], dict[str, list[float]]]:
    """The weighted sum of the rewards of each completion, and each reward without its weight by its name."""
    scores = {reward.name: reward.score(rows, completions) for reward in rewards}
    sums = [sum(reward.weight * scores[reward.name][place] for reward in rewards) for place in range(len(rows))]
    return sums, scores


def _score_of(config: RewardFunction, setup: TrainingSetup, settings: Settings, reward_model: Path | None) -> Score:
    if config.use == "reward_model":
        return open_reward_model(reward_model, setup, settings)
    if config.own_function is not None:
        return partial(_own, config.use, own_function(config))
    if config.judge is not None:
        client = open_client(config.judge, setup.model, setup.compute.one_process, settings, setup.chat_template)
        sampling = Sampling(
            config.judge.max_new_tokens, 0.0, setup.seed, json_field=GRADE_FIELD if client.writes_json else None
        )
        return partial(_judge, client, sampling, config.criterion or CRITERION)
    if config.use == "length":
        return partial(_each, partial(_length, config.target, config.longest))
    if config.use == "format":
        assert config.pattern is not None
        return partial(_each, partial(_format, re.compile(config.pattern)))
    return partial(_each, {"exact_answer": _exact_answer, "contains": _contains, "stopped": _stopped}[config.use])


def _each(
    score: Callable[[PromptRecord, Completion], float],
    rows: Sequence[PromptRecord],
    completions: Sequence[Completion],
) -> list[float]:
    return [float(score(row, completion)) for row, completion in zip(rows, completions, strict=True)]


def _exact_answer(row: PromptRecord, completion: Completion) -> bool:
    return answers_right(completion.text, row["answers"], row["prompt"][-1]["content"])


def _contains(row: PromptRecord, completion: Completion) -> bool:
    return any(named_in(completion.text, answer) for answer in row["answers"])


def _stopped(_: PromptRecord, completion: Completion) -> bool:
    return completion.stopped


def _length(target: int | None, longest: int | None, _: PromptRecord, completion: Completion) -> float:
    if target is not None:
        return max(0.0, 1 - abs(completion.tokens - target) / target)
    assert longest is not None
    return min(1.0, max(0.0, 2 - completion.tokens / longest))


def _format(pattern: re.Pattern[str], _: PromptRecord, completion: Completion) -> bool:
    return pattern.fullmatch(completion.text) is not None


def _judge(
    client: Client,
    sampling: Sampling,
    criterion: str,
    rows: Sequence[PromptRecord],
    completions: Sequence[Completion],
) -> list[float]:
    """The judge's grades. A completion whose grade cannot be read gets 0, and a warning says how many there are."""
    requests = [
        [{"role": "user", "content": _judge_prompt(row, completion, criterion)}]
        for row, completion in zip(rows, completions, strict=True)
    ]
    try:
        replies = client.answer(requests, sampling, "grades")
    except WorkError as error:
        raise WorkError(f"The reward judge (read generation.* as its block judge): {error}") from error
    grades = [_GRADE.fullmatch(reply.text) if isinstance(reply, Answer) else None for reply in replies]
    unread = grades.count(None)
    if unread == len(rows):
        raise WorkError(
            f"The reward judge: none of {unread} replies of {client.identity} is a grade from 0 to 10. Name another model, or "
            "another criterion."
        )
    if unread:
        logger.warning("The reward judge: %d of %d replies are no grade, and count as 0", unread, len(rows))
    return [float(match[1]) / 10 if match else 0.0 for match in grades]


def _judge_prompt(row: PromptRecord, completion: Completion, criterion: str) -> str:
    turns = row["prompt"]
    question = (
        turns[0]["content"] if len(turns) == 1 else "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
    )
    accepted = "".join(f"\nAccepted answer: {answer}" for answer in row["answers"])
    return (
        "You grade an answer to a question.\n\n"
        f"Question:\n{question}\n{accepted}\n\nAnswer:\n{completion.text}\n\n"
        f"What counts: {criterion}\nGive a whole number from 0 (not at all) to 10 (fully). Give the number alone, with no other "
        "word."
    )


def open_reward_model(folder: Path | None, setup: TrainingSetup, settings: Settings) -> Score:
    """Open a reward model as a reward, which reads only `prompt_ids` of the prompts.

    Raises:
        RequestError: the folder is None, or the model in it was trained with other tokens.
    """
    # Imported here, because this module is imported before the backend, which must be imported before transformers.
    from llm_engineering.models.reward_model import RewardModel, check_tokens
    from llm_engineering.models.tokenizer import load_tokenizer

    if folder is None:
        raise RequestError("The reward reward_model needs a reward model: name its folder with --reward-model.")
    tokenizer = load_tokenizer(setup.model, settings, setup.chat_template)
    check_tokens(folder, tokenizer, settings, setup.model.trust_remote_code)
    model = RewardModel.load(setup.model, folder, tokenizer, setup.compute, settings)

    def score(rows: Sequence[PromptRecord], completions: Sequence[Completion]) -> list[float]:
        written = [
            list(completion.ids)
            if completion.ids is not None
            else tokenizer.encode(completion.text, add_special_tokens=False)
            + [tokenizer.eos_token_id] * completion.stopped
            for completion in completions
        ]
        return model.scores([[*row["prompt_ids"], *ids] for row, ids in zip(rows, written, strict=True)])

    return score


def own_function(config: RewardFunction) -> Callable[..., Any]:
    """Load the user's own function. Its file is run.

    Raises:
        RequestError: the file is missing or fails, it has no such function, or the function does not take completions and
            rows.
    """
    assert config.own_function is not None
    file, name = config.own_function
    path = Path(file).expanduser()
    if not path.is_file():
        raise RequestError(f"The reward {config.use}: there is no file {file}.")
    # The module is not entered in sys.modules, so that the file cannot take the place of another one.
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise RequestError(
            f"The reward {config.use}: {file} fails when it is loaded, with {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise RequestError(f"The reward {config.use}: {file} has no function {name}.")
    try:
        inspect.signature(function).bind([], [])
    except TypeError:
        raise RequestError(
            f"The reward {config.use}: {name} must take two arguments, a list of completions and a list of rows."
        ) from None
    found: Callable[..., Any] = function
    return found


def reward_files(config: RewardSet) -> dict[str, str]:
    """SHA-256 of each file with a reward of the user's own, by its path; `missing` for a file that is not there."""
    files = [reward.own_function[0] for reward in config.rewards if reward.own_function is not None]
    contents = {file: Path(file).expanduser() for file in files}
    return {
        file: hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "missing"
        for file, path in contents.items()
    }


def _own(
    use: str, function: Callable[..., Any], rows: Sequence[PromptRecord], completions: Sequence[Completion]
) -> list[float]:
    try:
        scores = function(list(completions), [dict(row) for row in rows])
    except Exception as error:
        raise WorkError(f"The reward {use} failed with {type(error).__name__}: {error}") from error
    if not isinstance(scores, Sequence) or isinstance(scores, str):
        raise WorkError(
            f"The reward {use} returned {type(scores).__name__}: it must return a list with a number for each completion."
        )
    if len(scores) != len(completions):
        raise WorkError(
            f"The reward {use} returned {len(scores)} numbers for {len(completions)} completions: it must return one for each."
        )
    wrong = next((s for s in scores if not isinstance(s, int | float) or not math.isfinite(s)), None)
    if wrong is not None:
        raise WorkError(
            f"The reward {use} returned {wrong!r} for a completion: it must return a finite number for each."
        )
    return [float(score) for score in scores]
