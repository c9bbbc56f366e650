"""Append-only files of JSON lines. A record is on the disk when `append` returns, so a killed process loses nothing."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from llm_engineering.errors import WorkError

_READ_BYTES = 1 << 16


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Append a record as one line. Several processes may append to the same file.

    A line without an end, which a killed process left, is removed first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # ASCII, because texts may hold lone surrogates, which UTF-8 cannot write.
    line = json.dumps(record).encode("ascii") + b"\n"
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        _cut_torn_line(file)
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a file in the order in which they were appended; none if there is no file.

    A last line without an end is ignored: its process was killed while it wrote, or still writes.

    Raises:
        WorkError: another line is no JSON object.
    """
    if not path.is_file():
        return []
    records: list[dict[str, Any]] = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise WorkError(
                f"Line {number} of {path} is not a JSON object. Repair or remove this line: only whole lines are written there."
            )
        records.append(record)
    return records


def _cut_torn_line(file: BinaryIO) -> None:
    end = place = file.seek(0, os.SEEK_END)
    while place:
        start = max(0, place - _READ_BYTES)
        file.seek(start)
        newline = file.read(place - start).rfind(b"\n")
        if newline >= 0:
            place = start + newline + 1
            break
        place = start
    if place < end:
        file.truncate(place)
