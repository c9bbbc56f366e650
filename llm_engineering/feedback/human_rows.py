"""Rows that people made, how they are stored, and how they join the rows of files and of models.

What people said about a kind of rows is fixed when a run starts: `take_snapshot` writes it to a file that is named by its
hash. A run does not see what is said while it runs, and the hash among its inputs decides whether a result can be reused.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, DatasetDict, Features, Value, concatenate_datasets

from llm_engineering.data.ledger import QUARANTINE_FEATURES, Ledger, Quarantined
from llm_engineering.data.rows import (
    FEATURES,
    HUMAN,
    REPEATED,
    InstructionRow,
    PreferenceRow,
    read_row,
    split_key,
    split_of,
    to_dataset,
)
from llm_engineering.data.storage import stream_records
from llm_engineering.errors import WorkError
from llm_engineering.recipe.data_blocks import SplitConfig

_TEXT = Value("string")
_DROP_FEATURES = Features(dict.fromkeys(("id", "by", "at", "reason"), _TEXT))
_ABOUT: dict[str, Any] = {**dict.fromkeys(("by", "at", "about", "replaces"), _TEXT), "held_out": Value("bool")}


@dataclass(frozen=True)
class HumanRow:
    """A row that people made. A labelled row is an instruction row too.

    Attributes:
        row: its `origin` is HUMAN and the source. Its `document` is that of the row that was judged or edited; without one,
            the `split_key` of that row, so that both are always in the same split.
        by: who said it; several names are separated by commas.
        at: when it was said last, in ISO 8601 and UTC.
        about: what was judged, e.g. the two models whose answers were compared.
        held_out: whether the question was held out for testing when it was judged. Such a row is never trained on.
        replaces: the id of the row that an edit replaces; empty for a new row.
    """

    row: InstructionRow | PreferenceRow
    by: str
    at: str
    about: str
    held_out: bool = False
    replaces: str = ""

    def record(self) -> dict[str, Any]:
        """The row and the facts about it as one record."""
        return {**self.row.record(), **{name: getattr(self, name) for name in _ABOUT}}


class HumanDrop(NamedTuple):
    """A row that a person dropped, by its id; `by` and `at` are those of `HumanRow`."""

    id: str
    by: str
    at: str
    reason: str


class Said(NamedTuple):
    """What people said about the rows of a kind.

    Attributes:
        aside: what gives no row, with the reason, e.g. a tie.
    """

    rows: list[HumanRow]
    drops: list[HumanDrop]
    aside: list[Quarantined]

    @property
    def hash(self) -> str:
        """Hash of what decides the rows of training, so not of `aside`."""
        return _hash(json.dumps([[row.record() for row in self.rows], self.drops], sort_keys=True))


def take_snapshot(said: Said, folder: Path) -> str:
    """Write what people said to a file in `folder`; returns its hash, which is its name (sixteen hex digits)."""
    content = {
        "rows": [row.record() for row in said.rows],
        "drops": [drop._asdict() for drop in said.drops],
        "aside": [row.model_dump() for row in said.aside],
    }
    text = json.dumps(content, sort_keys=True)
    name = _hash(text)
    folder.mkdir(parents=True, exist_ok=True)
    # Replaced as a whole, so that a killed process leaves no half of a file under this name.
    (folder / f"{name}.part").write_text(text, encoding="ascii")
    (folder / f"{name}.part").replace(folder / f"{name}.json")
    return name


def read_snapshot(name: str, kind: str, folder: Path) -> DatasetDict:
    """Read a snapshot as the tables `rows`, whose columns are those of the kind and those of `HumanRow`, `drops` and `aside`.

    Raises:
        WorkError: the file is gone.
    """
    file = folder / f"{name}.json"
    try:
        content = json.loads(file.read_text(encoding="ascii"))
    except OSError as error:
        raise WorkError(
            f"{file}, where this run noted what people said, cannot be read ({error.strerror}). Start the run again."
        ) from error
    features = Features({**FEATURES[kind], **_ABOUT})
    tables = {"rows": features, "drops": _DROP_FEATURES, "aside": QUARANTINE_FEATURES}
    return DatasetDict({name: to_dataset(content[name], columns) for name, columns in tables.items()})


def facts(human: DatasetDict) -> dict[str, Any]:
    """Who said how much, when first and last, and about what, for the metadata of an artifact."""
    rows, drops = human["rows"], human["drops"]
    names = Counter(name for part in (rows, drops) for by in part["by"] for name in by.split(", "))
    times = sorted([*rows["at"], *drops["at"]])
    return {
        "rows": len(rows),
        "drops": len(drops),
        "without_a_row": dict(Counter(human["aside"]["reason"]).most_common()),
        "by": dict(names.most_common()),
        "first": times[0],
        "last": times[-1],
        "about": dict(Counter(rows["about"]).most_common()),
    }


def join(
    candidates: DatasetDict | None, human: DatasetDict, kind: str, split: SplitConfig, ledger: Ledger
) -> DatasetDict:
    """Put the rows of people before the candidates, so that they stay if others are like them, and apply edits and drops.

    Rows about held-out questions join the user's own test split; without one, they are set aside if they would be trained on.

    Args:
        candidates: the tables `rows` and, for the user's own test split, `test_rows`; None if people made all rows.
    """
    edited = {record["replaces"]: record for record in stream_records(human["rows"]) if record["replaces"]}
    dropped = {record["id"]: record for record in stream_records(human["drops"])}
    new = [record for record in stream_records(human["rows"]) if not record["replaces"]]
    joined: dict[str, Dataset] = {}
    parts = {"rows": kind, "test_rows": f"{kind}_test"}
    found: set[str] = set()
    for part, stage in parts.items():
        table = candidates.get(part) if candidates is not None else None
        if table is None:
            continue
        aside: list[Quarantined] = []
        keep: list[int] = []
        added = []
        for place, row_id in enumerate(table["id"]):
            if row_id not in edited and row_id not in dropped:
                keep.append(place)
                continue
            row = read_row(table[place], kind)
            said = edited.get(row_id) or dropped[row_id]
            if row_id in edited and row_id not in found:
                added.append(said)
            reason = "edited_by_reviewer" if row_id in edited else "dropped_by_reviewer"
            detail = f"by {said['by']}" + (f": {said['reason']}" if row_id in dropped and said["reason"] else "")
            aside.append(Quarantined.of_row(row, stage, reason, detail))
            found.add(row_id)
        ledger.record(stage, len(table), len(keep), aside)
        kept = table if len(keep) == len(table) else table.select(keep)
        joined[part] = concatenate_datasets([_table(added, kind), kept]) if added else kept
        ledger.add(stage, len(added))
    own_test = "test_rows" in joined
    taken: dict[str, list[dict[str, Any]]] = {"rows": [], "test_rows": []}
    aside = [Quarantined.model_validate(record) for record in human["aside"]]
    for record in new:
        row = read_row(record, kind)
        if own_test and record["held_out"]:
            taken["test_rows"].append(record)
        elif record["held_out"] and split_of(split_key(row), split, own_test) != "test":
            detail = "the question was held out for testing when it was judged"
            aside.append(Quarantined.of_row(row, kind, "held_out_question", detail))
        else:
            taken["rows"].append(record)
    gone = "the row that was edited is no longer among the candidates"
    aside += [
        Quarantined.of_row(read_row(record, kind), kind, "edited_row_gone", gone)
        for row_id, record in edited.items()
        if row_id not in found
    ]
    for part, stage in parts.items():
        if part == "rows" or part in joined or taken[part]:
            people = _table(taken[part], kind)
            joined[part] = concatenate_datasets([people, joined[part]]) if part in joined else people
            ledger.read.setdefault(stage, 0)
            ledger.kept.setdefault(stage, 0)
            ledger.add(stage, len(people) + (len(aside) if part == "rows" else 0))
    ledger.record(kind, ledger.kept[kind], ledger.kept[kind] - len(aside), aside)
    return DatasetDict(joined)


def repeated(train: Dataset, kind: str, weight: int) -> Dataset:
    """The rows of people in a train split, each `weight` - 1 times more."""
    people = train.select([place for place, origin in enumerate(train["origin"]) if origin.startswith(HUMAN)])
    records = [{**record, "origin": REPEATED + record["origin"]} for record in stream_records(people)]
    return to_dataset(records * (weight - 1), FEATURES[kind])


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _table(records: list[dict[str, Any]], kind: str) -> Dataset:
    return to_dataset(records, FEATURES[kind])
