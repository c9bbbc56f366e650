"""The pages of *Compare*: blind comparisons of the answers of two models, and their results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, cast

from fastapi import FastAPI
from fastapi.responses import Response
from pydantic import BaseModel, Field, StringConstraints

from llm_engineering.errors import RequestError
from llm_engineering.evaluation.statistics import Bootstrap, Estimate, Rows
from llm_engineering.feedback import comparisons
from llm_engineering.feedback.agreement import SCORES, agreements
from llm_engineering.feedback.comparisons import Choice, Compared, Comparison, Question, own_question
from llm_engineering.review.site import Context, Reviewer, visible

MAX_QUESTIONS = 500
MAX_ANSWER_CHARS = 20_000
_QuestionText = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=4000)]


class Model(NamedTuple):
    """A model that can be compared: `key` names it in addresses, `name` for people."""

    key: str
    name: str


@dataclass(frozen=True)
class Answering:
    """How the pages get models, questions and answers.

    Attributes:
        models: lists the models that can answer.
        compared: looks up a model by its key, with or without retrieval, for a new session.
        questions: the questions of the newest dataset: `held-out` or `training`.
        begin: answers the questions of a session in the background, from where it was. It may be called again.
        progress: what the background does for a session, in a sentence; empty if it has nothing to say.
        judge: the verdicts of the judge of the evaluation on a session's answers, by question.
        bootstrap: intervals, as the evaluation makes them.
    """

    models: Callable[[], Sequence[Model]]
    compared: Callable[[str, bool], Compared]
    questions: Callable[[str], Sequence[Question]]
    begin: Callable[[Comparison], None]
    progress: Callable[[Comparison], str]
    judge: Callable[[Comparison], Mapping[str, str]]
    bootstrap: Bootstrap


class Start(BaseModel):
    """The form of a new comparison. `own` are the reviewer's questions, one for each that the form has."""

    first: str
    first_retrieval: bool = False
    second: str
    second_retrieval: bool = False
    asked: Literal["held-out", "training", "own", "own held-out"]
    count: int = Field(20, ge=1, le=MAX_QUESTIONS)
    seed: int = Field(42, ge=0)
    own: list[_QuestionText] = Field(default_factory=list, max_length=MAX_QUESTIONS)


class Judgement(BaseModel):
    """A verdict on a question, as a reviewer sees the answers."""

    reviewer: Reviewer
    question: str
    choice: Literal["left", "right", "tie", "bad", "written"]
    text: str = Field("", max_length=MAX_ANSWER_CHARS)


class Undo(BaseModel):
    """Who takes a verdict back."""

    reviewer: Reviewer


def add_comparison_pages(app: FastAPI, context: Context, answering: Answering) -> None:
    """Add the pages under `/compare`."""
    folder = context.reviews.folder

    def opened(session: str) -> Comparison:
        found = comparisons.sessions(folder, only=session)
        if not found:
            raise RequestError("There is no such comparison. Choose one of the list, or start a new one.")
        return found[0]

    @app.get("/compare")
    def start_page() -> Response:
        sessions = [_listed(session) for session in reversed(comparisons.sessions(folder))]
        return context.page("compare_start.html", active="compare", sessions=sessions, models=answering.models())

    @app.post("/compare/start")
    def start(form: Start) -> dict[str, Any]:
        if form.asked.startswith("own"):
            held_out = form.asked != "own"
            questions = [own_question(text, f"own question {n}", held_out) for n, text in enumerate(form.own, 1)]
        else:
            questions = comparisons.drawn(answering.questions(form.asked), form.count, form.seed)
        sides = ((form.first, form.first_retrieval), (form.second, form.second_retrieval))
        models = [answering.compared(key, retrieval) for key, retrieval in sides]
        session = comparisons.start(folder, models, questions, form.asked, form.seed)
        answering.begin(session)
        return {"session": session.id}

    @app.get("/compare/{session}")
    def compare_page(session: str) -> Response:
        found = opened(session)
        answering.begin(found)
        return context.page("compare.html", active="compare", session=found)

    @app.get("/compare/{session}/next")
    def next_question(session: str, reviewer: Reviewer) -> dict[str, Any]:
        return _next(opened(session), reviewer, answering)

    @app.post("/compare/{session}/verdict")
    def judge(session: str, judgement: Judgement) -> dict[str, Any]:
        found = opened(session)
        if judgement.question not in found.questions:
            raise RequestError("This comparison has no such question: reload the page.")
        choice: Choice
        if judgement.choice in ("left", "right"):
            swapped = found.is_swapped(judgement.question, judgement.reviewer)
            choice = "first" if (judgement.choice == "left") != swapped else "second"
        else:
            choice = cast("Choice", judgement.choice)
        found.judge(judgement.question, judgement.reviewer, choice, judgement.text if choice == "written" else "")
        return _next(found, judgement.reviewer, answering)

    @app.post("/compare/{session}/undo")
    def undo(session: str, by: Undo) -> dict[str, Any]:
        found = opened(session)
        if found.undo(by.reviewer) is None:
            raise RequestError("There is no verdict of yours to take back.")
        return _next(found, by.reviewer, answering)

    @app.get("/compare/{session}/result")
    def result(session: str, reviewer: Reviewer) -> Response:
        found = opened(session)
        if found.next_question(reviewer) is not None:
            raise RequestError("The names are shown when you have judged all questions of this comparison.")
        names = [model.described for model in found.models]
        values: dict[str, Any] = {
            "session": found,
            "names": names,
            "shares": _shares(found, answering.bootstrap),
            "choices": _choices(found),
            "agreements": agreements(found, {"the judge": judged} if (judged := answering.judge(found)) else {}),
            "rows": [_answers(found, key, names) for key in found.questions],
        }
        return context.page("compare_result.html", active="compare", **values)


