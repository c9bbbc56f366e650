"""Reads a dataset of any known format into an Arrow file, makes prompts of instructions, and indexes evaluation files."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset

from llm_engineering.data.formats.detection import OpenedDataset, UnknownFormatError, open_dataset
from llm_engineering.data.ledger import Ledger
from llm_engineering.data.reading.files import Record
from llm_engineering.data.reading.sources import open_records
from llm_engineering.data.rows import REPLAY, InstructionRow, PromptRow, Quarantined, Row
from llm_engineering.data.similarity import EvaluationIndex
from llm_engineering.data.storage import FEATURES, TableWriter
from llm_engineering.recipe.data_blocks import DataConfig

logger = logging.getLogger(__name__)


class Loaded(NamedTuple):
    """A dataset after reading: its kind, the name of its format, and its rows."""

    kind: str
    format: str
    rows: Dataset


def load_rows(
    reference: str,
    kind: str | None,
    config: DataConfig,
    path: Path,
    ledger: Ledger,
    suffix: str = "",
    more: Iterable[Row | Quarantined] = (),
) -> Loaded:
    """Read all rows of a dataset into an Arrow file. Rows that cannot be read are quarantined.

    Args:
        kind: `instruction`, `preference`, `labelled` or `prompt`; None detects it.
        path: the file to write.
        suffix: text after the kind in the name of the ledger's stage, e.g. `_test`.
        more: rows of another source, which follow those of the dataset.

    Raises:
        RequestError: the dataset is missing, empty or in no known format, or it fits several formats.
    """
    opened = open_dataset(reference, kind, config)
    stage = opened.kind + suffix
    read = 0
    with TableWriter(path, FEATURES[opened.kind]) as table:
        for row in chain(opened.rows, more):
            read += 1
            if isinstance(row, Quarantined):
                ledger.set_aside([row.model_copy(update={"stage": stage})])
            else:
                table.write(row.record())
    ledger.record(stage, read, table.rows)
    ledger.unread[stage] = opened.unread
    return Loaded(opened.kind, opened.format, table.dataset())


def prompts_of(rows: Sequence[InstructionRow], stage: str) -> tuple[list[PromptRow], list[Quarantined]]:
    """A prompt of the question of each row, whose answer is the accepted one. General rows are set aside.

    Args:
        stage: the stage under which the quarantine counts them.
    """
    detail = "a row of data.replay_instructions is only for instructions"
    prompts = [
        PromptRow(
            prompt=row.prompt,
            answers=[row.completion[0].content],
            source=row.source,
            origin=row.origin,
            document=row.document,
        )
        for row in rows
        if row.origin != REPLAY
    ]
    return prompts, [Quarantined.of_row(row, stage, REPLAY, detail) for row in rows if row.origin == REPLAY]


def load_evaluation(references: list[str], n: int, questions: Sequence[str] = ()) -> EvaluationIndex | None:
    """Index the evaluation files that training rows must not share n-grams with; None without files and questions.

    Benchmarks often have their own columns. If a file is in no known format or fits several, each text in it is indexed
    separately.

    Args:
        questions: those of the exam. A training row must not ask any of them.

    Raises:
        RequestError: a file is missing, empty or cannot be read.
    """
    if not references and not questions:
        return None
    index = EvaluationIndex(n)
    for question in questions:
        index.add_text(question)
    for reference in references:
        opened = _open_evaluation(reference)
        if opened is None:
            for record in open_records(reference):
                for text in _texts(record.value) if isinstance(record, Record) else ():
                    index.add_text(text)
        else:
            for row in opened.rows:
                if not isinstance(row, Quarantined):
                    index.add(row)
    return index


def check_evaluation(references: list[str]) -> None:
    """Open each evaluation file once, so that a wrong one is refused before the run.

    Raises:
        RequestError: a file is missing, empty or cannot be read.
    """
    for reference in references:
        _open_evaluation(reference)


def _open_evaluation(reference: str) -> OpenedDataset | None:
    """The rows of an evaluation file, or None if its format is unknown or ambiguous."""
    try:
        # Not the recipe's DataConfig: its `columns` map the names of another dataset.
        opened = open_dataset(reference, None, DataConfig())
    except UnknownFormatError:
        opened = None
    # A benchmark has columns beside its questions, such as choices.
    if opened is None or opened.kind == "prompt":
        logger.info("The format of %s is not clear: each of its texts is compared alone", reference)
        return None
    return opened


def _texts(value: Any) -> Iterator[str]:
    """All strings inside a JSON value, which may be nested more deeply than Python functions can be."""
    waiting = [value]
    while waiting:
        inner = waiting.pop()
        if isinstance(inner, str):
            yield inner
        elif isinstance(inner, dict | list):
            waiting += inner.values() if isinstance(inner, dict) else inner
