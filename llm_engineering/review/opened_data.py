"""Opens what the data pages show: a dataset of a run, or a file with what the rules say about it; and writes corrected files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase

from llm_engineering.data.ledger import Ledger
from llm_engineering.data.load import load_rows
from llm_engineering.data.prepare import prepare
from llm_engineering.data.rows import SPLITS, read_row
from llm_engineering.data.storage import work_folder
from llm_engineering.documents.document import Document
from llm_engineering.feedback.decisions import Decision, apply_decisions, content_of
from llm_engineering.recipe.data_blocks import DataConfig, FormattingConfig
from llm_engineering.review.browse import Table

REVIEWED = ".reviewed.jsonl"


@dataclass(frozen=True)
class Rendering:
    """How a recipe renders rows: the tokenizer, which is loaded when it is first needed, and its settings."""

    tokenizer: Callable[[], PreTrainedTokenizerBase]
    formatting: FormattingConfig


@dataclass(frozen=True)
class Opened:
    """A dataset with everything that its pages show.

    Attributes:
        title: its name for people, which decisions store.
        rows: the rows by split.
        quarantine, findings, clusters: as `Ledger` and `prepare` write them.
        joined_by: the column of findings that says which row they are about. The rules may mask a row of a file, which
            changes its id.
        document: returns a source document by its name; None if the run has none of this name.
        corrected: the file that the corrected rows are written to; None for a dataset of a run.
    """

    title: str
    kind: str
    rows: Table
    quarantine: Table
    findings: Table
    clusters: Table
    joined_by: Literal["id", "source"]
    document: Callable[[str], Document | None]
    rendering: Rendering
    corrected: Path | None = None


def opened_run(
    title: str, kind: str, dataset: DatasetDict, document: Callable[[str], Document | None], rendering: Rendering
) -> Opened:
    """A dataset that the step `prepare` made. No row is read."""
    return Opened(
        title=title,
        kind=kind,
        rows=Table({name: dataset[name] for name in SPLITS}),
        quarantine=_table(dataset, "quarantine"),
        findings=_table(dataset, "findings"),
        clusters=_table(dataset, "clusters"),
        joined_by="id",
        document=document,
        rendering=rendering,
    )


def opened_file(file: str, data: DataConfig, folder: Path, rendering: Rendering) -> Opened:
    """Read a file, and find what the rules say about its rows. All rows that can be read are shown.

    Args:
        folder: the folder for the corrected rows if `file` is no file on this machine.

    Raises:
        RequestError: the file is missing or empty, or in no known format.
    """
    work = work_folder()
    ledger = Ledger()
    loaded = load_rows(file, None, data, work / "rows.arrow", ledger)
    lenient = data.model_copy(update={"strict": False})
    prepared = prepare(loaded.rows, loaded.kind, lenient, ledger, work, inspected=True)
    tables = DatasetDict(**prepared.tables(), **ledger.datasets())
    path = Path(file)
    place = path if path.is_file() else folder / path.name.partition("#")[0]
    return Opened(
        title=path.name,
        kind=loaded.kind,
        rows=Table({"all": loaded.rows}),
        quarantine=_table(tables, "quarantine"),
        findings=_table(tables, "findings"),
        clusters=_table(tables, "clusters"),
        joined_by="source",
        document=lambda _: None,
        rendering=rendering,
        corrected=place.with_name(place.name.partition(".")[0] + REVIEWED),
    )


def _table(tables: Mapping[str, Dataset], name: str) -> Table:
    return Table({name: tables[name]})


class Corrected(NamedTuple):
    """A corrected file: the number of its rows, and what the decisions did."""

    path: Path
    rows: int
    edited: int
    dropped: int


def write_corrected(opened: Opened, decisions: Mapping[str, Decision]) -> Corrected:
    """Write the rows of a file after the decisions on them, beside the file. An earlier corrected file is replaced.

    Rows that a rule sets aside are written too: the rules see the corrected file again. Records that cannot be read are
    not rows, and are not written.
    """
    assert opened.corrected is not None
    counts = {"rows": 0, "edited": 0, "dropped": 0}
    unfinished = opened.corrected.with_name(f".{opened.corrected.name}.partial")
    opened.corrected.parent.mkdir(parents=True, exist_ok=True)
    # Lone surrogates, which UTF-8 cannot write, are read again as they were.
    with unfinished.open("w", encoding="utf-8", errors="surrogatepass") as file:
        for position in opened.rows.all:
            row = read_row(opened.rows.records([position])[0], opened.kind)
            applied = apply_decisions([row], decisions, opened.kind)
            counts["edited"] += applied.edited
            counts["dropped"] += len(applied.rejected)
            for kept in applied.rows:
                counts["rows"] += 1
                names = {"origin": kept.origin, **({"document": kept.document} if kept.document else {})}
                file.write(json.dumps({**content_of(kept), **names}, ensure_ascii=False) + "\n")
    unfinished.replace(opened.corrected)
    return Corrected(opened.corrected, **counts)
