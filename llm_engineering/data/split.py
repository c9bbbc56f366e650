"""Splits rows so that all rows of one document fall on one side, and stay there when data is added later."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

from llm_engineering.config import SplitConfig
from llm_engineering.data.quarantine import Quarantined, by_reason
from llm_engineering.data.rows import InstructionRow, PreferenceRow
from llm_engineering.data.validate import prompt_text
from llm_engineering.errors import WorkError

SPLITS = ("train", "validation", "test")
RowT = TypeVar("RowT", InstructionRow, PreferenceRow)


def split_key(row: InstructionRow | PreferenceRow) -> str:
    """What decides a row's split: its document, or its prompt with case, punctuation and space folded."""
    if row.document:
        return row.document
    return prompt_text(row)


def split_of(key: str, config: SplitConfig) -> str:
    """The split of a key: its SHA-256 as a number in [0, 1), the test share first, then validation.

    It depends on the key alone, so a row never changes sides when other rows come or go.
    """
    position = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) / 2**64
    if position < config.test_fraction:
        return "test"
    return "validation" if position < config.test_fraction + config.validation_fraction else "train"


def split_rows(
    rows: Sequence[RowT], config: SplitConfig, kind: str, quarantine: Sequence[Quarantined]
) -> dict[str, list[RowT]]:
    """Rows by split, in their order.

    Args:
        quarantine: what was set aside on the way, for the message when too little is left.

    Raises:
        WorkError: a split is empty, so that there would be nothing to train on or to measure with.
    """
    if not rows:
        reasons = ", ".join(f"{count} {reason}" for reason, count in by_reason(quarantine).items())
        raise WorkError(
            f"No {kind} row is left: all that was read was set aside ({reasons or 'nothing was read'}). "
            "`make inspect DATA=file` shows each row of a file with its reason."
        )
    parts: dict[str, list[RowT]] = {name: [] for name in SPLITS}
    for row in rows:
        parts[split_of(split_key(row), config)].append(row)
    empty = [name for name, part in parts.items() if not part]
    if empty:
        groups = len({split_key(row) for row in rows})
        raise WorkError(
            f"The {kind} dataset has {len(rows)} rows from {groups} documents or prompts, and the "
            f"{' and '.join(empty)} split came out empty. Add data, or raise data.split.test_fraction and "
            "data.split.validation_fraction."
        )
    return parts
