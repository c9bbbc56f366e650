"""Decisions of reviewers on rows: accept, edit or drop. The last decision on a row counts, see `current`; all are stored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field

from llm_engineering.data.row_rules import check_row
from llm_engineering.data.rows import HUMAN, REPLAY, Quarantined, Row, split_key
from llm_engineering.feedback import journal
from llm_engineering.recipe.data_blocks import RulesConfig

RowT = TypeVar("RowT", bound=Row)

FILE = "decisions.jsonl"
# The reason with which the quarantine counts rows that a reviewer dropped.
DROPPED = "dropped_by_reviewer"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class Decision(BaseModel):
    """What a reviewer decided on a row.

    Attributes:
        id: the row's id, a hash of its content.
        kind: the kind of the row, e.g. `preference`.
        action: `undo` takes back the decisions on the row.
        reason: why the row is dropped; may be empty for other actions.
        content: the new content of an edited row, in the columns of its kind; None for other actions.
        source: the row's source, to find it again.
        dataset: the dataset version, or the file, that the reviewer looked at.
        time: in UTC, ISO 8601.
    """

    model_config = ConfigDict(frozen=True)

    id: str
    kind: str
    action: Literal["accept", "edit", "drop", "undo"]
    reviewer: str
    reason: str = ""
    content: dict[str, Any] | None = None
    source: str = ""
    dataset: str = ""
    time: str = Field(default_factory=_now)


def store(folder: Path, decision: Decision) -> None:
    """Append a decision to the journal of a recipe's reviews. `folder` is that of the recipe."""
    journal.append(folder / FILE, decision.model_dump())


def stored(folder: Path) -> list[Decision]:
    """All decisions of a recipe's reviews, in the order in which they were made."""
    return [Decision.model_validate(record) for record in journal.read(folder / FILE)]


def current(decisions: Iterable[Decision]) -> dict[str, Decision]:
    """The decision that counts for each row, by the row's id: the last one, but an edit counts although it was accepted later."""
    last: dict[str, Decision] = {}
    for decision in decisions:
        if decision.action != "accept" or decision.id not in last or last[decision.id].action != "edit":
            last[decision.id] = decision
    return {number: decision for number, decision in last.items() if decision.action != "undo"}


class Applied(NamedTuple):
    """Rows after the decisions on them.

    Attributes:
        rows: the rows that were not dropped, in their order; edited ones with their new content.
        rejected: the quarantine records of the dropped ones.
        edited: the number of edited rows.
    """

    rows: list[Any]
    rejected: list[Quarantined]
    edited: int


def apply_decisions(
    rows: Iterable[RowT], decisions: Mapping[str, Decision], stage: str, rules: RulesConfig | None = None
) -> Applied:
    """Apply decisions to rows. Other rows come back unchanged.

    An edited row has the origin `human:` and the reviewer's name. It stays in the split that the row had before, because it
    keeps the row's document, or else gets the text that decided the split as its document. If a reviewer also decided on
    the edited row, that decision is applied to it.

    Args:
        decisions: those that count, by id, as `current` returns them.
        stage: the stage under which the quarantine counts dropped rows.
        rules: the rules that mask private data. Reviewers see masked rows, whose ids differ from those of `rows`.
    """
    kept: list[RowT] = []
    rejected: list[Quarantined] = []
    edited = 0
    for row in rows:
        result: RowT | Quarantined = row
        seen: set[str] = set()
        while not isinstance(result, Quarantined):
            decision = _decision_on(result, decisions, rules)
            # A reviewer may have changed a row back to an earlier text.
            if decision is None or decision.id in seen:
                break
            seen.add(decision.id)
            if decision.action == "drop":
                detail = f"{decision.reviewer}: {decision.reason}" if decision.reason else decision.reviewer
                result = Quarantined.of_row(result, stage, DROPPED, detail)
            elif decision.action == "edit":
                result = edited_row(result, decision)
            else:
                break
        if isinstance(result, Quarantined):
            rejected.append(result)
        else:
            kept.append(result)
            edited += result is not row
    return Applied(kept, rejected, edited)


def edited_row(row: RowT, decision: Decision) -> RowT:
    """The row with the content of an `edit`. A general row stays one, because only its origin keeps it in training."""
    origin = row.origin if row.origin == REPLAY else f"{HUMAN}{decision.reviewer}"
    names = {"source": row.source, "origin": origin, "document": row.document}
    edited = type(row).model_validate({**(decision.content or {}), **names})
    same_split = {} if split_key(edited) == split_key(row) else {"document": split_key(row)}
    return cast("RowT", edited.model_copy(update=same_split))


def content_of(row: Row) -> dict[str, Any]:
    """The content of a row in the columns of its kind, as `Decision.content` stores it."""
    return row.model_dump(by_alias=True, exclude={"source", "origin", "document"}, exclude_none=True)


def _decision_on(row: Row, decisions: Mapping[str, Decision], rules: RulesConfig | None) -> Decision | None:
    found = decisions.get(row.id)
    if found is None and rules is not None and decisions:
        found = decisions.get(check_row(row, rules).row.id)
    return found
