"""Reads PDF files: joins the lines of the pages to paragraphs, finds headings, and removes what repeats on each page.

A PDF has no paragraphs, only pieces of text with a place and a font. The rules here use line spacing, sizes and fonts.
"""

from __future__ import annotations

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from pypdf import PageObject, PdfReader
from pypdf.errors import PyPdfError

from llm_engineering.data.rows import Quarantined
from llm_engineering.documents.document import (
    Document,
    TextBuilder,
    UnreadableError,
    heading,
    not_read,
    one_line,
    table_text,
)

# pypdf warns about each flaw that it repairs, and some files have thousands.
logging.getLogger("pypdf").setLevel(logging.ERROR)

# Names of files and programs, which many programs write as the title.
_NO_TITLE = re.compile(r"\.\w{2,4}$|^(microsoft|untitled|powerpoint|document\d*$|slide \d)", re.IGNORECASE)
_BULLET = re.compile(r"[•◦▪■●○‣∙·–—*\x7f\uf0a7\uf0b7-]")
_NUMBER = re.compile(r"\(?(?:\d{1,3}|[a-z])[.)]")
_ITEM = re.compile(rf"(?:{_BULLET.pattern}|{_NUMBER.pattern})\s+(?=\S)")
_SENTENCE_END = re.compile(r"[.!?:…][\"'”’»)\]]*$")
_LIGATURES = str.maketrans({"ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl", "ﬃ": "ffi", "ﬄ": "ffl", "ﬅ": "st", "ﬆ": "st"})
# `Page 3 of 12`, or `- 3 -`: a page number even in a file of one page.
_PAGE_NUMBER = re.compile(
    r"(?:(?:page|seite|p\.)\s*)?[-–|\[]?\s*\d{1,4}\s*[-–|\]]?(?:\s*(?:/|of|von)\s*\d{1,4})?", re.I
)
# A number alone is a page number only if it fits the page: it may be the last price of a table.
_BARE_NUMBER = re.compile(r"[-–]?\s*(\d{1,4})(?:\s*/\s*\d{1,4})?")
# Lines at the top and at the bottom of a page that may be a running header or footer.
_EDGE_LINES = 3
# A running line is on at least this many pages, and on this share of them: those of left and right pages may differ.
_MIN_PAGES, _MIN_SHARE = 3, 0.3
# In units of the usual distance of two lines: a larger one separates paragraphs.
_PARAGRAPH_GAP = 1.25
# In units of the size of the most text: a larger size is that of a heading.
_HEADING_SIZE = 1.15
_MAX_HEADING_CHARS = 120
# In units of the size of the font: the usual width of a character, and the smallest distance of the columns of a table.
_CHARACTER_WIDTH, _COLUMN_GAP = 0.5, 2.0
# In units of the length of full lines: a shorter line that ends a sentence ends its paragraph.
_SHORT_LINE = 0.8

# What is the same in a running line on all its pages: height, text, and the difference of its number to the page's.
_RunningKey = tuple[int, str, int | None]


@dataclass
class _Line:
    """A line of a page.

    Attributes:
        cells: the pieces that stand apart on the line. Usually there is one.
        x, y: where it starts, in points from the lower left corner.
        size: the size of its font in points.
    """

    page: int
    cells: list[str]
    x: float
    y: float
    size: float
    is_bold: bool

    @property
    def text(self) -> str:
        return " ".join(self.cells)


def read_pdf(file: Path, _field: str | None) -> tuple[list[Document], list[Quarantined]]:
    """Read the pages of a PDF, which are its parts.

    Scanned pages, and pages that cannot be read, are quarantined.

    Raises:
        UnreadableError: the file is damaged, has a password, or has no page with text.
        OSError: the system refuses to read the file.
    """
    quarantine: list[Quarantined] = []
    lines: list[list[_Line]] = []
    scanned: list[int] = []
    with file.open("rb") as stream:
        reader = _open(stream)
        title = one_line((reader.metadata.title if reader.metadata else "") or "")
        for number, page in enumerate(reader.pages, start=1):
            try:
                lines.append(_lines(page, number))
                if not lines[-1] and _has_image(page):
                    scanned.append(number)
            except Exception as error:
                # pypdf raises whatever a flaw of a page leads to.
                quarantine.append(not_read("damaged", file, f"page {number}", f"{type(error).__name__}: {error}"))
    if not any(lines):
        if scanned:
            raise UnreadableError(
                "scanned", "its pages are images without text: recognise the text first, e.g. with ocrmypdf"
            )
        raise UnreadableError("empty", f"none of its {len(lines)} pages has text")
    quarantine += [
        not_read(
            "scanned", file, f"page {number}", "an image without text: recognise the text first, e.g. with ocrmypdf"
        )
        for number in scanned
    ]
    title = "" if _NO_TITLE.search(title) else title
    return [_join(_without_running(lines)).document(str(file), title or file.stem)], quarantine


