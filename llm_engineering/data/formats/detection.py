"""Turns datasets of the known formats into canonical rows, one row at a time.

The columns of a record decide its format. A dataset that fits two formats is refused; the code never guesses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain, islice
from typing import Any, NamedTuple

from llm_engineering.data.formats.conversations import BadRowError, check_read, read_text
from llm_engineering.data.formats.known_formats import (
    INSTRUCTION_FORMATS,
    ORIGINS,
    PREFERENCE_FORMATS,
    PROMPT_FORMATS,
)
from llm_engineering.data.formats.several_answers import as_pairs
from llm_engineering.data.formats.text_templates import text_templates
from llm_engineering.data.formats.thumbs import LABELS, judged, label_of, read_label
from llm_engineering.data.reading.files import BrokenRecord, Record, printable, shown
from llm_engineering.data.reading.sources import open_records
from llm_engineering.data.rows import ROW_CLASSES, Quarantined, Row
from llm_engineering.errors import RequestError
from llm_engineering.recipe.data_blocks import DataConfig

# The format is detected from this many rows at the start.
PEEKED_ROWS = 100
_FORMATS = INSTRUCTION_FORMATS | PREFERENCE_FORMATS | PROMPT_FORMATS
# The formats of each kind. A row with a label is one of instructions and a column `label`.
_OF_KIND = {
    "instruction": INSTRUCTION_FORMATS,
    "preference": PREFERENCE_FORMATS,
    "labelled": INSTRUCTION_FORMATS,
    "prompt": PROMPT_FORMATS,
}
# The columns that data.columns can map, by the kind of the dataset.
_MAPPABLE = {
    kind: frozenset({"input", "system", "history", "document", "origin"}).union(*(f.columns for f in formats.values()))
    for kind, formats in _OF_KIND.items()
}
_MAPPABLE["labelled"] |= {"label"}
_MAPPABLE["prompt"] |= {"answer", "answers"}
# The data report names this many of the columns that no row was made of.
_UNREAD_NAMED = 50


class UnknownFormatError(RequestError):
    """No format has the columns of a dataset, or several have."""


class OpenedDataset(NamedTuple):
    """A dataset whose format is known.

    Attributes:
        kind: `instruction`, `preference`, `labelled` or `prompt`.
        format: the formats of its first rows, e.g. `alpaca`, or `alpaca and messages`.
        rows: a row or a quarantine record for every record of the dataset, read from the file on demand.
        unread: the first _UNREAD_NAMED columns that no format read, among the rows so far.
    """

    kind: str
    format: str
    rows: Iterator[Row | Quarantined]
    unread: list[str]


def open_dataset(reference: str, kind: str | None, config: DataConfig) -> OpenedDataset:
    """Open a dataset and detect its format from its first rows.

    Args:
        reference: a file, a folder, or a hub id; `#name` after it selects one of several splits.
        kind: `instruction`, `preference`, `labelled` or `prompt`; None detects it: rows of instructions are `labelled` if
            one of the first has a label.
        config: `format` requires a format (a format of another kind is ignored: it belongs to the recipe's other
            dataset). `columns` maps standard column names to those of the file.

    Raises:
        RequestError: the dataset is missing, empty or damaged, its format is unknown or ambiguous, or it lacks a mapped
            column. If a file is damaged further inside, `rows` raises the error when it reaches the damage.
    """
    required = config.format if config.format and _is_of(config.format, kind) else None
    columns = _columns_of(config.columns, kind)
    records = open_records(reference)
    unmapped = list(islice(records, PEEKED_ROWS))
    if not unmapped:
        raise RequestError(f"{reference} is empty: there is no row in it.")
    _check_mapped(reference, columns, unmapped)
    peeked = list(chain.from_iterable(_pairs(_renamed(record, columns), kind) for record in unmapped))
    readable = [record for record in peeked if isinstance(record, Record)]
    if not readable:
        problem = next(record for record in peeked if isinstance(record, BrokenRecord)).quarantined("row")
        raise RequestError(f"{reference} holds no row that can be read; the first problem: {problem.describe()}.")
    names = Counter(chain.from_iterable(_detected(reference, record, kind, required) for record in readable))
    if not names:
        raise _unknown(reference, kind, required, readable[0])
    kinds = set(map(_kind, names))
    if len(kinds) > 1:
        raise _ambiguous(reference, sorted(names))
    found = kind or kinds.pop()
    if kind is None and found == "instruction" and any(label_of(record.value) is not None for record in readable):
        found = "labelled"
    if kind == "labelled" and not any(record.value.get(name) is not None for record in readable for name in LABELS):
        raise RequestError(
            f"{reference} has no column `label` in its first rows, which says whether an answer is a good one. Map the column of "
            "another name, e.g. --set data.columns.label=NAME, or name the dataset under data.instructions."
        )
    rest = chain.from_iterable(_pairs(_renamed(record, columns), kind) for record in records)
    unread: list[str] = []
    rows = (_row(record, found, required, unread) for record in chain(peeked, rest))
    shown = " and ".join(name for name, _ in names.most_common()) + (" with labels" if found == "labelled" else "")
    return OpenedDataset(found, shown, rows, unread)


def _columns_of(mapping: dict[str, str], kind: str | None) -> dict[str, str]:
    known = frozenset[str]().union(*_MAPPABLE.values())
    for name in mapping:
        if name not in known:
            raise RequestError(
                f"data.columns maps {name}, which is no standard column: it maps a standard name to the file's own, "
                f"and the standard names are {', '.join(sorted(known))}."
            )
    return {name: own for name, own in mapping.items() if kind is None or name in _MAPPABLE[kind]}


def _renamed(record: Record | BrokenRecord, columns: dict[str, str]) -> Record | BrokenRecord:
    if not columns or isinstance(record, BrokenRecord):
        return record
    renamed = {name: record.value[own] for name, own in columns.items() if own in record.value}
    others = {key: value for key, value in record.value.items() if key not in columns.values()}
    return record._replace(value={**others, **renamed})


def _pairs(record: Record | BrokenRecord, kind: str | None) -> list[Record | BrokenRecord]:
    """The records of the pairs of a record with several answers; any other record unchanged. A prompt accepts all of them."""
    if isinstance(record, BrokenRecord) or kind == "prompt":
        return [record]
    value, file, place = record
    try:
        values = as_pairs(value)
    except BadRowError as error:
        return [BrokenRecord(file, place, error.reason, error.detail, shown(value))]
    places = [place] if len(values) == 1 else [f"{place}, pair {number}" for number in range(1, len(values) + 1)]
    return [Record(one, file, where) for one, where in zip(values, places, strict=True)]


def _check_mapped(reference: str, columns: dict[str, str], records: Sequence[Record | BrokenRecord]) -> None:
    present = list(dict.fromkeys(key for record in records if isinstance(record, Record) for key in record.value))
    for name, own in columns.items():
        if present and own not in present:
            raise RequestError(
                f"data.columns maps {name} to {own}, but the first rows of {reference} have no such column: they have "
                f"{printable(', '.join(present)) or 'none'}."
            )


def _detected(reference: str, record: Record, kind: str | None, required: str | None) -> tuple[str, ...]:
    """The format of one of the first records, as a tuple of one name; empty if it is unknown."""
    if required is not None:
        return (required,) if _FORMATS[required].columns <= record.value.keys() else ()
    names = _fitting(record.value, kind)
    if len(names) > 1:
        raise _ambiguous(f"{reference} ({record.place})", names)
    return names or _fitting_with_nulls(record.value, kind)[:1]


def _fitting(value: dict[str, Any], kind: str | None) -> tuple[str, ...]:
    """The formats of a kind that fit a record's columns. A column whose value is null counts as absent."""
    fitting = _formats_with(tuple([name for name, content in value.items() if content is not None]))
    prompts = tuple([name for name in fitting if name in PROMPT_FORMATS])
    if kind == "prompt":
        return prompts
    names = tuple([name for name in fitting if name not in prompts])
    if not names and isinstance(value.get("text"), str):
        # Templates come last, because many datasets have their own columns and also the same row rendered as `text`.
        names = text_templates(value["text"])
    # Prompts need one column, which rows with an answer have too.
    return tuple([name for name in names if _is_of(name, kind)]) or (prompts if kind is None else ())


