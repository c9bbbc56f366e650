"""Rows that people made, how they are stored, and how they join the rows of files and of models.

What people said about a kind of rows is fixed when a run starts: `take_snapshot` writes it to a file that is named by its
hash. A run does not see what is said while it runs, and the hash among its inputs decides whether a result can be reused.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, DatasetDict, Features, Value, concatenate_datasets

from llm_engineering.data.ledger import QUARANTINE_FEATURES, Ledger
from llm_engineering.data.rows import HUMAN, REPEATED, InstructionRow, PreferenceRow, Quarantined, Row, folded, read_row
from llm_engineering.data.storage import FEATURES, stream_records, to_dataset
from llm_engineering.errors import WorkError
from llm_engineering.feedback.decisions import Decision, apply_decisions, current
from llm_engineering.recipe.data_blocks import DataConfig

_TEXT = Value("string")
# The content of an edited row is JSON, because its columns depend on the kind.
_DECISION_FEATURES = Features(dict.fromkeys(Decision.model_fields, _TEXT))
_ABOUT: dict[str, Any] = {**dict.fromkeys(("by", "at", "about"), _TEXT), "held_out": Value("bool")}


@dataclass(frozen=True)
class HumanRow:
    """A row that people made. A labelled row is an instruction row too.

    Attributes:
        row: its `origin` is HUMAN and the source. Its `document` is that of the row that was judged; without one,
            the `split_key` of that row, so that both are always in the same split.
        by: who said it; several names are separated by commas.
        at: when it was said last, in ISO 8601 and UTC.
        about: what was judged, e.g. the two models whose answers were compared.
        held_out: whether the question is held out for testing. Such a row is no part of a dataset.
    """

    row: InstructionRow | PreferenceRow
    by: str
    at: str
    about: str
    held_out: bool = False

    def record(self) -> dict[str, Any]:
        """The row and the facts about it as one record."""
        return {**self.row.record(), **{name: getattr(self, name) for name in _ABOUT}}


class Said(NamedTuple):
    """What people said about the rows of a kind.

    Attributes:
        aside: what gives no row, with the reason, e.g. a tie.
    """

    rows: list[HumanRow]
    decisions: list[Decision]
    aside: list[Quarantined]

    @property
    def hash(self) -> str:
        """Hash of what decides the rows of training, so not of `aside` and of rows about held-out questions."""
        trained = [row.record() for row in self.rows if not row.held_out]
        return _hash(json.dumps([trained, [made.model_dump() for made in self.decisions]], sort_keys=True))


def take_snapshot(said: Said, folder: Path) -> str:
    """Write what people said to a file in `folder`; returns its hash, which is its name (sixteen hex digits)."""
    content = {
        "rows": [row.record() for row in said.rows],
        "decisions": [{**made.model_dump(), "content": json.dumps(made.content)} for made in said.decisions],
        "aside": [row.model_dump() for row in said.aside],
    }
    return note(content, folder)


def note(content: Any, folder: Path) -> str:
    """Write a JSON value to a file in `folder`; returns its hash, which is its name."""
    text = json.dumps(content, sort_keys=True)
    name = _hash(text)
    folder.mkdir(parents=True, exist_ok=True)
    # Replaced as a whole, so that a killed process leaves no half of a file under this name.
    (folder / f"{name}.part").write_text(text, encoding="ascii")
    (folder / f"{name}.part").replace(folder / f"{name}.json")
    return name


def read_snapshot(name: str, kind: str, folder: Path) -> DatasetDict:
    """Read a snapshot as the tables `rows`, whose columns are those of the kind and those of `HumanRow`, `decisions` and `aside`.

    Raises:
        WorkError: the file is gone.
    """
    content = noted(name, folder)
    tables = {
        "rows": Features({**FEATURES[kind], **_ABOUT}),
        "decisions": _DECISION_FEATURES,
        "aside": QUARANTINE_FEATURES,
    }
    return DatasetDict({name: to_dataset(content[name], columns) for name, columns in tables.items()})


def noted(name: str, folder: Path) -> Any:
    """Read what `note` wrote.

    Raises:
        WorkError: the file is gone.
    """
    file = folder / f"{name}.json"
    try:
        return json.loads(file.read_text(encoding="ascii"))
    except OSError as error:
        raise WorkError(
            f"{file}, where this run noted what people said, cannot be read ({error.strerror}). Start the run again."
        ) from error


def facts(human: DatasetDict) -> dict[str, Any]:
    """Who said how much, when first and last, and about what, for the metadata of an artifact."""
    rows, decisions = human["rows"], human["decisions"]
    names = Counter([*(name for by in rows["by"] for name in by.split(", ")), *decisions["reviewer"]])
    times = sorted([*rows["at"], *decisions["time"]])
    return {
        "rows": len(rows),
        "decisions": dict(Counter(decisions["action"])),
        "without_a_row": dict(Counter(human["aside"]["reason"]).most_common()),
        "by": dict(names.most_common()),
        "first": times[0],
        "last": times[-1],
        "about": dict(Counter([*rows["about"], *decisions["dataset"]]).most_common()),
    }


def join(
    candidates: DatasetDict | None,
    human: DatasetDict,
    kind: str,
    config: DataConfig,
    ledger: Ledger,
    held_out: Container[str] = (),
) -> DatasetDict:
    """Apply the decisions of reviewers to the candidates and to the rows of people, and put these first.

    What comes first stays if other rows are like it. Rows about held-out questions are set aside. In the test split they would
    change the dataset, and so the model that they judge would be trained again.

    Args:
        candidates: the tables `rows` and, for the user's own test split, `test_rows`; None if people made all rows.
        held_out: the `folded` held-out questions of another dataset. A row that asks one of these questions is set aside.
    """
    decisions = current(_decision(record) for record in human["decisions"])
    parts = {"rows": kind, "test_rows": f"{kind}_test"}
    tables = {part: candidates[part] for part in parts if candidates is not None and part in candidates}
    for part, table in tables.items() if decisions else ():
        rows = (read_row(record, kind) for record in stream_records(table))
        applied = apply_decisions(rows, decisions, parts[part], config.rules)
        ledger.record(parts[part], len(table), len(applied.rows), applied.rejected)
        first = sorted(applied.rows, key=lambda row: not row.origin.startswith(HUMAN))
        tables[part] = _table([row.record() for row in first], kind)
    aside = [Quarantined.model_validate(record) for record in human["aside"]]
    taken: list[Row] = []
    for record in human["rows"]:
        row = read_row(record, kind)
        if record["held_out"] or folded(row.prompt[-1:]) in held_out:
            detail = "the question is held out for testing, so that its answers are only judged"
            aside.append(Quarantined.of_row(row, kind, "held_out_question", detail))
        else:
            taken.append(row)
    applied = apply_decisions(taken, decisions, kind, config.rules)
    aside += applied.rejected
    people = _table([row.record() for row in applied.rows], kind)
    tables["rows"] = concatenate_datasets([people, tables["rows"]]) if "rows" in tables else people
    ledger.read.setdefault(kind, 0)
    ledger.kept.setdefault(kind, 0)
    ledger.add(kind, len(people) + len(aside))
    ledger.record(kind, ledger.kept[kind], ledger.kept[kind] - len(aside), aside)
    return DatasetDict(tables)


def _decision(record: dict[str, Any]) -> Decision:
    return Decision.model_validate({**record, "content": json.loads(record["content"])})


def repeated(train: Dataset, kind: str, weight: int) -> Dataset:
    """The rows of people in a train split, each `weight` - 1 times more."""
    people = train.select([place for place, origin in enumerate(train["origin"]) if origin.startswith(HUMAN)])
    records = [{**record, "origin": REPEATED + record["origin"]} for record in stream_records(people)]
    return to_dataset(records * (weight - 1), FEATURES[kind])


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _table(records: list[dict[str, Any]], kind: str) -> Dataset:
    return to_dataset(records, FEATURES[kind])
