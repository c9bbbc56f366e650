"""The tokens that training read about the documents."""

from __future__ import annotations

from datasets import Dataset

from llm_engineering.data.rows import REPLAY
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
