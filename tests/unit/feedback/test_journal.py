"""The append-only files of what people said."""

from __future__ import annotations

import subprocess
import sys

import pytest

from llm_engineering.errors import WorkError
from llm_engineering.feedback import journal


def test_records_come_back_in_their_order(tmp_path):
    path = tmp_path / "new" / "decisions.jsonl"
    records = [{"text": "é\n\u2028\ud800"}, {"number": 2}]
    for record in records:
        journal.append(path, record)
    assert journal.read(path) == records
    assert path.read_bytes().count(b"\n") == 2


def test_a_missing_file_has_no_records(tmp_path):
    assert journal.read(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("torn", [b'{"b": "' + b"x" * 200_000, b"{", b'{"whole": 1}'])
@pytest.mark.parametrize("before", [b"", b'{"a": 1}\n'])
def test_a_torn_last_line_is_ignored_and_then_removed(tmp_path, before, torn):
    path = tmp_path / "decisions.jsonl"
    path.write_bytes(before + torn)
    kept = [{"a": 1}] if before else []
    assert journal.read(path) == kept
    journal.append(path, {"c": 3})
    assert journal.read(path) == [*kept, {"c": 3}]
    assert path.read_bytes() == before + b'{"c": 3}\n'


@pytest.mark.parametrize("line", [b"not JSON", b"[1]", b"", b"\xff"])
def test_another_bad_line_is_an_error_with_its_number(tmp_path, line):
    path = tmp_path / "decisions.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b'\n{"b": 2}\n')
    with pytest.raises(WorkError, match=r"Line 2 of .*decisions\.jsonl"):
        journal.read(path)


def test_several_processes_append_whole_lines(tmp_path):
    path = tmp_path / "decisions.jsonl"
    code = (
        "import sys; from pathlib import Path; from llm_engineering.feedback import journal\n"
        "for n in range(50): journal.append(Path(sys.argv[1]), {'by': sys.argv[2], 'n': n, 'text': 'x' * 9000})"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path), name]) for name in "abc"]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    records = journal.read(path)
    for name in "abc":
        assert [record["n"] for record in records if record["by"] == name] == list(range(50))
