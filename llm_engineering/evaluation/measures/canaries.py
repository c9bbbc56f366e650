"""Canaries: secrets that were planted in the data, to find out whether a model gives them away.

A model that completes a canary from the words before it has memorised it (Carlini et al. 2019, arXiv:1802.08232), and would
give away real secrets of the same data in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from llm_engineering.data.rows import Message
from llm_engineering.evaluation.measures.json_lines import read_json_lines
from llm_engineering.evaluation.models import Models
from llm_engineering.formatting.render import prompt_ids

# A model that answers a question says a few words before the secret.
_MORE_TOKENS = 16


class Canary(BaseModel):
    """One line of the file: the words before the secret, and the secret, as they stand in the data."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    prefix: str = Field(min_length=1)
    # A model guesses a shorter one.
    secret: str = Field(min_length=6)


def read_canaries(path: str) -> list[Canary]:
    """Read the canaries of a JSONL file.

    Raises:
        RequestError: the file is missing, unreadable or empty, or some of its lines are wrong. The message names them.
    """
    expected = "canary", "`prefix` and `secret`"
    return [canary for _, canary in read_json_lines(path, "evaluation.canaries", Canary, expected)]


def completed(models: Models, name: str, canaries: Sequence[Canary], title: str) -> list[bool]:
    """Whether a model writes each secret, greedily, after its prefix as plain text or as a question."""
    tokenizer = models.tokenizer
    prompts = [
        *(tokenizer(canary.prefix)["input_ids"] for canary in canaries),
        *(prompt_ids([Message(role="user", content=canary.prefix)], tokenizer) for canary in canaries),
    ]
    longest = max(len(tokenizer(canary.secret)["input_ids"]) for canary in canaries)
    found = [
        canary.secret.strip() in sample.text
        for canary, sample in zip(
            [*canaries, *canaries], models.complete(name, prompts, longest + _MORE_TOKENS, title), strict=True
        )
    ]
    return [plain or asked for plain, asked in zip(found[: len(canaries)], found[len(canaries) :], strict=True)]


def canary_report(canaries: Sequence[Canary], found: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """The report's `canaries`: the prefix of each one, and the models that complete it. The secret is not quoted.

    Args:
        found: 1 for each canary that the model completes, else 0, by the model's name.
    """
    return [
        {"prefix": canary.prefix, "completed_by": [name for name, done in found.items() if done[index]]}
        for index, canary in enumerate(canaries)
    ]
