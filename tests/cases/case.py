"""A case: an input with the recipe's settings for it, the verdict that was reported, and the right one.

A verdict is one line. For a dataset it is the format, the rows that were read and kept, and the reasons of the others; for
documents the number that was read and the reasons of the others; for a wrong request a part of the message; for a measurement
a figure.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from llm_engineering.documents.read import read_documents
from llm_engineering.errors import RequestError, WorkError
from llm_engineering.recipe.data_blocks import DataConfig, DocumentsConfig, FormattingConfig
from llm_engineering.reports.data_report import inspect_file

# How a verdict begins that is the message of an error.
REFUSED = "refused: "


class DataCase(NamedTuple):
    """A dataset that `inspect` reads.

    Attributes:
        name: what the case shows.
        file: the name of the file.
        content: the file; text is written as UTF-8.
        expected: the verdict.
        before: the verdict before the fault was repaired; empty if it was right.
        data: settings of the recipe's block `data`.
        formatting: settings of the block `formatting`.
        against: an evaluation file in JSON lines whose rows are searched for in the dataset.
        template: the chat template of the model; empty for that of the embedded model.
    """

    name: str
    file: str
    content: str | bytes
    expected: str
    before: str = ""
    data: dict[str, Any] | None = None
    formatting: dict[str, Any] | None = None
    against: str = ""
    template: str = ""


class DocumentCase(NamedTuple):
    """A folder of documents: the content of each file by its name; None for a link to a file that does not exist."""

    name: str
    files: dict[str, str | bytes | None]
    expected: str
    before: str = ""
    text_field: str | None = None


class CallCase(NamedTuple):
    """A function and the text of its result. A function with a parameter gets an empty folder."""

    name: str
    call: Callable[..., Any]
    expected: str
    before: str = ""


class FigureCase(NamedTuple):
    """A measurement, and the bounds of the right figure.

    Attributes:
        call: measures, in an empty folder if it has a parameter.
        low, high: the bounds.
        before: the figure before the fault was repaired.
        slow: it takes seconds, so only the command measures it; tests/unit/training asserts the same in another way.
    """

    name: str
    call: Callable[..., float]
    low: float
    high: float
    before: str
    slow: bool = False

    @property
    def expected(self) -> str:
        """The bounds as text."""
        return f"{self.low:g}" if self.low == self.high else f"{self.low:g} to {self.high:g}"


Case = DataCase | DocumentCase | CallCase | FigureCase


def verdict(case: Case, folder: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """The verdict on a case, whose files are written to an empty folder."""
    try:
        if isinstance(case, FigureCase):
            return f"{_called(case, folder):.5g}"
        if isinstance(case, CallCase):
            return str(_called(case, folder)).replace(str(folder), "")
        if isinstance(case, DocumentCase):
            return _documents(case, folder)
        return _dataset(case, folder, tokenizer)
    except (RequestError, WorkError) as error:
        return f"{REFUSED}{error}".replace(str(folder), "")


def agrees(case: Case, got: str) -> bool:
    """Whether a verdict is the expected one. Of the message of an error a part is expected."""
    if isinstance(case, FigureCase):
        try:
            return case.low <= float(got) <= case.high
        except ValueError:
            return False
    return case.expected in got if got.startswith(REFUSED) else got == case.expected


def _called(case: CallCase | FigureCase, folder: Path) -> Any:
    # Trainers print each evaluation.
    with contextlib.redirect_stdout(io.StringIO()):
        return case.call(folder) if case.call.__code__.co_argcount else case.call()


def _dataset(case: DataCase, folder: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    _write(folder / case.file, case.content)
    against = str(folder / "against.jsonl") if case.against else None
    if against is not None:
        _write(Path(against), case.against)
    if case.template:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = case.template
    data = DataConfig.model_validate(case.data or {})
    formatting = FormattingConfig.model_validate(case.formatting or {})
    report = inspect_file(str(folder / case.file), against, tokenizer, data, formatting, folder / "report")
    counts = {name: count for name, count in report["findings"].items() if name == "oldest_turns_dropped"}
    counts |= {"leaked": report["leaked_into_test"]} if case.against else {}
    return f"{report['format']}: {_counted(report['rows'], report['quarantined'] | counts, report['kept'])}"


def _documents(case: DocumentCase, folder: Path) -> str:
    for name, content in case.files.items():
        if content is None:
            (folder / name).symlink_to("gone.txt")
        else:
            _write(folder / name, content)
    documents, quarantine = read_documents(DocumentsConfig(path=str(folder), text_field=case.text_field))
    return _counted(len(documents), Counter(row.reason for row in quarantine))


def _counted(read: int, counts: dict[str, int], kept: int | None = None) -> str:
    parts = [f"{read} read", *([f"{kept} kept"] if kept is not None else [])]
    return ", ".join([*parts, *(f"{count} {name}" for name, count in counts.items())])


def _write(file: Path, content: str | bytes) -> None:
    file.write_bytes(content if isinstance(content, bytes) else content.encode())


def turns(*contents: str) -> list[dict[str, str]]:
    """Turns of user and assistant."""
    return [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]


def lines(*records: Any) -> str:
    """Records as JSON lines."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
