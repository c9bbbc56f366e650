"""Reads records from JSON and JSONL files; a broken line is quarantined, never fatal and never silent."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from llm_engineering.data.quarantine import Quarantined
from llm_engineering.errors import RequestError


class Record(NamedTuple):
    """One record of a file and its place there."""

    value: dict[str, Any]
    place: str


def read_records(path: Path, stage: str) -> tuple[list[Record], list[Quarantined]]:
    """Read the records of a `.json` or `.jsonl` file.

    A `.json` file holds a list of objects, or an object with exactly one list of objects in it.

    Raises:
        RequestError: the file is missing, unreadable, empty or in no known format.
    """
    suffix = path.suffix.lower()
    if suffix not in (".json", ".jsonl"):
        raise RequestError(
            f"{path} is in no known format ({suffix or 'no ending'}): datasets are .json or .jsonl files."
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise RequestError(
            f"There is no file {path}. Check the path; it is relative to the folder you run in."
        ) from None
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 text (byte {error.start}): convert it, e.g. with iconv.") from error
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}.") from error
    if not text.strip():
        raise RequestError(f"{path} is empty: there is no row in it.")
    values = list(_lines(text) if suffix == ".jsonl" else _items(path, text))
    records: list[Record] = []
    quarantine: list[Quarantined] = []
    for place, value, problem in values:
        if isinstance(value, dict):
            records.append(Record(value, place))
        else:
            detail = problem or f"expected an object, found {type(value).__name__}"
            raw = value if isinstance(value, str) else json.dumps(value)
            quarantine.append(
                Quarantined(
                    stage=stage, reason="malformed", source=str(path), place=place, detail=detail, text=raw[:200]
                )
            )
    return records, quarantine


def _lines(text: str) -> Iterator[tuple[str, Any, str]]:
    # Only "\n" ends a line of JSONL: str.splitlines would also cut at U+2028 inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield f"line {number}", json.loads(line), ""
        except (json.JSONDecodeError, RecursionError) as error:
            yield f"line {number}", line, str(error)


def _items(path: Path, text: str) -> Iterator[tuple[str, Any, str]]:
    try:
        data = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        hint = " If each line is one object, name the file .jsonl." if "Extra data" in str(error) else ""
        raise RequestError(f"{path} is not valid JSON: {error}.{hint}") from error
    prefix = ""
    if isinstance(data, dict):
        lists = {key: value for key, value in data.items() if isinstance(value, list) and value}
        if len(lists) != 1:
            found = ", ".join(f"`{key}`" for key in lists) or "none"
            raise RequestError(
                f"{path} holds an object with {len(lists)} lists ({found}): expected a list of rows, "
                "or an object with exactly one."
            )
        prefix, data = next(iter(lists.items()))
    if not isinstance(data, list):
        raise RequestError(f"{path} holds a single {type(data).__name__}: expected a list of rows.")
    if not data:
        raise RequestError(f"{path} is empty: there is no row in it.")
    for number, value in enumerate(data):
        yield f"{prefix}[{number}]", value, ""
