"""Rows as cards: what a page shows of each row, and which rows a page shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llm_engineering.data.rows import Row, read_row
from llm_engineering.errors import RequestError
from llm_engineering.feedback.decisions import Decision, edited_row
from llm_engineering.generation.derived.question_wordings import OTHER_WORDING
from llm_engineering.review.browse import Filter
from llm_engineering.review.opened_data import Opened
from llm_engineering.review.row_views import Part, parts_of

DONE = {"accept": "accepted", "edit": "edited", "drop": "dropped", "undo": "reopened"}


@dataclass(frozen=True)
class Card:
    """A row on a page.

    Attributes:
        row: the row, with the new texts if it was edited.
        original: the row as the dataset has it.
        issues: name and detail of each rule that reports the row or sets it aside.
        limit: characters after which a text is cut.
        is_made_later: whether the row was made of another one after the rules, so that no decision can be applied to it.
    """

    position: int
    split: str
    row: Row
    original: Row
    chars: int
    issues: list[tuple[str, str]]
    decision: Decision | None
    limit: int

    @property
    def parts(self) -> list[Part]:
        """The texts of the row."""
        return parts_of(self.row)

    @property
    def is_made_later(self) -> bool:
        """See the class."""
        return self.original.origin.startswith(OTHER_WORDING)

    @property
    def done(self) -> str:
        """What was decided, for people; empty if nothing was."""
        return DONE[self.decision.action] if self.decision is not None else ""


def cards_of(
    opened: Opened, positions: Sequence[int] | np.ndarray[Any, Any], last: Mapping[str, Decision], limit: int | None
) -> list[Card]:
    """The rows at these positions, with their issues and the decisions `last`. `limit` None cuts no text."""
    originals = [read_row(record, opened.kind) for record in opened.rows.records(positions)]
    keys = [getattr(row, opened.joined_by) for row in originals]
    issues: dict[str, list[tuple[str, str]]] = {}
    for record in opened.findings.records(opened.findings.where(opened.joined_by, equals=keys)):
        issues.setdefault(record[opened.joined_by], []).append((record["rule"], record["detail"]))
    joined = "place" if opened.joined_by == "id" else "source"
    for record in opened.quarantine.records(opened.quarantine.where(joined, equals=keys)):
        issues.setdefault(record[joined], []).append((f"set aside: {record['reason']}", record["detail"]))
    cards = []
    for position, original, key in zip(positions, originals, keys, strict=True):
        decision = last.get(original.id)
        is_edited = decision is not None and decision.action == "edit"
        cards.append(
            Card(
                position=int(position),
                split=opened.rows.part_of(int(position)),
                row=edited_row(original, decision) if decision is not None and is_edited else original,
                original=original,
                chars=int(opened.rows.chars[position]),
                issues=issues.get(key, []),
                decision=decision,
                limit=limit or 1 << 62,
            )
        )
    return cards


def chosen_rows(opened: Opened, wanted: Filter, last: Mapping[str, Decision]) -> np.ndarray[Any, Any]:
    """The positions of the rows to show.

    Raises:
        RequestError: the dataset has no such split.
    """
    if wanted.split and wanted.split not in opened.rows.parts:
        raise RequestError(f"The dataset has no split {wanted.split}. Choose one of {', '.join(opened.rows.parts)}.")
    found: set[str] = set()
    if wanted.finding:
        for table, column in ((opened.findings, "rule"), (opened.quarantine, "reason")):
            joined = "place" if table is opened.quarantine and opened.joined_by == "id" else opened.joined_by
            found |= {record[joined] for record in table.records(table.where(column, equals=[wanted.finding]))}
    return wanted.rows(opened.rows, found, {row: one.action for row, one in last.items()}, opened.joined_by)


def rules_of(opened: Opened) -> dict[str, int]:
    """The rules that report rows, or set rows of a file aside, and how many. Rows that a run set aside are not in its dataset."""
    reported = opened.findings.counts("rule")
    aside = {} if opened.corrected is None else opened.quarantine.counts("reason")
    return {name: reported.get(name, 0) + aside.get(name, 0) for name in (*reported, *aside)}
