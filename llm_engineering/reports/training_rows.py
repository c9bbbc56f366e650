"""What training read of the documents: its tokens, and the number of its questions for the fact of each exam question."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from datasets import Dataset

from llm_engineering.data.rows import REPLAY, TWO_HOP, InstructionRow, normalised
from llm_engineering.data.storage import stream_records


def tokens_read(formatted: Dataset, rows: Dataset, epochs: float) -> int:
    """The tokens that a stage on texts or instructions read, without those of general datasets.

    Args:
        formatted: the training split as token ids, with the columns `id` and `input_ids`.
        rows: the same rows before formatting, with the columns `id` and `origin`.
    """
    general = {row["id"] for row in stream_records(rows.select_columns(["id", "origin"])) if row["origin"] == REPLAY}
    records = stream_records(formatted.select_columns(["id", "input_ids"]))
    return round(epochs * sum(len(record["input_ids"]) for record in records if record["id"] not in general))


def count_wordings(exam: Sequence[Mapping[str, Any]], rows: Iterable[InstructionRow]) -> list[int | None]:
    """The number of different questions that training had for the fact of each exam question.

    A training question is one for the fact if it was written from one of the documents that the exam names for it, and has
    one of its accepted answers. So the number is too high where a document has the same answer to another question.

    Args:
        exam: rows of the report's `exam`, with `kind`, `documents` and `accepted`.

    Returns:
        None for a question that is not on one fact, or that names no documents. None for all if no training question names its
        document, as in a user's own dataset.
    """
    asked: dict[tuple[str, str], set[str]] = defaultdict(set)
    for row in rows:
        if row.document and row.origin != REPLAY and not row.origin.startswith(TWO_HOP):
            key = (PurePath(row.document).name, normalised(row.completion[0].content))
            asked[key].add(normalised(row.prompt[-1].content))
    counts: list[int | None] = []
    for question in exam:
        documents = {PurePath(name).name for name in question["documents"]}
        answers = {normalised(answer) for answer in question["accepted"]}
        known = {wording for name in documents for answer in answers for wording in asked.get((name, answer), ())}
        counts.append(len(known) if asked and question["kind"] == "single" and documents else None)
    return counts
