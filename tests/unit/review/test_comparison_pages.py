"""The pages of blind comparisons: what they show, hide and store."""

import pytest
from fastapi.testclient import TestClient

from llm_engineering.feedback import comparisons, journal
from llm_engineering.review.app import build_app
from llm_engineering.review.site import Context
from tests.fakes.answering import answering
from tests.fakes.reviews import reviews

PORT = 8240
HOSTILE = "<script>alert(1)</script> \u202egnp"


@pytest.fixture
def context(tmp_path):
    return Context(reviews(tmp_path))


@pytest.fixture
def pages(context):
    judged = {}
    made = answering(["base", "3:sft"], judged, lambda model, question: f"{HOSTILE} {len(model)} {question}")
    client = TestClient(build_app(context, PORT, made), base_url=f"http://127.0.0.1:{PORT}")
    return Pages(client, context, judged)


class Pages:
    def __init__(self, client, context, judged):
        self.client, self.context, self.judged = client, context, judged

    def get(self, path):
        return self.client.get(f"{self.context.root}/compare{path}")

    def post(self, path, **body):
        headers = {"X-Review-Write": self.context.write_secret}
        return self.client.post(f"{self.context.root}/compare{path}", json=body, headers=headers)

    def start(self, **changed):
        form = {"first": "base", "second": "3:sft", "asked": "held-out", "count": 4, "seed": 3, **changed}
        return self.post("/start", **form)


def test_a_poll_reads_only_the_file_of_its_comparison(pages, monkeypatch):
    key, _ = (pages.start(seed=seed).json()["session"] for seed in (3, 4))
    read = []
    monkeypatch.setattr(journal, "read", lambda path, whole=journal.read: read.append(path.stem) or whole(path))
    assert pages.get(f"/{key}/next?reviewer=Ada").status_code == 200
    assert read == [key]


def test_a_reviewer_judges_every_question_and_sees_no_name_before_the_end(pages, tmp_path):
    assert "3:sft" in pages.get("").text
    key = pages.start().json()["session"]
    assert "3:sft" not in pages.get(f"/{key}").text
    state = pages.get(f"/{key}/next?reviewer=Ada").json()
    assert (state["done"], state["total"], state["answered"]) == (0, 4, 4)
    hidden = pages.get(f"/{key}/result?reviewer=Ada")
    assert hidden.status_code == 400
    assert "when you have judged all questions" in hidden.text
    seen = set()
    for choice in ("left", "right", "tie", "written"):
        seen.add(state["question"])
        assert not {"base", "3:sft"} & set(state)
        text = "A better one." if choice == "written" else ""
        state = pages.post(
            f"/{key}/verdict", reviewer="Ada", question=state["question"], choice=choice, text=text
        ).json()
    assert len(seen) == 4
    assert state["question"] is None
    page = pages.get(f"/{key}/result?reviewer=Ada").text
    assert "base or 3:sft" in page
    assert "A better one." in page
    assert pages.get(f"/{key}/result?reviewer=Bo").status_code == 400


def test_the_side_that_was_chosen_is_stored_as_the_model_that_stood_there(pages, tmp_path):
    key = pages.start(count=8).json()["session"]
    for _ in range(8):
        state = pages.get(f"/{key}/next?reviewer=Ada").json()
        # The answer of 3:sft has the length of its name in it.
        choice = "left" if " 5 " in state["left"] else "right"
        pages.post(f"/{key}/verdict", reviewer="Ada", question=state["question"], choice=choice)
    (session,) = comparisons.sessions(tmp_path)
    assert {verdict.choice for verdict in session.verdicts.values()} == {"second"}
    assert len({session.is_swapped(question, "Ada") for question in session.questions}) == 2


def test_a_verdict_can_be_taken_back(pages):
    key = pages.start().json()["session"]
    assert pages.post(f"/{key}/undo", reviewer="Ada").json() == {"error": "There is no verdict of yours to take back."}
    first = pages.get(f"/{key}/next?reviewer=Ada").json()["question"]
    pages.post(f"/{key}/verdict", reviewer="Ada", question=first, choice="bad")
    assert pages.post(f"/{key}/undo", reviewer="Ada").json()["question"] == first


def test_reviewers_and_the_judge_are_compared_at_the_end(pages, tmp_path):
    key = pages.start(asked="own", own=["Who?", "What?"]).json()["session"]
    (session,) = comparisons.sessions(tmp_path)
    pages.judged |= dict.fromkeys(session.questions, "first")
    for name in ("Ada", "Bo"):
        for question in session.questions:
            pages.post(f"/{key}/verdict", reviewer=name, question=question, choice="tie")
    page = pages.get(f"/{key}/result?reviewer=Bo").text
    for pair in ("Ada and Bo", "Ada and the judge", "Bo and the judge"):
        assert pair in page
    listed = pages.get("").text
    assert "Ada 2/2, Bo 2/2" in listed


def test_an_answer_that_was_cut_says_so(context):
    made = answering(["base", "3:sft"], cuts={"base": 8})
    client = TestClient(build_app(context, PORT, made), base_url=f"http://127.0.0.1:{PORT}")
    pages = Pages(client, context, {})
    key = pages.start().json()["session"]
    for _ in range(4):
        state = pages.get(f"/{key}/next?reviewer=Ada").json()
        cut, ended = ("left", "right") if "base" in state["left"] else ("right", "left")
        assert (state[f"{cut}_cut"], state[f"{ended}_cut"]) == ("cut at 8 tokens", "")
        pages.post(f"/{key}/verdict", reviewer="Ada", question=state["question"], choice="tie")
    assert pages.get(f"/{key}/result?reviewer=Ada").text.count("cut at 8 tokens") == 4


def test_hostile_answers_are_shown_as_text(pages):
    key = pages.start(asked="own", own=[HOSTILE]).json()["session"]
    state = pages.get(f"/{key}/next?reviewer=Ada").json()
    assert "‹U+202E›" in state["left"]
    assert "‹U+202E›" in state["prompt"]
    pages.post(f"/{key}/verdict", reviewer="Ada", question=state["question"], choice="written", text=HOSTILE)
    page = pages.get(f"/{key}/result?reviewer=Ada").text
    assert "<script>alert(1)" not in page
    assert "&lt;script&gt;alert(1)" in page


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ({"second": "base"}, "choose two that differ"),
        ({"asked": "own", "own": []}, "There are no own questions"),
        ({"count": 0}, "count: Input should be greater than or equal to 1"),
        ({"own": ["x" * 5000]}, "own.0: String should have at most 4000 characters"),
    ],
)
def test_wrong_forms_are_refused_with_a_sentence(pages, form, words):
    assert words in pages.start(**form).json()["error"]


def test_unknown_sessions_questions_and_names_are_refused(pages):
    assert "There is no such comparison" in pages.get("/none").text
    key = pages.start().json()["session"]
    wrong = pages.post(f"/{key}/verdict", reviewer="Ada", question="none", choice="tie")
    assert "has no such question" in wrong.json()["error"]
    assert pages.get(f"/{key}/next?reviewer=%20").status_code == 422
