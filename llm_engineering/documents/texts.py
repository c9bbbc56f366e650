"""Makes the text rows of continued pre-training: whole documents or single sentences, and a share of a general dataset."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

from llm_engineering.data.reading.files import BrokenRecord
from llm_engineering.data.reading.sources import open_records
from llm_engineering.data.rows import REPLAY, Quarantined, TextRow, is_blank, split_key, split_of
from llm_engineering.documents.document import Document
from llm_engineering.documents.passages import Passage
from llm_engineering.errors import RequestError
from llm_engineering.recipe.data_blocks import ReplayConfig, SplitConfig

logger = logging.getLogger(__name__)


def document_rows(documents: Sequence[Document]) -> list[TextRow]:
    """A row for each document. Its split is that of the questions about the document."""
    return [
        TextRow(text=document.text, source=document.source, origin="document", document=document.source)
        for document in documents
    ]


def sentence_rows(passages: Sequence[Passage]) -> list[TextRow]:
    """A row for each sentence. All sentences of a document are in the split of the document."""
    return [
        TextRow(
            text=passage.text,
            source=passage.source,
            origin="document",
            document=passage.document,
        )
        for passage in passages
    ]


def replay_rows(
    config: ReplayConfig, documents: Sequence[TextRow], split: SplitConfig
) -> tuple[list[TextRow], list[Quarantined]]:
    """The first rows of the general dataset, until they are `share` of the characters that are trained on.

    Args:
        documents: the rows that they are mixed with. Only those of the training split count.

    Returns:
        The rows, and the records before the last row that have no text.

    Raises:
        RequestError: the dataset cannot be read, or no record of it has a text.
    """
    trained = sum(len(row.text) for row in documents if split_of(split_key(row), split) == "train")
    wanted = trained * config.share / (1 - config.share)
    rows: list[TextRow] = []
    rejected: list[Quarantined] = []
    characters = 0
    for row in _texts(config.path):
        if characters >= wanted:
            break
        if isinstance(row, Quarantined):
            rejected.append(row)
        else:
            rows.append(row)
            characters += len(row.text)
    if not rows:
        first = f"; the first problem: {rejected[0].describe()}" if rejected else ""
        raise RequestError(f"data.replay.path {config.path} has no row with a column `text`{first}.")
    if characters < wanted:
        share = characters / (characters + trained)
        logger.warning("data.replay has text for a share of %.1f %% only: %s is too short", 100 * share, config.path)
    return rows, rejected


def check_replay(config: ReplayConfig) -> None:
    """Read the first row of the general dataset, so that a wrong dataset is refused before the run.

    Raises:
        RequestError: the dataset cannot be read, or its first record has no text.
    """
    first = next(_texts(config.path), None)
    if first is None or isinstance(first, Quarantined):
        problem = f": {first.describe()}" if first is not None else ", because it is empty"
        raise RequestError(
            f"data.replay.path {config.path} cannot be used{problem}. Name a dataset with a column `text`."
        )


def _texts(path: str) -> Iterator[TextRow | Quarantined]:
    for record in open_records(path):
        if isinstance(record, BrokenRecord):
            yield record.quarantined("text")
            continue
        value, file, place = record
        name, text = f"{file.rpartition('/')[2]}:{place}", value.get("text")
        if isinstance(text, str) and not is_blank(text):
            yield TextRow(text=text, source=name, origin=REPLAY)
        else:
            detail = f"it has the columns {', '.join(value) or '(none)'}"
            yield Quarantined(stage="text", reason="no_text", source=name, place=place, detail=detail)