def _fitting_with_nulls(value: dict[str, Any], kind: str | None) -> tuple[str, ...]:
    return tuple(name for name in _formats_with(tuple(value)) if _is_of(name, kind))


def _is_of(name: str, kind: str | None) -> bool:
    """Whether a format is one of a kind; of any kind for None."""
    return kind is None or name in _OF_KIND[kind]


def _kind(name: str) -> str:
    if name in PROMPT_FORMATS:
        return "prompt"
    return "preference" if name in PREFERENCE_FORMATS else "instruction"


@lru_cache(maxsize=1024)
def _formats_with(columns: tuple[str, ...]) -> tuple[str, ...]:
    """The formats whose columns are all present, without formats that need only a part of another one's columns."""
    present = frozenset(columns)
    names = [name for name, f in _FORMATS.items() if f.columns <= present and f.columns != {"text"}]
    return tuple(n for n in names if not any(_FORMATS[n].columns < _FORMATS[other].columns for other in names))


def _row(record: Record | BrokenRecord, kind: str, required: str | None, unread: list[str]) -> Row | Quarantined:
    if isinstance(record, BrokenRecord):
        return record.quarantined(kind)
    value, file, place = record
    try:
        name = _format_of(value, kind, required)
        format_ = _FORMATS[name]
        reads = format_.reads | set(LABELS if kind == "labelled" else ())
        names = [printable(name) for name in value if name not in reads]
        unread += [name for name in names if name not in unread][: _UNREAD_NAMED - len(unread)]
        messages, label = format_.read(value), {}
        if kind == "labelled":
            messages, label = judged(messages, name), {"label": read_label(value)}
        fields = {
            **messages,
            **label,
            "source": printable(f"{file.rpartition('/')[2]}:{place}"),
            "origin": _origin(value),
            "document": _document(value),
        }
        # A label of KTO's that is true says that the answer is a good one.
        check_read(value, {*reads, "label"} if value.get("label") is True else reads, "it")
    except BadRowError as error:
        return BrokenRecord(file, place, error.reason, error.detail, shown(value)).quarantined(kind)
    return ROW_CLASSES[kind].model_validate(fields)


