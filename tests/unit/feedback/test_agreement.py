"""Kappa and win rates, computed by hand."""

import pytest

from llm_engineering.feedback import comparisons
from llm_engineering.feedback.agreement import JudgedQuestion, agreements, cohens_kappa, judged_questions
from llm_engineering.feedback.comparisons import Compared, own_question

MODELS = [Compared(key=name, name=name, identity=name) for name in ("b", "a")]


@pytest.fixture
def session(tmp_path):
    return answered(tmp_path, MODELS)


def answered(folder, models, count=4):
    questions = [own_question(f"Who is {n}?", "own") for n in range(count)]
    made = comparisons.start(folder, models, questions, "own", seed=1)
    for key in made.questions:
        for model in (0, 1):
            made.answer(key, model, f"Answer {model}.")
    return made


def test_kappa_is_agreement_beyond_chance():
    # 20 and 15 of 50 in agreement: observed 0.7; expected 0.5 * 0.6 + 0.5 * 0.4 = 0.5.
    one = ["yes"] * 25 + ["no"] * 25
    other = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    assert cohens_kappa(one, other) == pytest.approx(0.4)
    assert cohens_kappa(other, one) == pytest.approx(0.4)
    # Three categories: observed 3/5; expected (2 * 1 + 2 * 3 + 1 * 1) / 25 = 9/25.
    assert cohens_kappa(list("aabbc"), list("abbbc")) == pytest.approx((4 / 5 - 9 / 25) / (16 / 25))
    assert cohens_kappa(["a", "b"], ["b", "a"]) == pytest.approx(-1)
    assert cohens_kappa(["a", "a"], ["a", "a"]) is None
    assert cohens_kappa([], []) is None


def test_agreement_is_counted_on_questions_that_both_judged(session):
    one, two, three, four = session.questions
    for key, choice in ((one, "first"), (two, "tie"), (three, "second")):
        session.judge(key, "Ada", choice)
    for key, choice in ((two, "bad"), (three, "first"), (four, "first")):
        session.judge(key, "Bo", choice)
    judge = {one: "first", two: "neither", four: "second"}
    found = {(pair.one, pair.other): pair for pair in agreements(session, {"the judge": judge})}
    # Ada: neither, second. Bo: neither, first. Observed 1/2; expected 1/4.
    assert found["Ada", "Bo"] == ("Ada", "Bo", 2, 1, pytest.approx((1 / 2 - 1 / 4) / (3 / 4)))
    assert found["Ada", "the judge"] == ("Ada", "the judge", 2, 2, pytest.approx(1))
    assert found["Bo", "the judge"] == ("Bo", "the judge", 2, 1, pytest.approx((1 / 2 - 1 / 4) / (3 / 4)))


def test_a_question_counts_once_whatever_session_asked_it(session, tmp_path):
    one, two, three, _ = session.questions
    for name, choice in (("Ada", "first"), ("Bo", "first"), ("Cy", "second"), ("Di", "tie")):
        session.judge(one, name, choice)
    session.judge(two, "Ada", "written", "It is Eve.")
    session.judge(three, "Ada", "first")
    session.undo("Ada")
    other = answered(tmp_path, MODELS[::-1])
    other.judge(one, "Ed", "second")
    retrieved = [MODELS[0], MODELS[1].model_copy(update={"retrieval": True})]
    answered(tmp_path, retrieved).judge(one, "Ada", "first")
    found = {judged.question: judged for judged in judged_questions(tmp_path)}
    texts = [session.questions[key].prompt[0].content.lower().rstrip("?") for key in (one, two)]
    assert set(found) == set(texts)
    # For b: 1, 1, 0, 1/2, and 1 in the other session, where b is the second model.
    assert found[texts[0]].of("b") == pytest.approx(3.5 / 5)
    assert found[texts[0]].of("a") == pytest.approx(1.5 / 5)
    assert found[texts[0]].verdicts == 5
    assert found[texts[1]] == JudgedQuestion("a", "b", texts[1], 0.5, 1)
