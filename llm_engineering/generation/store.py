"""Stores answers on disk, one JSON line each, by the hash of their request. The file is only appended to."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Self

from llm_engineering.generation.types import Reply

logger = logging.getLogger(__name__)

SYNC_EVERY_S = 1.0
# Name of the file in the output folder.
STORE_FILE = "answers.jsonl"


class AnswerStore:
    """Stores every answer before it is used, so that no answer is lost when the process is killed.

    Each record is written as one whole line by one `write` to a file opened with O_APPEND, so that records of several
    processes do not mix. A written record survives the end of the process at once, and a power cut after `SYNC_EVERY_S`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answers: dict[str, Reply] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes() if path.exists() else b""
        # A killed process may have left an incomplete last line. In this case the next record begins with a line break.
        self._line_open = bool(content) and not content.endswith(b"\n")
        self._file: int | None = None
        self._synced = time.monotonic()
        unread = 0
        for line in content.split(b"\n"):
            if not line:
                continue
            try:
                record = json.loads(line)
                key = record.pop("key")
                self.answers[key] = Reply(record.pop("answer"), **record)
            except (ValueError, KeyError, TypeError, AttributeError):
                unread += 1
        if unread:
            logger.warning("%s has %d incomplete lines: their answers are requested again", path, unread)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add(self, new: Mapping[str, Reply]) -> None:
        """Write answers by their key. When this returns, they are in the file.

        Raises:
            OSError: the disk is full, or the file cannot be opened.
        """
        if self._file is None:
            self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        lines = "".join(json.dumps(_record(key, reply)) + "\n" for key, reply in new.items())
        data = ("\n" if self._line_open else "").encode() + lines.encode()
        self._line_open = True
        written = os.write(self._file, data)
        if written < len(data):
            raise OSError(f"{self.path}: only {written} of {len(data)} bytes could be written. Is the disk full?")
        self._line_open = False
        self.answers |= new
        if time.monotonic() - self._synced >= SYNC_EVERY_S:
            os.fsync(self._file)
            self._synced = time.monotonic()

    def close(self) -> None:
        """Write everything to the disk and close the file; the next `add` opens it again."""
        if self._file is not None:
            os.fsync(self._file)
            os.close(self._file)
            self._file = None


def _record(key: str, reply: Reply) -> dict[str, object]:
    values = asdict(reply)
    record = {"key": key, "answer": values.pop("text")}
    defaults = {"finish": "stop", "input_tokens": 0, "output_tokens": 0}
    return record | {name: value for name, value in values.items() if value != defaults[name]}
