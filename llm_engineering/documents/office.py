"""Reads Word and PowerPoint files: paragraphs, headings, items of lists, tables, and the notes of slides."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docx
import pptx
from docx.table import Table
from docx.text.paragraph import Paragraph
from pptx.enum.shapes import PP_PLACEHOLDER

from llm_engineering.data.rows import Quarantined
from llm_engineering.documents.document import Document, TextBuilder, heading, one_line, table_text
from llm_engineering.documents.zipped import open_zip

_W = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"
_FALLBACK = "{http://schemas.openxmlformats.org/markup-compatibility/2006}Fallback"
_HEADING_STYLE = re.compile(r"heading (\d)", re.IGNORECASE)
_CONTENTS_STYLE = re.compile(r"toc (\d|heading)", re.IGNORECASE)
# Text that tracked changes removed or moved away, text boxes, which are paragraphs of their own, and a second version of
# those for old programs.
_NOT_IN_PARAGRAPH = (f"{_W}del", f"{_W}moveFrom", f"{_W}txbxContent", _FALLBACK)
# Placeholders that repeat on every slide.
_REPEATED = (PP_PLACEHOLDER.DATE, PP_PLACEHOLDER.FOOTER, PP_PLACEHOLDER.HEADER, PP_PLACEHOLDER.SLIDE_NUMBER)
_TITLES = (PP_PLACEHOLDER.TITLE, PP_PLACEHOLDER.CENTER_TITLE, PP_PLACEHOLDER.VERTICAL_TITLE)


def read_docx(file: Path, _field: str | None) -> tuple[list[Document], list[Quarantined]]:
    """Read the body of a Word file, without page headers and footers, its table of contents, footnotes and comments.

    Its parts are its sections: the paragraphs below a heading.

    Raises:
        UnreadableError: the file is no Word file, has a password, or is too large when unpacked.
    """
    open_zip(file, "DOCX").close()
    document = docx.Document(str(file))
    builder = TextBuilder()
    title = ""
    for block in _word_blocks(document.element.body, document):
        if isinstance(block, Table):
            builder.add(table_text(_word_rows(block), _has_word_header(block)))
            continue
        text, style = _word_text(block._p), block.style.name or "" if block.style else ""
        level = _heading_level(block)
        if _CONTENTS_STYLE.match(style) or not text.strip():
            continue
        if style.casefold() == "title" and not title:
            title = one_line(text)
        elif level:
            builder.start_part(f"section {one_line(text)}")
            builder.add(heading(text, level))
        else:
            builder.add(f"- {one_line(text)}" if _is_item(block, style) else text.strip())
    return [builder.document(str(file), title or file.stem)], []


def _word_blocks(element: Any, document: Any) -> Iterator[Paragraph | Table]:
    """Paragraphs and tables in their order, also those in content controls, tracked insertions and text boxes."""
    for child in element:
        if child.tag == f"{_W}p":
            yield Paragraph(child, document._body)
            for box in child.iter(f"{_W}txbxContent"):
                if not any(True for _ in box.iterancestors(_FALLBACK)):
                    yield from _word_blocks(box, document)
        elif child.tag == f"{_W}tbl":
            yield Table(child, document._body)
        elif child.tag in (f"{_W}sdt", f"{_W}sdtContent", f"{_W}ins", f"{_W}customXml"):
            yield from _word_blocks(child, document)


def _word_text(element: Any) -> str:
    """The text of a paragraph as it reads with all tracked changes accepted."""
    pieces: list[str] = []
    for child in element:
        if child.tag in _NOT_IN_PARAGRAPH:
            continue
        if child.tag == f"{_W}t":
            pieces.append(child.text or "")
        elif child.tag in (f"{_W}br", f"{_W}cr"):
            pieces.append("\n")
        elif child.tag == f"{_W}tab":
            pieces.append("\t")
        elif child.tag == f"{_W}noBreakHyphen":
            pieces.append("-")
        elif child.tag != f"{_W}pPr":
            pieces.append(_word_text(child))
    return "".join(pieces)


def _heading_level(paragraph: Paragraph) -> int:
    """1 to 9 for a heading, also in a style that is based on one; 0 for other paragraphs."""
    style: Any = paragraph.style
    while style is not None:
        if found := _HEADING_STYLE.match(style.name or ""):
            return int(found[1])
        style = style.base_style
    return 0


def _is_item(paragraph: Paragraph, style: str) -> bool:
    # The number 0 takes a paragraph out of the list of its style.
    number = paragraph._p.find(f"{_W}pPr/{_W}numPr/{_W}numId")
    return style.startswith("List") if number is None else number.get(f"{_W}val") != "0"


def _word_rows(table: Table) -> list[list[str]]:
    """The cells of each row. A cell that covers several columns or rows is repeated in each."""
    return [[_cell_text(cell) for cell in row.cells] for row in table.rows]


def _cell_text(cell: Any) -> str:
    pieces = [
        table_text(_word_rows(block)) if isinstance(block, Table) else _word_text(block._p)
        for block in cell.iter_inner_content()
    ]
    return " ".join(pieces)


def _has_word_header(table: Table) -> bool | None:
    """Whether the first row is marked as a header, or alone is in bold; None if neither is so."""
    if not table.rows:
        return None
    rows = [list(row.iter(f"{_W}r")) for row in table._tbl.tr_lst]
    is_bold = [bool(runs) and all(_is_bold(run) for run in runs if _word_text(run).strip()) for runs in rows]
    is_marked = table._tbl.tr_lst[0].find(f"{_W}trPr/{_W}tblHeader") is not None
    return True if is_marked or (is_bold[0] and not all(is_bold)) else None


def _is_bold(run: Any) -> bool:
    bold = run.find(f"{_W}rPr/{_W}b")
    return bold is not None and bold.get(f"{_W}val") not in ("0", "false")


def read_pptx(file: Path, _field: str | None) -> tuple[list[Document], list[Quarantined]]:
    """Read the slides of a PowerPoint file: title, texts, tables, and notes. Hidden slides are read too.

    Raises:
        UnreadableError: the file is no PowerPoint file, has a password, or is too large when unpacked.
    """
    open_zip(file, "PPTX").close()
    deck = pptx.Presentation(str(file))
    builder = TextBuilder()
    titles: list[str] = []
    for number, slide in enumerate(deck.slides, start=1):
        builder.start_part(f"slide {number}")
        title = slide.shapes.title
        titles.append(one_line(title.text_frame.text) if title is not None else "")
        builder.add(heading(titles[-1], 2))
        for shape in slide.shapes:
            for block in _shape_blocks(shape):
                builder.add(block)
        if slide.has_notes_slide and (notes := slide.notes_slide.notes_text_frame) is not None:
            builder.add("\n\n".join(paragraph.text for paragraph in notes.paragraphs))
    # The first slide has the title of the whole.
    return [builder.document(str(file), next(filter(None, titles[:1]), file.stem))], []


def _shape_blocks(shape: Any) -> Iterator[str]:
    """The paragraphs and tables of a shape, and of the shapes in a group. The title is left out."""
    if shape.is_placeholder and shape.placeholder_format.type in (*_TITLES, *_REPEATED):
        return
    if hasattr(shape, "shapes"):
        for inner in shape.shapes:
            yield from _shape_blocks(inner)
    elif getattr(shape, "has_table", False):
        yield table_text(list(_slide_rows(shape.table)), shape.table.first_row or None)
    elif shape.has_text_frame:
        # An outline of a slide is a list; a text box with one paragraph is not.
        texts = [one_line(paragraph.text) for paragraph in shape.text_frame.paragraphs if paragraph.text.strip()]
        yield "\n".join(f"- {text}" for text in texts) if len(texts) > 1 else "".join(texts)


def _slide_rows(table: Any) -> Iterator[list[str]]:
    """The cells of each row. A cell that covers several columns or rows is repeated in each."""
    texts: dict[tuple[int, int], str] = {}
    for i, row in enumerate(table.rows):
        for j, cell in enumerate(row.cells):
            if cell.is_merge_origin:
                covered = [(i + y, j + x) for y in range(cell.span_height) for x in range(cell.span_width)]
                texts |= dict.fromkeys(covered, cell.text_frame.text)
            texts.setdefault((i, j), cell.text_frame.text)
        yield [texts[i, j] for j in range(len(row.cells))]
