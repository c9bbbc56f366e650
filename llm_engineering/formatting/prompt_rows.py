"""Renders prompts without an answer: the model answers them itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from llm_engineering.data.rows import PromptRow
from llm_engineering.errors import RequestError
from llm_engineering.formatting.render import UnrenderableError, checked_text, contains_text, prompt_ids


class PromptTokens(NamedTuple):
    """Token ids of a prompt, up to where the model begins its answer."""

    prompt_ids: list[int]
    respaced: bool = False


def prompt_tokens(
    rows: Sequence[PromptRow], tokenizer: PreTrainedTokenizerBase
) -> list[PromptTokens | UnrenderableError]:
    """Token ids of prompts, as `prompt_ids` makes them for evaluation and serving."""
    found: list[PromptTokens | UnrenderableError] = []
    for row in rows:
        try:
            text = checked_text(tokenizer, row.prompt, add_generation_prompt=True)
        except UnrenderableError as error:
            found.append(error)
            continue
        lost = next((turn.role for turn in row.prompt if not contains_text(text, turn.content)), None)
        if lost is not None:
            found.append(
                UnrenderableError("template_drops_text", f"the chat template leaves out a part of its {lost} text")
            )
        else:
            found.append(PromptTokens(prompt_ids(row.prompt, tokenizer)))
    return found


def check_accepted(formatted: Mapping[str, Dataset], rewards: Sequence[str]) -> None:
    """Check that the prompts of every split have accepted answers, if rewards compare with them.

    Args:
        formatted: the splits of formatted prompts.
        rewards: the rewards that compare.

    Raises:
        RequestError: no prompt of a split has one.
    """
    if not rewards:
        return
    for name, split in formatted.items():
        if not any(split["answers"]):
            raise RequestError(
                f"The rewards {' and '.join(rewards)} compare with accepted answers, and no prompt of the {name} split has "
                "one. Add a column `answer` or `answers` to data.prompts, or name yours with data.columns.answer, or choose "
                "other rewards."
            )
