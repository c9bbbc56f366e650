"""Reads and writes rows as Arrow stream files in batches, so that memory does not grow with the number of rows."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
from datasets import Dataset, Features, List, Value

from llm_engineering.data.rows import Row

BATCH_ROWS = 1000
_TEXT = Value("string")
_MESSAGES = List({"role": _TEXT, "content": _TEXT, "reasoning_content": _TEXT, "weight": Value("int32")})
_ORIGIN = dict.fromkeys(("id", "source", "origin", "document"), _TEXT)
# The columns of a dataset, by the kind of its rows.
FEATURES: dict[str, Features] = {
    "text": Features({**_ORIGIN, "text": Value("string")}),
    "instruction": Features({**_ORIGIN, "prompt": _MESSAGES, "completion": _MESSAGES}),
    "preference": Features({**_ORIGIN, "prompt": _MESSAGES, "chosen": _MESSAGES, "rejected": _MESSAGES}),
    "prompt": Features({**_ORIGIN, "prompt": _MESSAGES, "answers": List(_TEXT)}),
    "labelled": Features({**_ORIGIN, "prompt": _MESSAGES, "completion": _MESSAGES, "label": Value("bool")}),
}


def work_folder() -> Path:
    """Make a temporary folder that is removed when the process ends. `TMPDIR` chooses its place."""
    folder = Path(tempfile.mkdtemp(prefix="llm-engineering-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


class TableWriter:
    """Writes records to one Arrow stream file.

    Args:
        path: the file; an existing file is overwritten.
        features: the columns; a record must have all of them.
    """

    def __init__(self, path: Path, features: Features) -> None:
        self.path = path
        self.features = features
        self.rows = 0
        self._schema = features.arrow_schema
        self._buffer: list[dict[str, Any]] = []
        self._file = pa.OSFile(str(path), "wb")
        self._stream = pa.ipc.new_stream(self._file, self._schema)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, record: dict[str, Any]) -> None:
        """Add one record."""
        self._buffer.append(record)
        self.rows += 1
        if len(self._buffer) >= BATCH_ROWS:
            self._flush()

    def write_batch(self, batch: pa.RecordBatch) -> None:
        """Add a batch of records in Arrow format."""
        self._flush()
        self._stream.write_batch(batch)
        self.rows += batch.num_rows

    def close(self) -> None:
        """Write the buffered records and close the file. A second call does nothing."""
        if not self._file.closed:
            self._flush()
            self._stream.close()
            self._file.close()

    def dataset(self) -> Dataset:
        """Close the file and open it as a memory-mapped dataset."""
        self.close()
        if self.rows == 0:
            # The library datasets cannot map a file without a batch.
            return Dataset.from_dict({name: [] for name in self.features}, features=self.features)
        return Dataset.from_file(str(self.path))

    def _flush(self) -> None:
        if self._buffer:
            self._stream.write_batch(pa.RecordBatch.from_pylist(self._buffer, schema=self._schema))
            self._buffer = []


def stream_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """Read the record batches of an Arrow stream file one after the other, without memory-mapping it."""
    with pa.OSFile(str(path), "rb") as file, pa.ipc.open_stream(file) as stream:
        yield from stream


def dataset_batches(dataset: Dataset) -> Iterator[pa.RecordBatch]:
    """The rows of a dataset in record batches of at most `BATCH_ROWS`.

    A dataset that shows all rows and columns of its files is read from the files: memory-mapped pages stay resident and count as
    memory of the process.
    """
    files = [Path(file["filename"]) for file in dataset.cache_files]
    batches = (batch for file in files for batch in stream_batches(file))
    rows = sum(batch.num_rows for batch in batches if batch.schema.names == dataset.column_names)
    if files and dataset._indices is None and rows == dataset.num_rows:
        tables = (batch for file in files for batch in stream_batches(file))
    else:
        tables = (batch for part in dataset.with_format("arrow").iter(BATCH_ROWS) for batch in part.to_batches())
    for table in tables:
        for start in range(0, table.num_rows, BATCH_ROWS):
            yield table.slice(start, BATCH_ROWS)


def stream_records(dataset: Dataset) -> Iterator[dict[str, Any]]:
    """The rows of a dataset as dictionaries, in order; memory holds one batch at a time."""
    for batch in dataset_batches(dataset):
        yield from batch.to_pylist()


def to_dataset(records: Sequence[dict[str, Any]], features: Features) -> Dataset:
    """Make a dataset of records. Without records it has no rows, but the same columns."""
    # Dataset.from_list loses the columns of an empty list.
    return Dataset.from_dict({name: [record[name] for record in records] for name in features}, features=features)


def rows_dataset(rows: Sequence[Row], kind: str) -> Dataset:
    """Make a dataset of rows of a kind."""
    return to_dataset([row.record() for row in rows], FEATURES[kind])
