"""Renders rows with the model's chat template, and marks the tokens that are trained.

Trained are the answers of the completion, each with its end-of-turn token, and nothing else. Every row is checked:
a template whose mask comes out wrong is an error that names the row and the template.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from llm_engineering.data.rows import InstructionRow, Message, PreferenceRow
from llm_engineering.errors import WorkError

IGNORE_INDEX = -100


class Tokens(NamedTuple):
    """Token ids of a conversation, and labels of the same length: the id where it is trained, -100 elsewhere."""

    input_ids: list[int]
    labels: list[int]


def render_instruction(row: InstructionRow, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """Token ids and labels of an instruction row.

    The template is applied to the conversation up to each answer and again with it; the difference is the answer.
    What a template puts after the last end-of-turn token (a line break, often) is left out: generation has stopped there.

    Raises:
        WorkError: the template has no such prefix property, or does not end an answer with the end-of-turn token.
    """
    where = f"row {row.id} ({row.source})"
    messages = list(row.prompt)
    ids: list[int] = []
    labels: list[int] = []
    for message in row.completion:
        if message.role == "assistant":
            prompt_ids = _apply(tokenizer, messages, add_generation_prompt=True)
            answered = _apply(tokenizer, [*messages, message], add_generation_prompt=False)
            if prompt_ids[: len(ids)] != ids or answered[: len(prompt_ids)] != prompt_ids:
                raise WorkError(
                    f"{where}: the chat template of {_name(tokenizer)} renders a prompt differently once it is "
                    "answered, so the model would be trained on other prompts than it is asked later. "
                    "Use a template that only appends."
                )
            end = _end_of_turn(answered, len(prompt_ids), tokenizer, where)
            labels += [IGNORE_INDEX] * (len(prompt_ids) - len(ids)) + answered[len(prompt_ids) : end]
            ids = answered[:end]
        messages.append(message)
    if all(label == IGNORE_INDEX for label in labels):
        raise WorkError(
            f"{where}: no token of it would be trained with the chat template of {_name(tokenizer)}. "
            "The completion needs an assistant turn with text, and the template must render it."
        )
    return Tokens(ids, labels)


class Pair(NamedTuple):
    """Token ids of a preference row: the prompt, and the two answers with their end-of-turn tokens."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


def render_preference(row: PreferenceRow, tokenizer: PreTrainedTokenizerBase) -> Pair:
    """Token ids of a preference row, by the same rules as `render_instruction`."""
    answers = []
    for completion in (row.chosen, row.rejected):
        instruction = InstructionRow(prompt=row.prompt, completion=completion, source=row.source, origin=row.origin)
        answers.append(render_instruction(instruction, tokenizer))
    starts = [next(i for i, label in enumerate(a.labels) if label != IGNORE_INDEX) for a in answers]
    chosen, rejected = answers
    return Pair(chosen.input_ids[: starts[0]], chosen.input_ids[starts[0] :], rejected.input_ids[starts[1] :])


def prompt_ids(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids that ask for an answer to `messages`: what training, evaluation and serving all prompt with."""
    return _apply(tokenizer, messages, add_generation_prompt=True)


def _apply(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], add_generation_prompt: bool) -> list[int]:
    if tokenizer.chat_template is None:
        raise WorkError(
            f"The tokenizer of {_name(tokenizer)} has no chat template, so there is no one way to render a "
            "conversation. Use a chat (instruct) model, or add a template to the tokenizer."
        )
    encoded = tokenizer.apply_chat_template(
        [message.model_dump() for message in messages], add_generation_prompt=add_generation_prompt, return_dict=True
    )
    return list(encoded["input_ids"])  # type: ignore[arg-type, call-overload, index]


def _end_of_turn(ids: Sequence[int], start: int, tokenizer: PreTrainedTokenizerBase, where: str) -> int:
    """The position behind the last end-of-turn token of an answer that starts at `start`."""
    for position in range(len(ids) - 1, start - 1, -1):
        if ids[position] == tokenizer.eos_token_id:
            after = tokenizer.decode(ids[position + 1 :])  # type: ignore[arg-type]
            if position == start or str(after).strip():
                break
            return position + 1
    raise WorkError(
        f"{where}: with the chat template of {_name(tokenizer)} its answer does not end with the end-of-turn token "
        f"{tokenizer.eos_token!r}, so the model would never learn to stop. Check the tokenizer's eos_token and template."
    )


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.name_or_path)
