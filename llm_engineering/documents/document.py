"""The type `Document`, and what the readers of all formats share to make one: its text, its parts, its tables."""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from llm_engineering.data.reading.files import printable
from llm_engineering.data.rows import Quarantined, is_blank

# Control characters, and the surrogates that cannot be written as UTF-8. Libraries return both from damaged files.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
# A table with fewer columns and no marked header is read as pairs of a name and a value.
_HEADER_COLUMNS = 3


class UnreadableError(Exception):
    """A file, or a part of it, that cannot be read; it is quarantined, and the others are read.

    Attributes:
        reason: the short name that is counted.
        detail: what is wrong, and the remedy.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


class Part(BaseModel):
    """A page, slide, section or cell of a document, e.g. `page 3`. It ends where the next part starts."""

    model_config = ConfigDict(frozen=True)

    start: int
    name: str


class Document(BaseModel):
    """One document.

    Attributes:
        id: hash of the text.
        source: the file, with the place in it if the file holds several documents.
        title: the title in the source; without one, the name of the file.
        text: plain text. Headings are lines that begin with `#` if the format has headings.
        parts: pages, slides, sections or cells in their order; empty if the format has none.
    """

    model_config = ConfigDict(frozen=True)

    id: str
    source: str
    title: str
    text: str
    parts: tuple[Part, ...] = ()

    def part_of(self, start: int, end: int) -> str:
        """The part that holds the characters from `start` to `end`, or `page 3 to page 4`; empty without parts."""
        first = bisect_right(self.parts, start, key=lambda part: part.start) - 1
        last = bisect_left(self.parts, end, key=lambda part: part.start) - 1
        if first < 0:
            return ""
        names = (self.parts[first].name, self.parts[max(first, last)].name)
        return names[0] if names[0] == names[1] else " to ".join(names)


class TextBuilder:
    """Collects the paragraphs of a document and the places where its parts start."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self._pieces: list[str] = []
        self._length = 0
        self._part: str | None = None

    def start_part(self, name: str) -> None:
        """Start a part with the text that is added next. A part without text does not appear."""
        self._part = name

    def add(self, text: str, separator: str = "\n\n") -> None:
        """Add a paragraph, or continue the last one with the separator " " or "". Empty texts are not added."""
        text = _UNPRINTABLE.sub("", text)
        if is_blank(text):
            return
        if self._pieces:
            self._pieces.append(separator)
            self._length += len(separator)
        if self._part is not None:
            self.parts.append(Part(start=self._length, name=self._part))
            self._part = None
        self._pieces.append(text)
        self._length += len(text)

    def document(self, source: str, title: str) -> Document:
        """The document with all text that was added."""
        title = one_line(_UNPRINTABLE.sub("", title))
        return make_document(source, title, "".join(self._pieces), tuple(self.parts))


def make_document(source: str, title: str, text: str, parts: tuple[Part, ...] = ()) -> Document:
    """A document with the id of its text. The name of its file may contain bytes that are not UTF-8."""
    number = hashlib.sha256(text.encode()).hexdigest()[:16]
    return Document(id=number, source=printable(source), title=printable(title), text=text, parts=parts)


def not_read(reason: str, source: Path | str, place: str, detail: str) -> Quarantined:
    """The quarantine record of a file or of a part of it."""
    return Quarantined(
        stage="document", reason=reason, source=printable(str(source)), place=place, detail=printable(detail)
    )


def one_line(text: str) -> str:
    """The text with each run of white space as one space."""
    return " ".join(text.split())


def heading(text: str, level: int) -> str:
    """A heading as a line of Markdown; empty if it has no text."""
    return f"{'#' * min(level, 6)} {one_line(text)}" if text.strip() else ""


def table_text(rows: Sequence[Sequence[str]], has_header: bool | None = None) -> str:
    """A table as one line for each row: `Model: K12; Price: 30 EUR.`

    A table of one column is a frame around text, and a row of two columns without a header is a name and its value.

    Args:
        rows: the cells of each row. A cell that covers several columns or rows is repeated.
        has_header: whether the first row names the columns. With None it does if there are at least three columns and
            the names differ.
    """
    filled = [cells for row in rows if any(cells := [one_line(cell) for cell in row])]
    if not filled:
        return ""
    columns = max(map(len, filled))
    if columns == 1:
        return "\n\n".join(row[0] for row in filled)
    first = filled[0]
    if has_header is None:
        has_header = columns >= _HEADER_COLUMNS and len(set(first)) == len(first) == columns
    if not has_header or len(filled) == 1:
        return "\n".join(_row(row) for row in filled)
    return "\n".join(_named_row(row, first) for row in filled[1:])


def _row(cells: Sequence[str]) -> str:
    used = _distinct(cells)
    return _closed(": ".join([used[0].rstrip(":"), used[1]]) if len(used) == len(cells) == 2 else "; ".join(used))


def _named_row(cells: Sequence[str], names: Sequence[str]) -> str:
    pairs = []
    for index, cell in enumerate(cells):
        name = names[index].rstrip(":") if index < len(names) else ""
        if cell:
            pairs.append(f"{name}: {cell}" if name and name != cell else cell)
    return _closed("; ".join(_distinct(pairs)))


def _distinct(cells: Sequence[str]) -> list[str]:
    """The cells that are not empty and differ from the one before them."""
    return [cell for index, cell in enumerate(cells) if cell and (index == 0 or cell != cells[index - 1])]


def _closed(row: str) -> str:
    """The row with a full stop, so that it is a sentence of its own."""
    return row if row[-1] in ".!?" else f"{row}."