def _format_of(value: dict[str, Any], kind: str, required: str | None) -> str:
    names = (required,) if required is not None else _fitting(value, kind)
    if len(names) > 1:
        raise BadRowError("malformed", f"it can be read as {' or as '.join(names)}: name one in data.format")
    names = names or _fitting_with_nulls(value, kind)
    if not names and kind != "preference" and "text" in value:
        read_text(value["text"], "text")
        raise BadRowError("malformed", "its `text` is written in no known template")
    if not names:
        raise BadRowError("malformed", f"no {kind} format has the columns {', '.join(value) or '(none)'}")
    missing = sorted(name for name in _FORMATS[names[0]].columns if value.get(name) is None)
    if missing and missing[0] in value:
        raise BadRowError("null_value", f"`{missing[0]}` is null")
    if missing:
        raise BadRowError("malformed", f"`{missing[0]}` is missing, and {names[0]} needs it")
    return names[0]


def _origin(value: dict[str, Any]) -> str:
    names = (value.get(key) for key in ORIGINS)
    return next((name for name in names if name and isinstance(name, str)), "unknown")


def _document(value: dict[str, Any]) -> str:
    name = value.get("document")
    # The name groups rows and is not trained on, so a number is accepted too.
    return str(name) if isinstance(name, (str, int)) else ""


def _ambiguous(what: str, names: Sequence[str]) -> UnknownFormatError:
    choices = " or ".join(f"data.format={name}" for name in names)
    return UnknownFormatError(f"{what} can be read as {' or as '.join(names)}: choose one with {choices}.")


def _unknown(reference: str, kind: str | None, required: str | None, first: Record) -> RequestError:
    present = printable(", ".join(first.value)) or "none"
    if required is not None:
        needed = ", ".join(sorted(_FORMATS[required].columns))
        return RequestError(
            f"{reference} is not in the format that data.format asks for: {required} has the columns {needed}, its "
            f"first row has {present}. Name another format, or map columns with data.columns."
        )
    other = _fitting(first.value, None)
    if other and other[0] not in PROMPT_FORMATS:
        return RequestError(
            f"{reference} is in no known {kind} format: it holds {_kind(other[0])} rows ({' or as '.join(other)}). Name "
            f"it under data.{_kind(other[0])}s."
        )
    known = "; ".join(
        f"{name}: {', '.join(sorted(columns))}" for name, (columns, _, _) in _FORMATS.items() if _is_of(name, kind)
    )
    return UnknownFormatError(
        f"{reference} is in no known {f'{kind} ' if kind else ''}format: its first row has the columns {present}. Known "
        f"formats are {known}. A `text` must follow the template of its format. Map other column names with "
        "data.columns, e.g. --set data.columns.prompt=NAME."
    )
