"""Reads the rows of Parquet and Arrow files in batches, so that a file may be larger than memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

BATCH_ROWS = 1000
_ARROW_FILE_MAGIC = b"ARROW1"


def parquet_rows(path: Path) -> Iterator[tuple[str, Any, str, str]]:
    """The place, value, and the reason and detail of the problem (empty where there is none) of every row.

    Raises:
        pyarrow.ArrowException, OSError: the file is damaged, or is no Parquet file.
    """
    with path.open("rb") as file:
        source = pq.ParquetFile(file, pre_buffer=False)
        _check_names(source.schema_arrow)
        yield from _rows(source.iter_batches(BATCH_ROWS))


def arrow_rows(path: Path) -> Iterator[tuple[str, Any, str, str]]:
    """The same for an Arrow file, in either of its two forms; `datasets` writes the streaming one.

    Raises:
        pyarrow.ArrowException, OSError: the file is damaged, or is no Arrow file.
    """
    with path.open("rb") as file:
        start = file.read(len(_ARROW_FILE_MAGIC))
        file.seek(0)
        if start == _ARROW_FILE_MAGIC:
            table = pa.ipc.open_file(file)
            batches = (table.get_batch(number) for number in range(table.num_record_batches))
        else:
            table = pa.ipc.open_stream(file)
            batches = iter(table)
        _check_names(table.schema)
        yield from _rows(batches)


def _check_names(schema: pa.Schema) -> None:
    if len(set(schema.names)) < len(schema.names):
        raise pa.ArrowInvalid(f"two columns have the same name ({', '.join(schema.names)})")


def _rows(batches: Iterator[pa.RecordBatch]) -> Iterator[tuple[str, Any, str, str]]:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, BATCH_ROWS):
            part = batch.slice(start, BATCH_ROWS)
            try:
                values = part.to_pylist()
            except (ValueError, OverflowError):
                # One value that Python cannot hold: text that is not UTF-8, a date out of range.
                values = [_one(part.slice(index, 1)) for index in range(part.num_rows)]
            for value in values:
                number += 1
                place = f"row {number}"
                if isinstance(value, UnicodeDecodeError):
                    yield place, "", "not_utf8", str(value)
                elif isinstance(value, Exception):
                    yield place, "", "malformed", str(value)
                else:
                    yield place, value, "", ""


def _one(row: pa.RecordBatch) -> dict[str, Any] | ValueError | OverflowError:
    try:
        values: list[dict[str, Any]] = row.to_pylist()
    except (ValueError, OverflowError) as error:
        return error
    return values[0]
