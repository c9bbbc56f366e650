"""Writes rows to files of every format that can be read."""

import csv
import gzip
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROWS = [{"instruction": "Add\u2028 1 and 2", "output": '3, "three"\n😀'}, {"instruction": "Grüße", "output": ""}]


def write(path: Path, rows=ROWS) -> Path:
    """Write rows in the format of the file's ending."""
    suffix = path.name.removesuffix(".gz").rpartition(".")[2]
    if suffix in ("parquet", "arrow"):
        table, sink = pa.Table.from_pylist(rows), io.BytesIO()
        if suffix == "parquet":
            pq.write_table(table, sink, row_group_size=1)
        else:
            with pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
        content = sink.getvalue()
    elif suffix == "csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, rows[0])
        writer.writeheader()
        writer.writerows(rows)
        content = text.getvalue().encode()
    elif suffix == "json":
        content = json.dumps(rows).encode()
    else:
        content = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.name.endswith(".gz") else content)
    return path
