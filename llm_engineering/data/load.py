"""Brings the rows of a dataset to disk, whatever format they are in."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset

from llm_engineering.data.duplicates import EvaluationIndex
from llm_engineering.data.files import Record
from llm_engineering.data.formats import UnknownFormatError, open_dataset
from llm_engineering.data.ledger import Ledger, Quarantined
from llm_engineering.data.rows import INSTRUCTION_FEATURES, PREFERENCE_FEATURES
from llm_engineering.data.sources import open_records
from llm_engineering.data.storage import TableWriter
from llm_engineering.recipe.data_blocks import DataConfig

logger = logging.getLogger(__name__)


class Loaded(NamedTuple):
    """A dataset that was read: `instruction` or `preference`, the name of its format, and its rows."""

    kind: str
    format: str
    rows: Dataset


def load_rows(
    reference: str, kind: str | None, config: DataConfig, path: Path, ledger: Ledger, suffix: str = ""
) -> Loaded:
    """Read all rows of a dataset into an Arrow file; what cannot be read is set aside.

    Args:
        kind: `instruction` or `preference`; None recognises it.
        path: the file to write.
        suffix: goes behind the kind in the ledger's stage, e.g. `_test`.

    Raises:
        RequestError: the dataset is missing, empty or in no known format, or several readings are possible.
    """
    opened = open_dataset(reference, kind, config)
    stage = opened.kind + suffix
    read = 0
    features = INSTRUCTION_FEATURES if opened.kind == "instruction" else PREFERENCE_FEATURES
    with TableWriter(path, features) as table:
        for row in opened.rows:
            read += 1
            if isinstance(row, Quarantined):
                ledger.set_aside([row.model_copy(update={"stage": stage})])
            else:
                table.write(row.record())
    ledger.record(stage, read, table.rows)
    return Loaded(opened.kind, opened.format, table.dataset())


def load_evaluation(references: list[str], n: int) -> EvaluationIndex | None:
    """Index evaluation files that training rows must not share n-grams with; None where there is no file.

    Of a file in no known format (benchmarks have columns of their own) each text counts by itself.

    Raises:
        RequestError: a file is missing, empty or cannot be read.
    """
    if not references:
        return None
    index = EvaluationIndex(n)
    for reference in references:
        try:
            # The names of the recipe's own columns say nothing about another's file.
            rows = open_dataset(reference, None, DataConfig()).rows
        except UnknownFormatError:
            logger.info("%s is in no known format: each of its texts counts by itself", reference)
            for record in open_records(reference):
                for text in _texts(record.value) if isinstance(record, Record) else ():
                    index.add_text(text)
            continue
        for row in rows:
            if not isinstance(row, Quarantined):
                index.add(row)
    return index


def check_evaluation(references: list[str]) -> None:
    """Open evaluation files once, so that a wrong one is told now.

    Raises:
        RequestError: as `load_evaluation`.
    """
    for reference in references:
        try:
            open_dataset(reference, None, DataConfig())
        except UnknownFormatError:
            logger.info("%s is in no known format: each of its texts counts by itself", reference)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)
