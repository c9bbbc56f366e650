"""Text of HTML pages: paragraphs, headings, items of lists, and rows of tables."""

from __future__ import annotations

from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path

from bs4 import BeautifulSoup
from bs4.dammit import EncodingDetector
from bs4.element import NavigableString, PreformattedString, Tag

from llm_engineering.data.reading.files import text_encoding
from llm_engineering.data.rows import Quarantined
from llm_engineering.documents.document import Document, TextBuilder, heading, one_line, table_text

_HEADINGS = ("h1", "h2", "h3", "h4", "h5", "h6")
_NO_TEXT = ("script", "style", "nav", "header", "footer", "noscript", "template", "title", "svg")
# A header or footer in one of these belongs to it, and not to the page.
_SECTIONS = ("article", "section", "main", "blockquote")
_BLOCKS = frozenset([
    "address", "article", "aside", "blockquote", "body", "caption", "center", "dd", "details", "div", "dl", "dt",
    "fieldset", "figcaption", "figure", "footer", "form", "header", "hr", "html", "legend", "li", "main", "ol", "p", "section", "summary",
    "table", "tbody", "td", "tfoot", "th", "thead", "tr", "ul",
])  # fmt: skip
# In a table with such elements, the cells are places on the page.
_LAYOUT = ("table", "ul", "ol", "pre", *_HEADINGS)
# What `_pieces` yields where a block starts or ends. An item of a list starts with its mark.
_BORDER, _ITEM = "", "- "
# A cell cannot cover more columns or rows than this. HTML has the same limit for columns.
_MAX_SPAN = 1000


def read_html(file: Path, _field: str | None) -> tuple[list[Document], list[Quarantined]]:
    """Read a page.

    Raises:
        UnicodeDecodeError: the file is not in the encoding that it declares, or declares none and is not UTF-8.
        LookupError: no encoding has the declared name.
    """
    soup = BeautifulSoup(_decoded(file.read_bytes()), "html.parser")
    title = one_line(soup.title.get_text()) if soup.title else ""
    builder = TextBuilder()
    add_html(soup, builder)
    return [builder.document(str(file), title or file.stem)], []


def _decoded(page: bytes) -> str:
    """The text of a page, by its byte order mark or else by the encoding that it declares."""
    encoding = text_encoding(page[:4])
    has_mark = page.startswith(BOM_UTF8) or encoding != "utf-8-sig"
    declared = None if has_mark else EncodingDetector.find_declared_encoding(page, is_html=True)
    # Browsers read these two names as Windows' Latin alphabet, and writers mean it.
    latin = declared in ("iso-8859-1", "us-ascii")
    return page.decode("cp1252" if latin else declared or encoding).removeprefix("\ufeff")


def add_html(soup: BeautifulSoup, builder: TextBuilder) -> None:
    """Add the text of a page, without scripts, styles, navigation, and the page's header and footer.

    These are removed from the soup. The header of an article has its title, so it stays.
    """
    for element in soup(_NO_TEXT):
        if element.name not in ("header", "footer") or not element.find_parent(_SECTIONS):
            element.decompose()
    for block in _blocks(soup):
        builder.add(block)


def _blocks(root: Tag) -> Iterator[str]:
    """The paragraphs, headings, items and tables below an element."""
    mark = text = ""
    for piece in [*_pieces(root), _BORDER]:
        if isinstance(piece, NavigableString):
            text += piece
            continue
        if text := one_line(text):
            yield mark + text
            mark = text = ""
        if isinstance(piece, Tag):
            yield from _block(piece)
        else:
            mark = piece or mark


def _pieces(root: Tag) -> Iterator[NavigableString | Tag | str]:
    """Text, the elements that are read as a whole, and at each border of a block a string, which may be the mark of an item."""
    for child in root.children:
        if isinstance(child, NavigableString):
            # Comments and declarations are no text.
            if not isinstance(child, PreformattedString):
                yield child
        elif isinstance(child, Tag):
            if child.name in _HEADINGS or child.name == "pre" or (child.name == "table" and not child.find(_LAYOUT)):
                yield child
            elif child.name == "br":
                yield NavigableString("\n")
            elif child.name in _BLOCKS:
                yield _ITEM if child.name == "li" and child.get_text(strip=True) else _BORDER
                yield from _pieces(child)
                yield _BORDER
            else:
                yield from _pieces(child)


def _block(element: Tag) -> Iterator[str]:
    if element.name == "pre":
        yield f"```\n{element.get_text().strip(chr(10))}\n```"
    elif element.name == "table":
        if caption := element.find("caption"):
            yield one_line(caption.get_text())
        yield table_text(_grid(element), _has_header(element))
    else:
        yield heading(element.get_text(), int(element.name[1]))


def _has_header(table: Tag) -> bool | None:
    """Whether the first row consists of header cells; None if the table has no header cells."""
    first = table.find("tr")
    cells = first.find_all(["th", "td"]) if first else []
    return True if cells and (all(cell.name == "th" for cell in cells) or table.find("thead")) else None


def _grid(table: Tag) -> list[list[str]]:
    """The cells of each row. A cell that covers several columns or rows is repeated in each."""
    rows: list[list[str]] = []
    # For each column, the cell that an earlier row put there, and how many more rows it covers.
    covered: dict[int, tuple[str, int]] = {}
    for element in table.find_all("tr"):
        row: list[str] = []
        following: dict[int, tuple[str, int]] = {}
        for cell in element.find_all(["th", "td"]):
            _fill(row, covered)
            text = one_line(cell.get_text(" "))
            for _ in range(_span(cell, "colspan")):
                if (more := _span(cell, "rowspan") - 1) > 0:
                    following[len(row)] = (text, more)
                row.append(text)
        _fill(row, covered)
        covered |= following
        rows.append(row)
    return rows


def _fill(row: list[str], covered: dict[int, tuple[str, int]]) -> None:
    """Repeat the cells of earlier rows that cover the next columns of this row."""
    while len(row) in covered:
        text, more = covered.pop(len(row))
        if more > 1:
            covered[len(row)] = (text, more - 1)
        row.append(text)


def _span(cell: Tag, name: str) -> int:
    value = str(cell.get(name, "1"))
    return min(max(int(value), 1), _MAX_SPAN) if value.isascii() and value.isdigit() else 1