def _open(stream: Any) -> PdfReader:
    try:
        reader = PdfReader(stream)
        # Many files are encrypted without a password, only to forbid printing or copying.
        is_open = not reader.is_encrypted or bool(reader.decrypt(""))
        # The first page, because pypdf finds some damages only when it looks for the pages.
        if is_open:
            _ = len(reader.pages)
    except (PyPdfError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UnreadableError("damaged", f"it is no PDF, or a broken one ({error}): copy or export it again") from error
    if not is_open:
        raise UnreadableError("encrypted", "it has a password: save it without one, e.g. with qpdf --decrypt")
    return reader


def _has_image(page: PageObject) -> bool:
    resources: Any = page.get("/Resources")
    objects: Any = resources.get_object().get("/XObject") if resources is not None else None
    return any(one.get_object().get("/Subtype") == "/Image" for one in (objects or {}).values())


def _lines(page: PageObject, number: int) -> list[_Line]:
    """The lines of a page in the order in which they are drawn."""
    lines: list[_Line] = []
    # The pieces of the present line: text, x, y, size, bold.
    pieces: list[tuple[str, float, float, float, bool]] = []

    def end_line() -> None:
        text = one_line("".join(piece[0] for piece in pieces)).translate(_LIGATURES)
        if text:
            longest = max(pieces, key=lambda piece: len(piece[0].strip()))
            _, x, y, _, _ = next(piece for piece in pieces if piece[0].strip())
            is_bold = all(bold for piece, _, _, _, bold in pieces if piece.strip())
            _append(lines, _Line(number, [text], x, y, longest[3], is_bold))
        pieces.clear()

    def visit(text: str, cm: list[float], tm: list[float], font: Any, size: float) -> None:
        x = tm[4] * cm[0] + tm[5] * cm[2] + cm[4]
        y = tm[4] * cm[1] + tm[5] * cm[3] + cm[5]
        scale = abs(tm[3] * cm[3]) or 1.0
        is_bold = "bold" in str((font or {}).get("/BaseFont", "")).lower()
        first, *others = text.split("\n")
        if first.strip() and pieces and _is_apart(pieces[-1][0], pieces[-1][1], x, size * scale):
            end_line()
        if first:
            pieces.append((first, x, y, size * scale, is_bold))
        for index, other in enumerate(others, start=1):
            end_line()
            # pypdf gives only the place of the first line.
            pieces.append((other, x, y - index * size * scale, size * scale, is_bold))

    page.extract_text(visitor_text=visit)
    end_line()
    return lines


def _is_apart(text: str, x: float, following_x: float, size: float) -> bool:
    """Whether the distance of two pieces of a line is that of two columns. The width of the first piece is estimated."""
    width = _CHARACTER_WIDTH * size * len(text)
    return following_x - x - width > max(_COLUMN_GAP * size, 0.25 * width)


def _append(lines: list[_Line], line: _Line) -> None:
    """Add a line. One to the right of the last line, at the same height, is a cell of the same row."""
    last = lines[-1] if lines else None
    if last is not None and abs(last.y - line.y) < 0.3 * line.size and line.x > last.x:
        if len(last.cells) == 1 and (_BULLET.fullmatch(last.text) or _NUMBER.fullmatch(last.text)):
            last.cells = [f"{last.text} {line.text}"]
            last.size, last.is_bold = line.size, line.is_bold
        else:
            last.cells.append(line.text)
    else:
        lines.append(line)


def _without_running(pages: Sequence[Sequence[_Line]]) -> list[_Line]:
    """All lines, without running headers and footers and page numbers.

    These are removed from the edges inward: a line of text that happens to repeat stays.
    """
    found: dict[_RunningKey, set[int]] = defaultdict(set)
    for lines in pages:
        for line in {id(line): line for edge in _edges(lines) for line in edge}.values():
            for key in _running_keys(line):
                found[key].add(line.page)
    offsets = Counter(
        offset for lines in pages for offset in {_offset(line) for edge in _edges(lines) for line in edge}
    )
    # The first page of a file may have another number than 1.
    fitting = {0, *(offset for offset, count in offsets.items() if count > max(1, len(pages) / 2))}
    needed = max(_MIN_PAGES, _MIN_SHARE * len(pages))
    kept: list[_Line] = []
    for lines in pages:
        removed: set[int] = set()
        for edge in _edges(lines):
            has_number = False
            for line in edge:
                is_number = len(lines) > 1 and _PAGE_NUMBER.fullmatch(line.text) is not None
                if (offset := _offset(line)) is not None:
                    is_number = is_number and not has_number and offset in fitting
                    has_number = True
                if not is_number and all(len(found[key]) < needed for key in _running_keys(line)):
                    break
                removed.add(id(line))
        kept += [line for line in lines if id(line) not in removed]
    return kept


def _offset(line: _Line) -> int | None:
    """The difference between a line that is a number alone and the number of its page; None for another line."""
    bare = _BARE_NUMBER.fullmatch(line.text)
    return int(bare[1]) - line.page if bare else None


def _edges(lines: Sequence[_Line]) -> tuple[list[_Line], list[_Line]]:
    """The outermost lines at the top and at the bottom of a page, each from the edge inward."""
    by_height = sorted(lines, key=lambda line: -line.y)
    return by_height[:_EDGE_LINES], by_height[::-1][:_EDGE_LINES]


def _running_keys(line: _Line) -> Iterator[_RunningKey]:
    """What a running line has in common on its pages, at its height: the text, the text but for a number that grows with the
    pages, or only such a number at its start or end, because headers often name the chapter.
    """
    height = round(line.y)
    yield height, line.text, None
    for match in re.finditer(r"\d{1,4}", line.text):
        before, after, offset = line.text[: match.start()], line.text[match.end() :], int(match[0]) - line.page
        yield height, f"{before}#{after}", offset
        if not after:
            yield height, "…#", offset
        if not before:
            yield height, "#…", offset


def _join(lines: Sequence[_Line]) -> TextBuilder:
    """Join the lines to paragraphs. A paragraph may go on on the next page."""
    sizes: Counter[float] = Counter()
    for line in lines:
        sizes[round(line.size, 1)] += len(line.text)
    body = sizes.most_common(1)[0][0] if sizes else 1.0
    gaps = Counter(
        round(one.y - other.y, 0)
        for one, other in pairwise(lines)
        if one.page == other.page and 0.8 * body < one.y - other.y < 3 * body
    )
    pitch = gaps.most_common(1)[0][0] if gaps else 1.2 * body
    lengths = sorted(len(line.text) for line in lines)
    full = lengths[int(0.9 * (len(lengths) - 1))] if lengths else 0
    words = Counter(word for line in lines for word in re.findall(r"[\w-]+", line.text))

    builder = TextBuilder()
    page = 0
    index = 0
    while index < len(lines):
        group = _group(lines, index, body, pitch, full)
        first = group[0]
        if first.page != page:
            builder.start_part(f"page {first.page}")
            page = first.page
        if len(first.cells) > 1:
            builder.add(table_text([line.cells for line in group]))
        elif _is_heading(group, body):
            builder.add(heading(" ".join(line.text for line in group), 2))
        else:
            separator = "\n\n"
            for line, following in zip(group, [*group[1:], None], strict=True):
                if line.page != page:
                    builder.start_part(f"page {line.page}")
                    page = line.page
                text = _ITEM.sub("- ", line.text, count=1) if line is first and _BULLET.match(line.text) else line.text
                text, next_separator = _line_end(text, following.text if following else "", words)
                builder.add(text, separator)
                separator = next_separator
        index += len(group)
    return builder


def _group(lines: Sequence[_Line], start: int, body: float, pitch: float, full: int) -> list[_Line]:
    """The lines from `start` that are one heading, table or paragraph."""
    end = start + 1
    while end < len(lines) and not _is_border(lines[end - 1], lines[end], body, pitch, full):
        end += 1
    return list(lines[start:end])


def _is_border(last: _Line, line: _Line, body: float, pitch: float, full: int) -> bool:
    """Whether a line starts a new block."""
    if (len(last.cells) > 1) != (len(line.cells) > 1):
        return True
    if len(line.cells) > 1:
        return last.page != line.page
    if abs(last.size - line.size) > 0.1 * body or _ITEM.match(line.text):
        return True
    gap = last.y - line.y
    is_end = bool(_SENTENCE_END.search(last.text))
    if last.page != line.page or gap <= 0:
        # The next page or column. A heading does not go on there.
        return (
            is_end
            or last.size > _HEADING_SIZE * body
            or not (line.text[0].islower() or len(last.text) >= _SHORT_LINE * full)
        )
    if gap > _PARAGRAPH_GAP * pitch * max(1.0, line.size / body):
        return True
    if last.is_bold != line.is_bold and (_could_be_heading(last) or _could_be_heading(line)):
        return True
    return is_end and (len(last.text) < _SHORT_LINE * full or line.x > last.x + body)


def _could_be_heading(line: _Line) -> bool:
    return line.is_bold and len(line.text) <= _MAX_HEADING_CHARS and not re.search(r"[.,;:!?]$", line.text)


def _is_heading(group: Sequence[_Line], body: float) -> bool:
    length = sum(len(line.text) for line in group)
    if length > _MAX_HEADING_CHARS or not any(character.isalpha() for character in group[0].text):
        return False
    if group[0].size > _HEADING_SIZE * body:
        return not group[-1].text.endswith((".", ","))
    return len(group) == 1 and _could_be_heading(group[0])


def _line_end(text: str, following: str, words: Counter[str]) -> tuple[str, str]:
    """The line without the hyphen that divides its last word, and the separator before the next line.

    The hyphen stays if the file has the word with it elsewhere, and not without it.
    """
    if not (found := re.search(r"([^\W\d_]+)[-\u00ad\u2010]$", text)) or not (rest := re.match(r"[\w-]+", following)):
        return text, " "
    if text[-1] != "\u00ad" and not rest[0][0].islower():
        return text, ""
    joined, hyphened = found[1] + rest[0], f"{found[1]}-{rest[0]}"
    return (text, "") if words[hyphened] and not words[joined] else (text[:-1], "")
