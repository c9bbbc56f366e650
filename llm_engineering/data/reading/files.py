"""Reads records from JSON, JSONL, CSV, Parquet and Arrow files, one record at a time, from files larger than memory.

A record that cannot be read is yielded with its problem and its place, and the rest of the file is still read.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from codecs import BOM_UTF16_BE, BOM_UTF16_LE, BOM_UTF32_BE, BOM_UTF32_LE
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from llm_engineering.data.reading.json_stream import (
    DECODER,
    WINDOW,
    JsonError,
    Unreadable,
    is_json,
    list_key,
    rows_of_list,
    rows_of_values,
    unreadable,
)
from llm_engineering.data.rows import Quarantined
from llm_engineering.errors import RequestError

# A cell may hold a whole conversation, and the csv module's limit is 128 KB. The limit is a C long, which may have 32 bits.
csv.field_size_limit(2**31 - 1)


class Record(NamedTuple):
    """One record of a file and its place there. All its text can be written as UTF-8."""

    value: dict[str, Any]
    file: str
    place: str


class BrokenRecord(NamedTuple):
    """A piece of a file that is not a valid record, with the reason."""

    file: str
    place: str
    reason: str
    detail: str
    text: str

    def quarantined(self, stage: str) -> Quarantined:
        """This record as an entry of the quarantine. `stage` is the stage that read the file."""
        return Quarantined(
            stage=stage,
            reason=self.reason,
            source=printable(self.file),
            place=printable(self.place),
            detail=printable(self.detail),
            text=printable(self.text)[:200],
        )


class Item(NamedTuple):
    """The place of a record, its value, and the reason and detail of its problem, both empty if it has none."""

    place: str
    value: Any
    reason: str = ""
    detail: str = ""


BATCH_ROWS = 1000
_ARROW_FILE_MAGIC = b"ARROW1"
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_NOT_UTF8 = ("not_utf8", "it contains bytes that are not UTF-8 text: convert them, e.g. with iconv")
_HALF_CHARACTER = (
    "not_utf8",
    "it has an escape such as \\ud83d for half of a character (a lone surrogate), as remains if a text is cut within an emoji: "
    "write the text again",
)
_SEPARATORS = ",;\t|"
# The line with which a spreadsheet names the separator.
_SEPARATOR_LINE = re.compile(r"sep=(.)\s*", re.IGNORECASE)


def read_records(path: Path) -> Iterator[Record | BrokenRecord]:
    """Yield each record of a file once. A record that cannot be read is yielded as a BrokenRecord.

    Raises:
        RequestError: the file is missing, unreadable, damaged or in an unknown format.
    """
    # Parquet and Arrow compress their own columns, so only text files are read from .gz.
    readers = _TEXT_READERS if _is_packed(path) else _READERS
    reader = readers.get(ending(path).removesuffix(".gz"))
    if reader is None:
        raise RequestError(
            f"{path} is in no known format ({ending(path) or 'no ending'}). Convert it to one of {', '.join(_READERS)}; "
            f"{', '.join(_TEXT_READERS)} files can also be compressed as .gz."
        )
    file = str(path)
    try:
        for place, value, reason, detail in reader(path):
            if reason:
                yield BrokenRecord(file, place, reason, detail, shown(value))
            elif isinstance(value, dict):
                yield Record(value, file, place)
            elif isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
                # A conversation that stands alone, without a key.
                yield Record({"messages": value}, file, place)
            else:
                detail = f"expected an object, found {type(value).__name__}"
                yield BrokenRecord(file, place, "malformed", detail, shown(value))
    except FileNotFoundError:
        raise RequestError(
            f"There is no file {path}. Check the path; it is relative to the folder you run in."
        ) from None
    except PermissionError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}. Check its permissions.") from error
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{path} contains bytes that are not {error.encoding} text: {error.reason}. Write the file again."
        ) from error
    except JsonError as error:
        hint = " If it holds one object after the other, name the file .jsonl." if "extra data" in str(error) else ""
        raise RequestError(f"{path} is not valid JSON with rows in it: {error}.{hint}") from None
    except csv.Error as error:
        raise RequestError(f"{path} is not valid CSV: {error}. Correct the file.") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise RequestError(f"{path} is damaged ({error}): copy or compress it again.") from error
    except (OSError, pa.ArrowException) as error:
        problem = getattr(error, "strerror", None) or str(error).split("\n")[0]
        raise RequestError(
            f"{path} cannot be read: {problem}. It is damaged or in another format: copy or convert it again."
        ) from error


def ending(path: Path) -> str:
    """The file name's ending in lower case, with `.gz` if the file is compressed: `.jsonl.gz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    return "".join(suffixes) if suffixes[-1:] == [".gz"] else "".join(suffixes[-1:])


