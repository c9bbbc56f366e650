"""Checks canonical rows; what fails is quarantined with its reason, never dropped without a word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from llm_engineering.data.quarantine import Quarantined
from llm_engineering.data.rows import InstructionRow, Message, PreferenceRow

RowT = TypeVar("RowT", InstructionRow, PreferenceRow)


def validate_instructions(rows: Sequence[InstructionRow]) -> tuple[list[InstructionRow], list[Quarantined]]:
    """Keep rows that have an answer and that were not seen before."""
    checked = [(row, "empty_answer" if _is_empty(row.completion) else "") for row in rows]
    return _keep(checked, "instruction")


def validate_preferences(rows: Sequence[PreferenceRow]) -> tuple[list[PreferenceRow], list[Quarantined]]:
    """Keep pairs with two different, non-empty answers that were not seen before."""
    checked = []
    for row in rows:
        reason = ""
        if _is_empty(row.chosen) or _is_empty(row.rejected):
            reason = "empty_answer"
        elif _normalised(row.chosen) == _normalised(row.rejected):
            reason = "chosen_equals_rejected"
        checked.append((row, reason))
    return _keep(checked, "preference")


def _is_empty(messages: Sequence[Message]) -> bool:
    return not any(message.content.strip() for message in messages)


def _normalised(messages: Sequence[Message]) -> str:
    text = " ".join(message.content for message in messages).lower()
    return "".join(character for character in text if character.isalnum())


def _keep(checked: Sequence[tuple[RowT, str]], stage: str) -> tuple[list[RowT], list[Quarantined]]:
    kept: list[RowT] = []
    quarantine: list[Quarantined] = []
    first_source: dict[str, str] = {}
    for row, reason in checked:
        detail = ""
        if not reason and row.id in first_source:
            reason, detail = "exact_duplicate", f"first seen at {first_source[row.id]}"
        if reason:
            text = row.prompt[-1].content[:200] if row.prompt else ""
            quarantine.append(
                Quarantined(stage=stage, reason=reason, source=row.source, place=row.id, detail=detail, text=text)
            )
        else:
            first_source[row.id] = row.source
            kept.append(row)
    return kept, quarantine
