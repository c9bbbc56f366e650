"""Reads the rows of a JSON file one at a time, so that a file may be larger than memory.

The standard library's decoder reads value after value from a window of the text. The streaming library ijson was
measured against it: it is as fast, but turns a lone surrogate into `?` without a word, and refuses the whole file for
one NaN, one number over 64 bits or one byte that is not UTF-8.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

# Characters read at a time; a value longer than this doubles the window until it fits.
WINDOW = 1 << 20
# A value cut off by the window's end is reported at most this far before it: the longest literal is `-Infinity`.
_CUT_OFF = 16
_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\r\n]*")


class JsonError(ValueError):
    """The text is not valid JSON, or not a list of rows; the message is half a sentence."""


class JsonStream:
    """A JSON text, read from the front."""

    def __init__(self, stream: TextIO, window: int = WINDOW) -> None:
        self.stream = stream
        self.window = window
        self.text = ""
        self.at = 0
        self.lines = 1

    def peek(self) -> str:
        """The next character that is no space, or nothing at the end."""
        while True:
            space = _SPACE.match(self.text, self.at)
            self.at = space.end() if space else self.at
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._more():
                return ""

    def take(self, expected: str) -> str:
        """Step over the next character, which must be one of the expected ones."""
        found = self.peek()
        if not found or found not in expected:
            what = " or ".join(f"`{character}`" for character in expected)
            raise self._error(f"expected {what}, found {f'`{found}`' if found else 'the end of the file'}")
        self.at += 1
        return found

    def value(self) -> tuple[Any, str]:
        """The next value, and its text."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                unterminated = "Unterminated string" in error.msg or error.pos >= len(self.text)
                if (unterminated or error.pos >= len(self.text) - _CUT_OFF) and self._more():
                    continue
                problem = "the file ends in the middle of a value" if unterminated else error.msg
                raise self._error(problem) from None
            except (ValueError, RecursionError) as error:
                raise self._error(str(error)) from None
            # A number at the window's end may have more digits behind it.
            if end == len(self.text) and self._more():
                continue
            raw = self.text[self.at : end]
            self.at = end
            return value, raw

    def items(self) -> Iterator[tuple[Any, str]]:
        """The values of the list that comes next, each with its text."""
        self.take("[")
        if self.peek() == "]":
            self.at += 1
            return
        while True:
            yield self.value()
            if self.take(",]") == "]":
                return

    def entries(self) -> Iterator[str]:
        """The keys of the object that comes next; the caller reads each key's value before it asks for the next."""
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
        """Nothing but space may be left."""
        if self.peek():
            raise self._error("extra data behind the first value")

    def _more(self) -> bool:
        self.lines += self.text.count("\n", 0, self.at)
        self.text = self.text[self.at :]
        self.at = 0
        chunk = self.stream.read(max(self.window, len(self.text)))
        self.text += chunk
        return bool(chunk)

    def _error(self, problem: str) -> JsonError:
        return JsonError(f"{problem} (line {self.lines + self.text.count(chr(10), 0, self.at)})")


def rows_of_list(stream: TextIO, key: str | None, window: int = WINDOW) -> Iterator[tuple[str, Any, str]]:
    """The place, value and text of every item of a list: the file's own one, or the one under a key of its object.

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
        for found in json_text.entries():
            if found != key or json_text.peek() != "[":
                json_text.value()
                continue
            for number, (value, raw) in enumerate(json_text.items()):
                yield f"{key}[{number}]", value, raw
    except JsonError as error:
        place = f"after {key or ''}[{number}]" if number >= 0 else "before the first row"
        raise JsonError(f"{error}, {place}") from None


def list_key(stream: TextIO, window: int = WINDOW) -> str | None:
    """The key under which the rows stand, or None where the file is a list itself.

    An object is read to its end: only there it is known that it holds one list and no more.

    Raises:
        JsonError: it is neither a list nor an object with exactly one list in it, or not valid JSON.
    """
    json_text = JsonStream(stream, window)
    first = json_text.peek()
    if first == "[":
        return None
    if first != "{":
        value, _ = json_text.value()
        raise JsonError(f"it holds a single {type(value).__name__}: expected a list of rows")
    lists = []
    for key in json_text.entries():
        if json_text.peek() != "[":
            json_text.value()
        elif sum(1 for _ in json_text.items()):
            lists.append(key)
    json_text.end()
    if len(lists) != 1:
        found = ", ".join(f"`{key}`" for key in lists) or "none"
        raise JsonError(
            f"it holds an object with {len(lists)} lists ({found}): expected a list of rows, "
            "or an object with exactly one"
        )
    return lists[0]
