"""Checks canonical rows; what fails is quarantined with its reason, never dropped without a word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from llm_engineering.data.duplicates import NearDuplicates, normalised
from llm_engineering.data.quarantine import Quarantined
from llm_engineering.data.rows import InstructionRow, Message, PreferenceRow

RowT = TypeVar("RowT", InstructionRow, PreferenceRow)


def validate_instructions(
    rows: Sequence[InstructionRow], near_duplicate_threshold: float
) -> tuple[list[InstructionRow], list[Quarantined]]:
    """Keep rows that have an answer and that were not seen before, exactly or nearly."""
    checked = [(row, "empty_answer" if _is_empty(row.completion) else "") for row in rows]
    return _keep(checked, "instruction", near_duplicate_threshold)


def validate_preferences(
    rows: Sequence[PreferenceRow], near_duplicate_threshold: float
) -> tuple[list[PreferenceRow], list[Quarantined]]:
    """Keep pairs with two different, non-empty answers that were not seen before, exactly or nearly."""
    checked = []
    for row in rows:
        reason = ""
        if _is_empty(row.chosen) or _is_empty(row.rejected):
            reason = "empty_answer"
        elif _letters(row.chosen) == _letters(row.rejected):
            reason = "chosen_equals_rejected"
        checked.append((row, reason))
    return _keep(checked, "preference", near_duplicate_threshold)


def row_text(row: InstructionRow | PreferenceRow) -> str:
    """What near duplicates are judged by: the prompt and the answer that is learned."""
    answer = row.completion if isinstance(row, InstructionRow) else row.chosen
    return "\n".join(message.content for message in (*row.prompt, *answer))


def prompt_text(row: InstructionRow | PreferenceRow) -> str:
    """The prompt with case, punctuation and space folded."""
    return normalised("\n".join(message.content for message in row.prompt))


def _is_empty(messages: Sequence[Message]) -> bool:
    return not any(message.content.strip() for message in messages)


def _letters(messages: Sequence[Message]) -> str:
    text = " ".join(message.content for message in messages).lower()
    return "".join(character for character in text if character.isalnum()) or text


def _keep(
    checked: Sequence[tuple[RowT, str]], stage: str, near_duplicate_threshold: float
) -> tuple[list[RowT], list[Quarantined]]:
    kept: dict[str, RowT] = {}
    quarantine: list[Quarantined] = []
    seen = NearDuplicates(near_duplicate_threshold)
    for row, reason in checked:
        detail = ""
        if not reason and row.id in kept:
            reason, detail = "exact_duplicate", f"first seen at {kept[row.id].source}"
        near = None if reason else seen.find(row_text(row))
        if near is not None:
            reason, detail = "near_duplicate", f"of the row at {kept[near].source}"
        if reason:
            text = row.prompt[-1].content[:200] if row.prompt else ""
            quarantine.append(
                Quarantined(stage=stage, reason=reason, source=row.source, place=row.id, detail=detail, text=text)
            )
        else:
            kept[row.id] = row
            seen.add(row.id, row_text(row))
    return list(kept.values()), quarantine
