"""What people ask and the documents do not cover: the comparison, and its page."""

from __future__ import annotations

import json
import re

import pytest
from fastapi.testclient import TestClient

from llm_engineering.documents.passages import Passage
from llm_engineering.feedback.served import AskedQuestions, ServedLog
from llm_engineering.review.app import build_app
from llm_engineering.review.drift_page import find_drift
from llm_engineering.review.site import Context, Covered
from tests.fakes.answering import no_models
from tests.fakes.reviews import reviews

PORT = 8240
TOOLS = ("winch", "pump", "lamp", "gate", "stove", "skiff", "flour", "plank")


def passage(tool):
    text = f"The {tool} stands in the hall of the {tool} maker. Its handle is painted green."
    return Passage(id=tool, document=tool, title=tool, start=0, end=len(text), text=text)


WORDINGS = ("Which colour has the handle of the {}?", "Where does the {} stand?")
COVERED = Covered([passage(tool) for tool in TOOLS], [words.format(tool) for tool in TOOLS for words in WORDINGS])


def ask(log, number, question):
    log.write_answer(f"n{number}", [{"role": "user", "content": question}], {"content": "A."}, "stop", None)


@pytest.fixture
def log(tmp_path):
    return ServedLog(tmp_path / "served", 1, "abc")


@pytest.fixture
def pages(tmp_path, log):
    context = Context(reviews(tmp_path, served=log.folder, read_covered=lambda: COVERED))
    client = TestClient(build_app(context, PORT, no_models()), base_url=f"http://127.0.0.1:{PORT}")
    return lambda path="": client.get(f"{context.root}/drift{path}")


def test_questions_below_nearly_all_held_out_ones_are_not_covered():
    asked = AskedQuestions({"Where does the pump stand?": 9, "Who won the cup?": 2, "Rain tomorrow": 2, "Abba?": 3}, 0)
    found = find_drift(asked, COVERED)
    assert [(question, times) for question, times, _ in found.uncovered] == [
        ("Abba?", 3),
        ("Rain tomorrow", 2),
        ("Who won the cup?", 2),
    ]
    assert found.uncovered[0][2] == 0 < found.uncovered[2][2] < found.limit


def test_a_question_like_the_held_out_ones_is_covered():
    found = find_drift(AskedQuestions({"Which colour has the handle of the lamp?": 1}, 0), COVERED)
    assert found.uncovered == []


def test_the_page_says_how_to_log_if_nothing_was_asked(pages):
    assert "serving.log_requests=true" in pages().text


def test_the_page_lists_the_questions_and_follows_the_log(pages, log):
    for number, question in enumerate(("Who won the cup?", "who won the cup", "Where does the pump stand?")):
        ask(log, number, question)
    page = pages().text
    assert "do not cover 1 of 2 different questions, which were\nasked 3 times" in page
    assert "Who won the cup?" in page
    ask(log, 9, "<script>alert(1)</script>\u202e")
    page = pages().text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;‹U+202E›" in page
    assert "<script>alert" not in page


def test_the_list_can_be_downloaded(pages, log):
    ask(log, 1, "Who won\nthe cup?")
    ask(log, 2, "Abba?")
    answer = pages("/questions.txt")
    assert answer.text == "Abba?\nWho won the cup?\n"
    assert answer.headers["content-disposition"] == 'attachment; filename="questions.txt"'


def test_ten_thousand_questions_are_shown_in_pages(pages, log):
    log.folder.mkdir()
    turns = ({"role": "user", "content": f"Question {number} about cup {number}?"} for number in range(10_000))
    lines = [json.dumps({"id": "n", "messages": [turn]}) for turn in turns]
    (log.folder / "2026-01-01.jsonl").write_text("\n".join(lines) + "\n")
    first, last = pages().text, pages("?page_number=100").text
    assert "10000 of 10000" in first
    assert len(re.findall("<tr><td>", first)) == len(re.findall("<tr><td>", last)) == 100
    assert 'rel="next"' in first
    assert 'rel="next"' not in last
    assert len(pages("/questions.txt").text.splitlines()) == 10_000
