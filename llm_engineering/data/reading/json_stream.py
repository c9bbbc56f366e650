"""Reads the rows of a JSON file one at a time, so that a file may be larger than memory.

The standard library's decoder reads the values one by one from a window of the text. The streaming library ijson
is as fast (measured), but it silently turns a lone surrogate into `?`, and it refuses a whole file for one NaN, one
number over 64 bits or one byte that is not UTF-8.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple, TextIO

# Characters to read at a time. For a longer value the window doubles until the value fits.
WINDOW = 1 << 20
# If the window cuts off a number or a literal, the decoder's error is at most this many characters before the window's
# end: the longest literal, `-Infinity`, has nine. A string that is cut off is recognised by its message.
_CUT_OFF = 16
# Keys of an object that a message names.
_SHOWN_KEYS = 5
# pandas writes NaN for an empty cell.
DECODER = json.JSONDecoder(parse_constant={"NaN": None, "Infinity": math.inf, "-Infinity": -math.inf}.__getitem__)
_SPACE = re.compile(r"[ \t\r\n]*")
# The parts of a value that decide where it ends: a whole string, a string that is cut off, a bracket.
_BORDER = re.compile(r'"(?:[^"\\]|\\.)*+("?)|[\[{]|[\]}]', re.DOTALL)
_SCALAR = re.compile(r"[^,\]}\s]*")


class JsonError(ValueError):
    """The text is not valid JSON, or not a list of rows. The message is a part of a sentence, without a capital."""


class Unreadable(NamedTuple):
    """Stands for a value of valid JSON that Python cannot read: an integer that is too long, or deep nesting."""

    problem: str


def unreadable(error: ValueError | RecursionError) -> Unreadable:
    """Why Python could not read a value."""
    if isinstance(error, RecursionError):
        return Unreadable("it is nested too deeply")
    if isinstance(error, json.JSONDecodeError):
        return Unreadable(str(error))
    return Unreadable(f"it holds an integer of more than {sys.get_int_max_str_digits()} digits")


def is_json(text: str) -> bool:
    """Whether a text is valid JSON, though Python may be unable to read it."""
    try:
        DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        return not isinstance(error, json.JSONDecodeError)
    return True


class JsonStream:
    """Reads a JSON text from its start to its end, one value at a time.

    Args:
        window: characters to read at a time.
    """

    def __init__(self, stream: TextIO, window: int = WINDOW) -> None:
        self.stream = stream
        self.window = window
        self.text = ""
        self.at = 0
        self.lines = 1

    def peek(self) -> str:
        """The next character that is not white space; empty at the end of the text."""
        while True:
            space = _SPACE.match(self.text, self.at)
            self.at = space.end() if space else self.at
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._more():
                return ""

    def take(self, expected: str) -> str:
        """Consume the next character, which must be one of the expected characters."""
        found = self.peek()
        if not found or found not in expected:
            choices = " or ".join(f"`{character}`" for character in expected)
            raise self._error(f"expected {choices}, found {f'`{found}`' if found else 'the end of the file'}")
        self.at += 1
        return found

    def value(self) -> tuple[Any, str]:
        """Consume the next value. Returns the value, which may be `Unreadable`, and its text."""
        self.peek()
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                unterminated = "Unterminated string" in error.msg or error.pos >= len(self.text)
                if (unterminated or error.pos >= len(self.text) - _CUT_OFF) and self._more():
                    continue
                problem = "the file ends in the middle of a value" if unterminated else error.msg
                raise self._error(problem) from None
            except (ValueError, RecursionError) as error:
                value, end = unreadable(error), self._end_of_value()
            # A number at the end of the window may continue in the next one.
            if end == len(self.text) and self._more():
                continue
            raw = self.text[self.at : end]
            self.at = end
            return value, raw

    def items(self) -> Iterator[tuple[Any, str]]:
        """Consume the list that comes next. Yields each value with its text."""
        self.take("[")
        if self.peek() == "]":
            self.at += 1
            return
        while True:
            yield self.value()
            if self.take(",]") == "]":
                return

    def entries(self) -> Iterator[str]:
        """Consume the object that comes next. Yields each key; the caller must then consume the key's value."""
        self.take("{")
        if self.peek() == "}":
            self.at += 1
            return
        while True:
            if self.peek() != '"':
                raise self._error("expected a key in double quotes")
            key, _ = self.value()
            self.take(":")
            yield key
            if self.take(",}") == "}":
                return

    def end(self) -> None:
        """Check that only white space is left."""
        if self.peek():
            raise self._error("extra data after the first value")

    @property
    def line(self) -> int:
        """The number of the line with the next character."""
        return self.lines + self.text.count("\n", 0, self.at)

    def _end_of_value(self) -> int:
        """Where the next value ends, found by its brackets and quotation marks alone."""
        while (end := self._border()) is None:
            if not self._more():
                raise self._error("the file ends in the middle of a value")
        return end

    def _border(self) -> int | None:
        """Where the next value ends; None if the window cuts it off."""
        if self.text[self.at] not in '[{"':
            scalar = _SCALAR.match(self.text, self.at)
            return scalar.end() if scalar and scalar.end() < len(self.text) else None
        depth = 0
        for border in _BORDER.finditer(self.text, self.at):
            if border[0][0] == '"':
                if not border[1]:
                    return None
            else:
                depth += 1 if border[0] in "[{" else -1
            if not depth:
                return border.end()
        return None

    def _more(self) -> bool:
        self.lines += self.text.count("\n", 0, self.at)
        self.text = self.text[self.at :]
        self.at = 0
        chunk = self.stream.read(max(self.window, len(self.text)))
        self.text += chunk
        return bool(chunk)

    def _error(self, problem: str) -> JsonError:
        return JsonError(f"{problem} (line {self.line})")


