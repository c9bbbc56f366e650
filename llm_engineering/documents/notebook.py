"""Reads Jupyter notebooks: the text of Markdown cells, and the code of code cells without its output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llm_engineering.data.rows import Quarantined
from llm_engineering.documents.document import Document, TextBuilder, UnreadableError, heading

# A language without a name in the notebook is Python's, as Jupyter assumes.
_DEFAULT_LANGUAGE = "python"


def read_notebook(file: Path, _field: str | None) -> tuple[list[Document], list[Quarantined]]:
    """Read the cells in their order. Cells are counted from 1, as they stand in the notebook.

    Raises:
        UnreadableError: the file is no notebook.
        UnicodeDecodeError: the file is not UTF-8.
    """
    try:
        notebook = json.loads(file.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise UnreadableError("damaged", f"it is no JSON ({error}): copy or save it again") from error
    builder = TextBuilder()
    language = _DEFAULT_LANGUAGE
    if isinstance(notebook, dict) and isinstance(metadata := notebook.get("metadata"), dict):
        info = metadata.get("language_info")
        language = str(info.get("name", language)) if isinstance(info, dict) else language
    for number, cell in enumerate(_cells(notebook), start=1):
        # Version 3 of the format names the code of a cell `input`.
        text = _text(cell.get("source", cell.get("input", "")))
        builder.start_part(f"cell {number}")
        if cell.get("cell_type") == "code" and text.strip():
            builder.add(f"```{language}\n{text.strip()}\n```")
        elif cell.get("cell_type") == "heading":
            builder.add(heading(text, 2))
        elif cell.get("cell_type") == "markdown":
            builder.add(text.strip())
    return [builder.document(str(file), file.stem)], []


def _cells(notebook: Any) -> list[dict[str, Any]]:
    """The cells of a notebook of version 4, or of version 3, which divides them into worksheets."""
    if isinstance(notebook, dict):
        sheets = notebook["worksheets"] if isinstance(notebook.get("worksheets"), list) else [notebook]
        cells = [sheet.get("cells") if isinstance(sheet, dict) else None for sheet in sheets]
        if all(isinstance(found, list) and all(isinstance(cell, dict) for cell in found) for found in cells):
            return [cell for found in cells for cell in found or ()]
    raise UnreadableError("damaged", "it has no `cells`: it is no Jupyter notebook, or a damaged one")


def _text(source: Any) -> str:
    """The text of a cell, which is stored as one string or as a list of lines."""
    return "".join(map(str, source)) if isinstance(source, list) else str(source)
