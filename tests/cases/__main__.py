"""Runs the cases, and prints each with its expected verdict and the one that it got. Exit code 1 if any differs.

python -m tests.cases
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from pathlib import Path

import tools.cli  # noqa: F401  It sets the variables that libraries read when they are imported.
from llm_engineering.documents.read import read_documents
from llm_engineering.errors import RequestError
from llm_engineering.models.base_model import pin_revision
from llm_engineering.models.tokenizer import load_tokenizer
from llm_engineering.recipe.data_blocks import DataConfig, DocumentsConfig, FormattingConfig
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.training_blocks import EMBEDDED_MODEL, ModelConfig
from llm_engineering.reports.data_report import inspect_file
from tests.cases.table import CASES, CallCase, Case, DataCase, DocumentCase


def verdict(case: Case, folder: Path, tokenizer) -> str:
    """The verdict on a case, whose files are written to an empty folder."""
    try:
        if isinstance(case, CallCase):
            return str(case.call())
        if isinstance(case, DocumentCase):
            return _documents(case, folder)
        return _dataset(case, folder, tokenizer)
    except RequestError as error:
        return str(error)


def agrees(case: Case, got: str) -> bool:
    """Whether a verdict is the expected one. Messages are sentences, and of them a part is expected."""
    return case.expected in got if got.endswith(".") else got == case.expected


def _dataset(case: DataCase, folder: Path, tokenizer) -> str:
    _write(folder / case.file, case.content)
    against = str(folder / "against.jsonl") if case.against else None
    if against is not None:
        _write(Path(against), case.against)
    data, formatting = (
        DataConfig.model_validate(case.data or {}),
        FormattingConfig.model_validate(case.formatting or {}),
    )
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


def main() -> int:
    tokenizer = load_tokenizer(pin_revision(ModelConfig(name_or_path=EMBEDDED_MODEL)), Settings())
    wrong = 0
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            got = verdict(case, Path(folder), tokenizer).replace(folder, "")
        wrong += not agrees(case, got)
        print(
            f"{'ok   ' if agrees(case, got) else 'WRONG'} {case.name}\n      expected: {case.expected}\n      got:      {got}"
        )
    print(f"{len(CASES) - wrong} of {len(CASES)} verdicts are the expected ones.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