def rows_of_values(stream: TextIO) -> Iterator[tuple[str, Any, str]]:
    """The place, value and text of every value of a text that has one value after the other.

    Raises:
        JsonError: the text is not valid JSON.
    """
    json_text = JsonStream(stream)
    while json_text.peek():
        place = f"line {json_text.line}"
        yield place, *json_text.value()


def rows_of_list(stream: TextIO, key: str | None, window: int = WINDOW) -> Iterator[tuple[str, Any, str]]:
    """The place, value and text of every item of a list.

    Args:
        key: the key of the file's object that holds the list; None if the file itself is the list.

    Raises:
        JsonError: the text is not valid JSON.
    """
    json_text = JsonStream(stream, window)
    number = -1
    try:
        if key is None:
            for number, (value, raw) in enumerate(json_text.items()):
                yield f"[{number}]", value, raw
            json_text.end()
            return
        for name in json_text.entries():
            if name != key or json_text.peek() != "[":
                json_text.value()
                continue
            for number, (value, raw) in enumerate(json_text.items()):
                yield f"{key}[{number}]", value, raw
    except JsonError as error:
        place = f"after {key or ''}[{number}]" if number >= 0 else "before the first row"
        raise JsonError(f"{error}, {place}") from None


def list_key(stream: TextIO, window: int = WINDOW) -> str | None:
    """The key whose value is the list of rows, or None if the file itself is the list.

    An object is read to its end, because a second list may follow the first.

    Raises:
        JsonError: the text is neither a list nor an object with exactly one list in it, or it is not valid JSON.
    """
    json_text = JsonStream(stream, window)
    first = json_text.peek()
    if first == "[":
        return None
    if first != "{":
        value, _ = json_text.value()
        raise JsonError(f"it holds a single {type(value).__name__}: expected a list of rows")
    lists, keys = [], []
    for key in json_text.entries():
        keys.append(key)
        if json_text.peek() != "[":
            json_text.value()
        elif sum(1 for _ in json_text.items()):
            lists.append(key)
    json_text.end()
    if len(lists) != 1:
        found = f"{len(lists)} lists ({_named(lists)})" if lists else f"no list under its keys ({_named(keys)})"
        advice = "" if lists else ". If each of its values is a row, write the values as a list"
        raise JsonError(
            f"it holds an object with {found}: expected a list of rows, or an object with exactly one{advice}"
        )
    return lists[0]


def _named(keys: list[str]) -> str:
    shown = ", ".join(f"`{key[:40]}`" for key in keys[:_SHOWN_KEYS])
    return f"{shown} and {len(keys) - _SHOWN_KEYS} more" if len(keys) > _SHOWN_KEYS else shown or "none"
