"""Writes the files of the small company in `examples/company`: the texts as PDF, Word and PowerPoint files, the others as they are.

A source `NAME.pdf.md` has one `#` heading, the title, and `##` headings, each of which starts a page, a section or a slide.
The lines between are paragraphs, items of lists (`- `), and rows of tables (`| `) in Word files.
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import docx
import pptx

COMPANY = Path(__file__).parent.parent / "examples" / "company"
EXAM = COMPANY / "exam.jsonl"

# A page of a PDF, in points of 1/72 inch: A4, with lines that fit into its width at this size of type.
_PAGE = (595, 842)
_MARGIN, _LINE, _SIZE, _HEADING_SIZE, _CHARACTERS = 72, 15, 11, 16, 80
# The layout of PowerPoint's own template with a title and a text, and the one with a title alone.
_TITLE_AND_TEXT, _TITLE_ONLY = 1, 5


class Part(NamedTuple):
    """A page, section or slide: its heading, and its blocks of lines without empty lines."""

    heading: str
    blocks: list[str]


def write_files(folder: Path) -> list[Path]:
    """Write the files of the company to `folder`, and return them in the order of their names."""
    folder.mkdir(parents=True, exist_ok=True)
    for source in sorted((COMPANY / "sources").iterdir()):
        writer = _WRITERS.get(Path(source.stem).suffix)
        if writer is None:
            shutil.copyfile(source, folder / source.name)
        else:
            writer(folder / source.stem, _parts(source.read_text(encoding="utf-8")))
    return sorted(folder.iterdir())


def _parts(text: str) -> list[Part]:
    """The title with the text below it, then each part."""
    parts: list[Part] = []
    for block in text.strip().split("\n\n"):
        if block.startswith("#"):
            parts.append(Part(block.lstrip("# "), []))
        else:
            parts[-1].blocks.append(block)
    return parts


def _write_docx(file: Path, parts: Sequence[Part]) -> None:
    document = docx.Document()
    for level, part in enumerate(parts):
        document.add_heading(part.heading, min(level, 1))
        for block in part.blocks:
            if block.startswith("|"):
                rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
                # The second line separates the names of the columns from the rows.
                del rows[1]
                table = document.add_table(len(rows), len(rows[0]))
                for row, cells in zip(table.rows, rows, strict=True):
                    for cell, text in zip(row.cells, cells, strict=True):
                        cell.text = text
            else:
                document.add_paragraph(block.replace("\n", " "))
    document.save(str(file))


def _write_pptx(file: Path, parts: Sequence[Part]) -> None:
    presentation = pptx.Presentation()
    for part in parts:
        layout = presentation.slide_layouts[_TITLE_AND_TEXT if part.blocks else _TITLE_ONLY]
        slide = presentation.slides.add_slide(layout)
        assert slide.shapes.title is not None
        slide.shapes.title.text = part.heading
        if part.blocks:
            lines = [line.removeprefix("- ") for block in part.blocks for line in block.splitlines()]
            slide.placeholders[1].text_frame.text = "\n".join(lines)
    presentation.save(str(file))


def _write_pdf(file: Path, parts: Sequence[Part]) -> None:
    """Write a PDF with the two fonts that every reader has, and a page for each part."""
    count = len(parts)
    kids = " ".join(f"{6 + 2 * number} 0 R" for number in range(count))
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Count {count} /Kids [{kids}] >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica-Bold /Encoding /WinAnsiEncoding >>",
        f"<< /Title ({_escaped(parts[0].heading)}) >>",
    ]
    for number, part in enumerate(parts):
        content = "\n".join(_operators(part))
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 {_PAGE[0]} {_PAGE[1]}] /Contents {7 + 2 * number} 0 R "
            "/Resources << /Font << /Plain 3 0 R /Bold 4 0 R >> >> >>"
        )
        objects.append(f"<< /Length {len(content)} >>\nstream\n{content}\nendstream")
    text, places = "%PDF-1.4\n", []
    for number, body in enumerate(objects, start=1):
        places.append(len(text))
        text += f"{number} 0 obj\n{body}\nendobj\n"
    entries = "".join(f"{place:010} 00000 n \n" for place in places)
    trailer = f"trailer\n<< /Size {len(objects) + 1} /Root 1 0 R /Info 5 0 R >>\nstartxref\n{len(text)}\n%%EOF\n"
    file.write_bytes(f"{text}xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{entries}{trailer}".encode("cp1252"))


def _operators(part: Part) -> list[str]:
    """What draws a page: its heading in bold, then its paragraphs with an empty line between them."""
    height = _PAGE[1] - _MARGIN
    operators = [_shown(part.heading, "Bold", _HEADING_SIZE, height)]
    height -= _LINE
    for block in part.blocks:
        height -= _LINE
        for line in textwrap.wrap(block.replace("\n", " "), _CHARACTERS):
            operators.append(_shown(line, "Plain", _SIZE, height))
            height -= _LINE
    return operators


def _shown(line: str, font: str, size: int, height: int) -> str:
    return f"BT /{font} {size} Tf {_MARGIN} {height} Td ({_escaped(line)}) Tj ET"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("(", r"\(").replace(")", r"\)")


_WRITERS: dict[str, Callable[[Path, Sequence[Part]], None]] = {
    ".docx": _write_docx,
    ".pdf": _write_pdf,
    ".pptx": _write_pptx,
}