def has_known_ending(path: Path) -> bool:
    """Whether the file's name ends like a dataset, compressed or not."""
    return ending(path).removesuffix(".gz") in _READERS


def is_text(text: str) -> bool:
    """Whether a string can be written as UTF-8; a lone surrogate cannot."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(text: str) -> str:
    """The text with escapes in place of the characters that cannot be written as UTF-8."""
    return text if is_text(text) else text.encode("utf-8", "backslashreplace").decode()


def shown(value: Any) -> str:
    """The first 200 characters of any value, for messages."""
    try:
        return (value if isinstance(value, str) else str(value))[:200]
    except RecursionError:
        return f"a deeply nested {type(value).__name__}"


def _is_packed(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def text_encoding(head: bytes) -> str:
    """The encoding of a text by its first four bytes: UTF-16 or UTF-32 by their mark or by zero bytes, else UTF-8."""
    if head.startswith((BOM_UTF32_LE, BOM_UTF32_BE)):
        return "utf-32"
    if head.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
        return "utf-16"
    # Without a mark, every second byte of a text that begins with a Latin letter or a bracket is zero.
    if len(head) > 1 and (head[0] == 0) != (head[1] == 0):
        return "utf-16-be" if head[0] == 0 else "utf-16-le"
    return "utf-8-sig"


def _open_text(path: Path, newline: str) -> TextIO:
    with gzip.open(path) if _is_packed(path) else path.open("rb") as file:
        encoding = text_encoding(file.read(4))
    # Bytes that are not text become lone surrogates. The readers search for these.
    errors = "surrogateescape" if encoding == "utf-8-sig" else "surrogatepass"
    if _is_packed(path):
        return gzip.open(path, "rt", encoding=encoding, errors=errors, newline=newline)
    return path.open(encoding=encoding, errors=errors, newline=newline)


def _checked(place: str, value: Any, raw: str) -> Item:
    """The value of a JSON text, or its problem: Python cannot read it, or it cannot be written as UTF-8."""
    if isinstance(value, Unreadable):
        return Item(place, raw, "malformed", value.problem)
    if not is_text(raw):
        return Item(place, raw, *_NOT_UTF8)
    if "\\u" in raw and _SURROGATE.search(raw):
        try:
            if not is_text(json.dumps(value, ensure_ascii=False)):
                return Item(place, raw, *_HALF_CHARACTER)
        except RecursionError as error:
            return Item(place, raw, "malformed", unreadable(error).problem)
    return Item(place, value)


def _jsonl(path: Path) -> Iterator[Item]:
    """The lines of JSON Lines; also a list that has this name, and objects that each have several lines."""
    first, is_last = _first_line(path)
    if first.startswith("[") and (is_last or not is_json(first)):
        yield from _json_list(path)
        return
    with _open_text(path, newline="\n") as stream:
        if first == "{":
            for place, value, raw in rows_of_values(stream):
                yield _checked(place, value, raw)
            return
        # Only "\n" ends a line of JSONL. Universal newlines and str.splitlines would also split at other characters.
        for number, line in enumerate(stream, start=1):
            if line.isspace():
                continue
            place = f"line {number}"
            if not is_text(line):
                yield Item(place, line, *_NOT_UTF8)
                continue
            try:
                value = DECODER.decode(line)
            except (ValueError, RecursionError) as error:
                value = unreadable(error)
            yield _checked(place, value, line)


def _json(path: Path) -> Iterator[Item]:
    """The items of a list; also JSON Lines that have this name."""
    first, is_last = _first_line(path)
    if not first:
        return
    yield from _jsonl(path) if first.startswith("{") and not is_last and is_json(first) else _json_list(path)


def _json_list(path: Path) -> Iterator[Item]:
    with _open_text(path, newline="") as stream:
        key = list_key(stream)
    with _open_text(path, newline="") as stream:
        for place, value, raw in rows_of_list(stream, key):
            yield _checked(place, value, raw)


def _first_line(path: Path) -> tuple[str, bool]:
    """The first line with text, without white space around it, and whether only white space follows it.

    Of a line of more than WINDOW characters, only the first part is returned.
    """
    with _open_text(path, newline="\n") as stream:
        first = ""
        while not first and (line := stream.readline(WINDOW)):
            first = line.strip()
        while line := stream.readline(WINDOW):
            if line.strip():
                return first, False
    return first, True


def _csv_rows(path: Path) -> Iterator[Item]:
    """The rows of a CSV file.

    The separator is the one that gives the first line the most columns: spreadsheets also write `;` and tabs.

    Raises:
        csv.Error, UnicodeDecodeError, OSError: the file is damaged, or is not a CSV file.
    """
    with _open_text(path, newline="") as stream:
        first = stream.readline()
        named = _SEPARATOR_LINE.fullmatch(first)
        separator = named[1] if named else max(_SEPARATORS, key=lambda mark: _columns(first, mark))
        if not named:
            stream.seek(0)
        reader = csv.reader(stream, delimiter=separator, strict=True)
        header = next(reader, [])
        if not all(map(is_text, header)):
            raise csv.Error("its first line, the names of the columns, is not UTF-8 text")
        names = [name for name in header if name.strip()]
        if len(set(names)) < len(names):
            raise csv.Error(f"two columns have the same name ({', '.join(names)})")
        while True:
            place = f"line {reader.line_num + (2 if named else 1)}"
            try:
                cells = next(reader, None)
            except csv.Error as error:
                if "unexpected end of data" in str(error):
                    raise csv.Error(f"{place} opens a quoted cell that is never closed") from error
                yield Item(place, "", "malformed", str(error))
                continue
            if cells is None:
                return
            if cells:
                yield _csv_row(place, header, cells, separator)


def _columns(line: str, separator: str) -> int:
    """The number of columns of a line with this separator; 0 if text would follow the closing mark of a quoted cell."""
    try:
        return len(next(csv.reader([line], delimiter=separator, strict=True), []))
    except csv.Error:
        return 0


def _csv_row(place: str, header: list[str], cells: list[str], separator: str) -> Item:
    """A row as an object. Spreadsheets write empty cells under columns without a name: these are left out."""
    text = separator.join(cells)
    if any(cells[len(header) :]) or any(name.strip() for name in header[len(cells) :]):
        return Item(place, text, "malformed", f"{len(cells)} cells, and the first line names {len(header)} columns")
    if not is_text(text):
        return Item(place, text, *_NOT_UTF8)
    columns = [name if name.strip() else f"(column {number})" for number, name in enumerate(header, start=1)]
    named = zip(columns, header, cells, strict=False)
    return Item(place, {column: cell for column, name, cell in named if cell or name.strip()})


def _parquet_rows(path: Path) -> Iterator[Item]:
    with path.open("rb") as file:
        source = pq.ParquetFile(file, pre_buffer=False)
        _check_names(source.schema_arrow)
        yield from _rows(source.iter_batches(BATCH_ROWS))


def _arrow_rows(path: Path) -> Iterator[Item]:
    """The rows of an Arrow file, in the file or the streaming format; `datasets` writes the latter."""
    with path.open("rb") as file:
        start = file.read(len(_ARROW_FILE_MAGIC))
        file.seek(0)
        if start == _ARROW_FILE_MAGIC:
            table = pa.ipc.open_file(file)
            batches = (table.get_batch(number) for number in range(table.num_record_batches))
        else:
            table = pa.ipc.open_stream(file)
            batches = iter(table)
        _check_names(table.schema)
        yield from _rows(batches)


def _check_names(schema: pa.Schema) -> None:
    if len(set(schema.names)) < len(schema.names):
        raise pa.ArrowInvalid(f"two columns have the same name ({', '.join(schema.names)})")


def _rows(batches: Iterator[pa.RecordBatch]) -> Iterator[Item]:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, BATCH_ROWS):
            part = batch.slice(start, BATCH_ROWS)
            try:
                values = part.to_pylist()
            except (ValueError, OverflowError):
                # Python cannot represent one of the values, e.g. text that is not UTF-8 or a date out of range.
                values = [_one(part.slice(index, 1)) for index in range(part.num_rows)]
            for value in values:
                number += 1
                place = f"row {number}"
                if isinstance(value, UnicodeDecodeError):
                    yield Item(place, "", "not_utf8", str(value))
                elif isinstance(value, Exception):
                    yield Item(place, "", "malformed", str(value))
                else:
                    yield Item(place, without_nan(value))


def without_nan(row: dict[str, Any]) -> dict[str, Any]:
    """The row with null in place of NaN, which pandas writes for an empty cell."""
    return {name: None if isinstance(value, float) and value != value else value for name, value in row.items()}


def _one(row: pa.RecordBatch) -> dict[str, Any] | ValueError | OverflowError:
    try:
        values: list[dict[str, Any]] = row.to_pylist()
    except (ValueError, OverflowError) as error:
        return error
    return values[0]


_TEXT_READERS: dict[str, Callable[[Path], Iterator[Item]]] = {
    ".json": _json,
    ".jsonl": _jsonl,
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
}
_READERS = {**_TEXT_READERS, ".parquet": _parquet_rows, ".arrow": _arrow_rows}
