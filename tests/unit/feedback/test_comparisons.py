"""Blind comparisons: what is stored, how a session continues, and which rows the verdicts make."""

import pytest

from llm_engineering.data.rows import split_key
from llm_engineering.errors import RequestError
from llm_engineering.feedback import comparisons
from llm_engineering.feedback.comparisons import Compared, own_question, question_of
from tests.tiny_models import instruction

MODELS = [
    Compared(key="base", name="base", identity="b"),
    Compared(key="1:sft", name="version 1 (sft)", identity="v", retrieval=True),
]


@pytest.fixture
def session(tmp_path):
    """A session about six questions of rows and an own one, all answered."""
    questions = [question_of(instruction(n), "test" if n == 5 else "train") for n in range(6)]
    questions.append(own_question("Is it blue?", "own question 1"))
    made = comparisons.start(tmp_path, MODELS, questions, "training", seed=3)
    for key in made.questions:
        for model in (0, 1):
            made.answer(key, model, f"Answer {model} to {key}.")
    return made


def test_a_session_continues_where_it_was_with_the_same_order_and_sides(session):
    first, second = list(session.questions)[:2]
    session.judge(first, "Ada", "tie")
    again = comparisons.Comparison(session.path)
    assert list(again.questions) == list(session.questions)
    assert again.answers == session.answers
    assert again.next_question("Ada") == second
    assert again.next_question("Bo") == first
    sides = [again.is_swapped(key, "Ada") for key in again.questions]
    assert sides == [session.is_swapped(key, "Ada") for key in session.questions]
    assert {True, False} == set(sides)
    assert sides != [again.is_swapped(key, "Bo") for key in again.questions]


def test_the_last_verdict_counts_and_undoing_erases_nothing(session):
    first, second = list(session.questions)[:2]
    session.judge(first, "Ada", "first")
    session.judge(second, "Ada", "bad")
    lines = len(session.path.read_bytes().splitlines())
    assert session.undo("Ada") == second
    assert session.undo("Bo") is None
    assert len(session.path.read_bytes().splitlines()) == lines + 1
    assert session.next_question("Ada") == second
    session.judge(second, "Ada", "tie")
    assert session.verdicts[second, "Ada"].choice == "tie"
    assert session.undo("Ada") == second
    assert session.undo("Ada") == first


def test_pairs_are_what_most_reviewers_chose(session, tmp_path):
    won, split, tied, written, *_ = session.questions
    session.judge(won, "Ada", "first")
    session.judge(won, "Bo", "first")
    session.judge(won, "Cy", "second")
    session.judge(split, "Ada", "first")
    session.judge(split, "Bo", "second")
    session.judge(tied, "Ada", "bad")
    session.judge(written, "Ada", "written", " It is green. ")
    pairs, _, aside = comparisons.said(tmp_path, "preference", "sentence")
    assert [row.reason for row in aside] == ["tie", "both_bad"]
    texts = [(row.row.chosen[0].content, row.row.rejected[0].content, row.by, row.about) for row in pairs]
    assert texts == [
        (f"Answer 0 to {won}.", f"Answer 1 to {won}.", "Ada, Bo", "base over version 1 (sft) with retrieval"),
        ("It is green.", f"Answer 0 to {written}.", "Ada", "written over base"),
        ("It is green.", f"Answer 1 to {written}.", "Ada", "written over version 1 (sft) with retrieval"),
    ]
    assert {row.row.origin for row in pairs} == {"human:review"}
    (answer,) = comparisons.said(tmp_path, "instruction", "sentence").rows
    assert answer.row.completion[0].content == "It is green."
    assert answer.row.prompt == session.questions[written].prompt
    assert comparisons.said(tmp_path, "labelled", "sentence").rows == []


@pytest.mark.parametrize(
    ("rule", "rejected", "reasons"),
    [
        ("sentence", "It is here.", ["cut_answer", "rejected_cut"]),
        ("keep", "It is here. The other one", ["cut_answer"]),
        ("drop", None, ["cut_answer", "rejected_cut", "rejected_cut", "rejected_cut"]),
    ],
)
def test_a_cut_winner_gives_no_pair_and_a_cut_loser_ends_like_that_of_a_generated_pair(
    tmp_path, rule, rejected, reasons
):
    questions = [own_question(f"Where is {n}?", f"own question {n}") for n in range(3)]
    session = comparisons.start(tmp_path, MODELS, questions, "own", seed=3)
    won, lost, written = session.questions
    for key in session.questions:
        session.answer(key, 0, "It is here. The other one", cut=6)
        session.answer(key, 1, "There" if key == written else "There.", cut=1 if key == written else None)
    session.judge(won, "Ada", "first")
    session.judge(lost, "Ada", "second")
    session.judge(written, "Ada", "written", "It is green.")
    pairs, _, aside = comparisons.said(tmp_path, "preference", rule)
    assert sorted(row.reason for row in aside) == reasons
    assert aside[0].detail == "base over version 1 (sft) with retrieval, at 6 tokens; by Ada"
    found = {row.about: row.row for row in pairs}
    ended = ", ended at its last sentence" if rule == "sentence" else ""
    for about, chosen in (
        ("version 1 (sft) with retrieval over base", "There."),
        ("written over base", "It is green."),
    ):
        if rejected is not None:
            row = found.pop(about)
            assert (row.chosen[0].content, row.rejected[0].content) == (chosen, rejected)
            assert row.origin == f"human:review{ended}"
    assert len(found) == (rule == "keep")
    # What a reviewer wrote is an answer in any case.
    assert len(comparisons.said(tmp_path, "instruction", rule).rows) == 1


def test_rows_about_a_row_of_a_dataset_stay_in_its_split(session, tmp_path):
    for key in session.questions:
        session.judge(key, "Ada", "second")
    rows = {row.row.prompt[0].content: row for row in comparisons.said(tmp_path, "preference", "sentence").rows}
    assert {text for text, row in rows.items() if row.held_out} == {"What is 5?"}
    assert split_key(rows["What is 5?"].row) == split_key(instruction(5))
    assert rows["Is it blue?"].row.document == ""


def test_wrong_verdicts_and_sessions_are_refused(session, tmp_path):
    key = next(iter(session.questions))
    with pytest.raises(RequestError, match="better answer is empty"):
        session.judge(key, "Ada", "written", " ")
    with pytest.raises(RequestError, match="choose two that differ"):
        comparisons.start(tmp_path, [MODELS[0], MODELS[0]], list(session.questions.values()), "own", 1)
    with pytest.raises(RequestError, match="no held-out questions"):
        comparisons.start(tmp_path, MODELS, [], "held-out", 1)
    waiting = comparisons.start(tmp_path, MODELS, [own_question("Who?", "own")], "own", 1)
    with pytest.raises(RequestError, match="not answered this question yet"):
        waiting.judge(next(iter(waiting.questions)), "Ada", "tie")
    assert [one.id for one in comparisons.sessions(tmp_path)] == [session.id, waiting.id]
