"""Reads documents from rows: JSON, JSON lines, CSV and tables separated by tabs."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_engineering.data.reading.files import BrokenRecord, read_records
from llm_engineering.data.rows import Quarantined
from llm_engineering.documents.document import (
    Document,
    TextBuilder,
    UnreadableError,
    make_document,
    not_read,
    table_text,
)
from llm_engineering.errors import RequestError

logger = logging.getLogger(__name__)

TEXT_FIELDS = ("text", "content", "body", "markdown", "page_content")
# Nested fields that a message names.
_SHOWN_FIELDS = 5
TITLE_FIELDS = ("title", "name", "url", "link", "id")
# The mean length of a column of texts, in characters, if there are other columns. Names, amounts and remarks of a table are shorter
# ("500 ml"), and an article has more than one sentence, of about 80 characters.
_MIN_TEXT_CHARS = 100


def read_rows(file: Path, field: str | None) -> tuple[list[Document], list[Quarantined]]:
    """Read a document from each row, or a CSV file as one table, a part for each line, if it has no column of texts.

    Columns of a CSV file that are not read are named in a warning.

    Raises:
        RequestError: a row has several text fields and `field` names none.
        UnreadableError: the file is damaged.
    """
    documents: list[Document] = []
    quarantine: list[Quarantined] = []
    builder = TextBuilder()
    try:
        records = list(read_records(file))
    except RequestError as error:
        raise UnreadableError("damaged", str(error)) from error
    rows = [record.value for record in records if not isinstance(record, BrokenRecord)]
    is_csv = file.suffix.lower() in (".csv", ".tsv")
    read_fields = (*([field] if field else TEXT_FIELDS), *TITLE_FIELDS)
    others = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in read_fields]
    is_table = is_csv and field is None and not _has_texts(rows, _MIN_TEXT_CHARS if others else 0)
    if is_csv and others and not is_table:
        logger.warning("%s: the texts and titles of its rows are read, and not the columns %s", file, ", ".join(others))
    for record in records:
        if isinstance(record, BrokenRecord):
            quarantine.append(record.quarantined("document"))
        elif is_table:
            builder.start_part(record.place)
            builder.add(table_text([list(record.value), list(record.value.values())], has_header=True), separator="\n")
        else:
            read = _row(file, record.place, record.value, field)
            if isinstance(read, Document):
                documents.append(read)
            else:
                quarantine.append(read)
    table = builder.document(str(file), file.stem)
    if table.text or not records:
        documents.append(table)
    return documents, quarantine


def _has_texts(rows: Sequence[Mapping[str, Any]], min_chars: int) -> bool:
    """Whether a text field has at least so many characters in the mean."""
    columns = ([str(row[name]) for row in rows if name in row] for name in TEXT_FIELDS)
    return any(texts and sum(map(len, texts)) >= min_chars * len(texts) for texts in columns)


def _row(file: Path, place: str, value: Mapping[str, Any], field: str | None) -> Document | Quarantined:
    names = [field] if field else [name for name in TEXT_FIELDS if isinstance(value.get(name), str)]
    if len(names) > 1:
        raise RequestError(
            f"{file}, {place} has several text fields ({', '.join(names)}): choose one with documents.text_field."
        )
    text = _under(value, names[0]) if names else None
    if not isinstance(text, str):
        return not_read("no_text_field", file, place, _no_text(value, field))
    title = next((str(value[name]) for name in TITLE_FIELDS if value.get(name)), f"{file.stem} {place}")
    return make_document(f"{file}:{place}", title, text)


def _under(value: Mapping[str, Any], field: str) -> Any:
    """The value of a key, or of the keys of a path such as `content.body`; None if there is none."""
    if field in value:
        return value[field]
    first, dot, rest = field.partition(".")
    inner = value.get(first)
    return _under(inner, rest) if dot and isinstance(inner, Mapping) else None


def _no_text(value: Mapping[str, Any], field: str | None) -> str:
    nested = [
        f"{name}.{key}"
        for name, inner in value.items()
        if isinstance(inner, Mapping)
        for key, text in inner.items()
        if isinstance(text, str)
    ]
    detail = f"no text under {field or ' or '.join(TEXT_FIELDS)}; it has {', '.join(map(str, value)) or 'no key'}"
    if nested:
        detail += f". Its texts are in objects: set documents.text_field to {' or '.join(nested[:_SHOWN_FIELDS])}"
    return detail