def _listed(session: Comparison) -> dict[str, Any]:
    done = Counter(reviewer for _, reviewer in session.verdicts)
    return {"session": session, "done": sorted(done.items()), "total": len(session.questions)}


def _next(session: Comparison, reviewer: str, answering: Answering) -> dict[str, Any]:
    """What a reviewer sees next, without the names of the models. All texts are for `textContent`."""
    key = session.next_question(reviewer)
    total = len(session.questions)
    shown: dict[str, Any] = {
        "done": sum(name == reviewer for _, name in session.verdicts),
        "total": total,
        "answered": sum(map(session.is_answered, session.questions)),
        "progress": answering.progress(session),
        "question": key,
    }
    if key is None or not session.is_answered(key):
        return shown
    sides = [(session.answers[key, model], _cut(session, key, model)) for model in (0, 1)]
    left, right = reversed(sides) if session.is_swapped(key, reviewer) else sides
    prompt = session.questions[key].prompt
    turns = [prompt[0].content] if len(prompt) == 1 else [f"{turn.role}: {turn.content}" for turn in prompt]
    return shown | {
        "prompt": visible("\n\n".join(turns)),
        "left": visible(left[0]),
        "left_cut": left[1],
        "right": visible(right[0]),
        "right_cut": right[1],
    }


def _cut(session: Comparison, key: str, model: int) -> str:
    tokens = session.cuts.get((key, model))
    return "" if tokens is None else f"cut at {tokens} tokens"


def _shares(session: Comparison, bootstrap: Bootstrap) -> list[tuple[str, int, Estimate]]:
    """How often the first model was preferred: for everyone together, and for each reviewer, with the number of questions.

    A question counts once, with the mean over its verdicts.
    """

    def share(reviewers: Sequence[str]) -> Estimate | None:
        scores = [
            [
                SCORES[verdict.choice]
                for (asked, by), verdict in session.verdicts.items()
                if asked == key and by in reviewers
            ]
            for key in session.questions
        ]
        means = [sum(found) / len(found) for found in scores if found]
        return bootstrap.share_won(Rows.of(means)) if means else None

    groups = {"everyone": session.reviewers, **{name: [name] for name in session.reviewers}}
    found = {name: share(reviewers) for name, reviewers in groups.items()}
    return [(name, estimate.n, estimate) for name, estimate in found.items() if estimate is not None]


def _choices(session: Comparison) -> dict[str, Counter[str]]:
    """How often each reviewer chose what."""
    return {
        name: Counter(verdict.choice for (_, by), verdict in session.verdicts.items() if by == name)
        for name in session.reviewers
    }


def _answers(session: Comparison, key: str, names: Sequence[str]) -> dict[str, Any]:
    said = {"first": names[0], "second": names[1], "tie": "tie", "bad": "both bad", "written": "a better answer"}
    question = session.questions[key]
    return {
        "prompt": "\n\n".join(message.content for message in question.prompt),
        "reference": question.reference,
        "answers": [(session.answers.get((key, model), ""), _cut(session, key, model)) for model in (0, 1)],
        "verdicts": [
            (by, said[verdict.choice], verdict.text)
            for (asked, by), verdict in session.verdicts.items()
            if asked == key
        ],
    }
