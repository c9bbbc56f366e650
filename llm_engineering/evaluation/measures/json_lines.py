"""Reads JSON lines that a user wrote by hand, and says what is wrong with each line."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from llm_engineering.errors import RequestError

RowT = TypeVar("RowT", bound=BaseModel)
# Problems that a message lists; further ones are counted.
_SHOWN = 5


def read_json_lines(
    path: str | Path, key: str, row_class: type[RowT], expected: tuple[str, str] | None = None
) -> list[tuple[int, RowT]]:
    """The rows of a JSONL file with the numbers of their lines, without its empty lines.

    Args:
        key: the recipe's key that names the file, for messages.
        expected: what a line holds, and the keys that it needs, for the message about a file without lines; None allows it.

    Raises:
        RequestError: the file is missing, unreadable or empty, or some of its lines are wrong. The message names them.
    """
    file = Path(path).expanduser()
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise RequestError(f"{key} {path}: there is no such file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{key} {path} cannot be read: {error}.") from error
    rows, wrong = [], []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                rows.append((number, row_class.model_validate_json(line)))
            except ValidationError as error:
                wrong += [f"{path}, line {number}: {_explain(problem, row_class)}." for problem in error.errors()]
    refuse(wrong)
    if expected is not None and not rows:
        raise RequestError(f"{key} {path} holds no {expected[0]}. Write one JSON object per line, with {expected[1]}.")
    return rows


def refuse(wrong: list[str]) -> None:
    """Raise a `RequestError` with the first problems, if there are any."""
    if wrong:
        more = f"\n{len(wrong) - _SHOWN} more problems." if len(wrong) > _SHOWN else ""
        raise RequestError("\n".join(wrong[:_SHOWN]) + more)


def _explain(problem: Any, row_class: type[BaseModel]) -> str:
    """One problem that pydantic found, as a sentence without a full stop."""
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"unknown key `{key}`; the known keys are {', '.join(row_class.model_fields)}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{f'`{key}`: ' if key else ''}{message[0].lower()}{message[1:]}"
