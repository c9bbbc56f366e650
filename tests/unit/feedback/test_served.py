"""The log of a server, feedback on its answers, and the rows that are made of both."""

import os
import signal
import stat
import subprocess
import sys

import pytest

from llm_engineering.feedback.served import (
    ServedLog,
    asked_questions,
    read_answers,
    said,
)
from tests.conftest import ROOT

MAIL, KEY = "anna.berg@firma.de", "ghp_16C7e42F292c6912E7710c838347Ae178B4a"


@pytest.fixture
def log(tmp_path):
    return ServedLog(tmp_path / "served" / "tiny", 3, "abc")


def answered(log, name, question="What is 3?", answer="A number.", finish="stop", **more):
    log.write_answer(name, [{"role": "user", "content": question}], {"content": answer, **more}, finish, None)


def content(folder):
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file()).decode()


def test_personal_data_and_secrets_never_reach_the_disk(log):
    answered(log, "a", f"I am {MAIL}, my key is {KEY}.", f"Hello {MAIL}.", reasoning_content=f"The key is {KEY}.")
    log.write_feedback("a", "down", f"Write to {MAIL}.", None)
    written = content(log.folder)
    assert MAIL not in written
    assert KEY not in written
    (record,) = read_answers(log.folder)
    assert record["messages"] == [{"role": "user", "content": "I am [EMAIL], my key is [SECRET]."}]
    assert record["answer"] == {"content": "Hello [EMAIL].", "reasoning_content": "The key is [SECRET]."}
    assert (record["version"], record["adapter"]) == (3, "abc")


def test_only_the_owner_may_read_the_files(log):
    answered(log, "a")
    log.write_feedback("a", "up", None, None)
    assert {stat.S_IMODE(path.stat().st_mode) for path in log.folder.iterdir()} == {0o600}
    assert stat.S_IMODE(log.folder.stat().st_mode) == 0o700


def test_thumbs_are_labels_and_corrections_are_good_answers_pairs_and_instructions(log):
    answered(log, "a")
    answered(log, "b", "What is 4?")
    log.write_feedback("a", "up", None, "anna")
    log.write_feedback("b", "down", "It follows 3.", None)
    labelled = [
        (one.row.completion[0].content, one.row.label, one.row.origin) for one in said(log.folder, "labelled").rows
    ]
    assert labelled == [
        ("A number.", True, "human:anna"),
        ("A number.", False, "human:anonymous"),
        ("It follows 3.", True, "human:anonymous"),
    ]
    (pair,) = said(log.folder, "preference").rows
    assert (pair.by, pair.about, pair.held_out) == ("anonymous", "version 3", False)
    assert (pair.row.prompt[0].content, pair.row.chosen[0].content) == ("What is 4?", "It follows 3.")
    assert (pair.row.rejected[0].content, pair.row.document) == ("A number.", "")
    (instruction,) = said(log.folder, "instruction").rows
    assert instruction.row.completion[0].content == "It follows 3."


def test_the_last_feedback_of_a_person_on_an_answer_counts(log):
    answered(log, "a")
    log.write_feedback("a", "up", "Three.", "anna")
    log.write_feedback("a", "up", None, "ben")
    log.write_feedback("a", "down", None, "anna")
    assert [(one.by, one.row.label) for one in said(log.folder, "labelled").rows] == [("anna", False), ("ben", True)]
    assert said(log.folder, "preference") == ([], [], [])


@pytest.mark.parametrize("finish", ["length", None])
def test_an_incomplete_answer_is_neither_a_good_one_nor_a_rejected_one(log, finish):
    answered(log, "a", finish=finish)
    answered(log, "b", finish=finish)
    log.write_feedback("a", "up", None, None)
    log.write_feedback("b", "down", "Three.", None)
    labelled = said(log.folder, "labelled")
    assert [(one.reason, one.place) for one in labelled.aside] == [("cut_answer", "a")]
    assert [(one.row.completion[0].content, one.row.label) for one in labelled.rows] == [
        ("A number.", False),
        ("Three.", True),
    ]
    pairs = said(log.folder, "preference")
    assert ([one.reason for one in pairs.aside], pairs.rows) == (["cut_answer"], [])
    assert len(said(log.folder, "instruction").rows) == 1


def test_feedback_on_an_answer_whose_log_was_deleted_is_set_aside(log):
    answered(log, "a")
    log.write_feedback("a", "down", "Three.", None)
    (day,) = log.folder.glob("2*.jsonl")
    day.unlink()
    for kind in ("labelled", "preference"):
        found = said(log.folder, kind)
        assert ([one.reason for one in found.aside], found.rows) == (["no_answer"], [])


def test_an_answer_is_known_by_its_id_and_not_by_texts_that_quote_one(log):
    answered(log, "a", question='{"id": "b", ')
    assert log.has_answer("a")
    assert not log.has_answer("b")
    assert ServedLog(log.folder, 4, "other").has_answer("a")


def test_questions_are_counted_and_follow_ups_left_out(log):
    for name, question in enumerate(("What is 3?", "what is 3", "Who?", "")):
        answered(log, str(name), question)
    turns = [{"role": role, "content": "And then?"} for role in ("user", "assistant", "user")]
    log.write_answer("more", turns, {"content": ""}, "stop", None)
    assert asked_questions(log.folder) == ({"What is 3?": 2, "Who?": 1, "": 1}, 1)


KILLED = """
import sys
from pathlib import Path
from llm_engineering.feedback.served import ServedLog
log = ServedLog(Path(sys.argv[1]), 1, "abc")
print(flush=True)
for number in range(10**6):
    log.write_answer(f"n{number}", [{"role": "user", "content": "word " * 20000}], {"content": "A."}, "stop", None)
"""


def test_a_kill_while_writing_loses_no_answer_that_was_written(log):
    """The last line may be torn: readers leave it out, and the next answer replaces it."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(log.folder)], env=environment, stdout=subprocess.PIPE)
    process.stdout.readline()
    while len(read_answers(log.folder)) < 3:
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = read_answers(log.folder)
    (day,) = log.folder.glob("2*.jsonl")
    # A kill rarely hits the middle of a write, so the rest of a torn line is written here too.
    whole = day.read_bytes()
    day.write_bytes(whole + whole[: whole.index(b"\n") // 2])
    assert read_answers(log.folder) == before
    answered(log, "next")
    assert [record["id"] for record in read_answers(log.folder)] == [*(record["id"] for record in before), "next"]
    assert [record["id"] for record in before] == [f"n{number}" for number in range(len(before))]
