"""The exam as sections of a page: the measures of each kind of questions, and every question with every answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from markupsafe import Markup

from llm_engineering.evaluation.measures.exam import RETRIEVAL
from llm_engineering.evaluation.statistics import verdict
from llm_engineering.progress import counted
from llm_engineering.recipe.evaluation_blocks import EXAM_MEASURES
from llm_engineering.reports.page import Verdict, cards, details, estimated, marked, page, paragraph, table

Report = Mapping[str, Any]
KINDS = {
    "single": "one fact",
    "multi_hop": "two facts",
    "unanswerable": "not in the documents",
    "control": "general",
}
RIGHT, WRONG = "✓ right", "✗ wrong"
_NOTE = (
    "The exam asks about documents that were trained on, in wordings that were not trained. Held-out rows are about "
    "documents that were not trained on: they measure style and likelihood."
)


def exam_summary(
    exam: Report, measures: Mapping[str, Report], newest: str, trained: Mapping[str, int] | None = None
) -> Markup:
    """What the exam is, and the share of right answers of each model by the kind of questions.

    Args:
        trained: the tokens about the documents that each stage read; None if they are not known.
    """
    note = _NOTE
    if exam["retrieval_passages"]:
        note += (
            f" With {RETRIEVAL}, a model gets the {exam['retrieval_passages']} passages of the documents that BM25 finds for "
            "the question; the other models answer from memory."
        )
    rows = []
    for kind, measure in EXAM_MEASURES.items():
        if measure not in measures:
            continue
        found = measures[measure]
        values = [_value(found["models"].get(name)) for name in exam["models"]]
        rows.append((KINDS[kind], exam["kinds"][kind], found["clusters"], *values, *_gain(found, newest)))
    gains = [f"{newest} minus base", "Verdict"] if newest != "base" else []
    head = ["Questions on", "Questions", "Clusters", *exam["models"], *gains]
    clusters = (
        "Questions about the same fact are one cluster. Intervals resample clusters, because such questions are answered "
        "right or wrong together. A question that the documents do not answer is right if the answer declines."
    )
    read = _against_tokens(measures, newest, trained) if trained else Markup("")
    return paragraph(note) + table(head, rows) + paragraph(clusters, "small") + read


def _against_tokens(measures: Mapping[str, Report], newest: str, trained: Mapping[str, int]) -> Markup:
    """The tokens that training read, with the accuracy that came of them."""
    (first, tokens), *others = trained.items()
    read = f"{tokens:,} tokens about the documents in {first}" + "".join(
        f" and {n:,} in {stage}" for stage, n in others
    )
    total = f", {sum(trained.values()):,} in all" if others else ""
    right, measure = "", measures.get(EXAM_MEASURES["single"])
    if measure:
        right = f", and {newest} answers {measure['models'][newest]['value']:.0%} of the questions on one fact right"
    return paragraph(f"Training read {read}{total}{right}.")


def exam_questions(exam: Report, newest: str) -> Markup:
    """Every question with each model's mark, by kind and by whether the newest model answers it right.

    A group shows its questions on demand, and a question its answers and its right answer. The page would have 300 lines
    otherwise.
    """
    note = (
        f"Answers are generated greedily, with at most {exam['max_new_tokens']} tokens. Only the first sentence is judged, by "
        "rule. A right answer in other words than the accepted ones counts as wrong. Click a group to see its questions, and a "
        "question to see its answers."
    )
    body = paragraph(note, "small")
    for kind, words in KINDS.items():
        for right in (False, True):
            rows = [row for row in exam["rows"] if row["kind"] == kind and row["answers"][newest]["right"] == right]
            if rows:
                title = Markup("{}: {} {}").format(words.capitalize(), len(rows), marked(newest, right))
                body += details(title, Markup("").join(_listed(exam, row) for row in rows))
    return body


def _listed(exam: Report, row: Report) -> Markup:
    marks = Markup("").join(marked(name, answer["right"]) for name, answer in row["answers"].items())
    return details(Markup("{} {}").format(row["question"], marks), question(exam, row))


def model_answer(answer: Report) -> Markup:
    """The text of a model's answer, with a note if it was cut at its maximum length."""
    note = "" if answer["cut"] is None else paragraph(f"cut at {answer['cut']} tokens", "small")
    return paragraph(answer["text"] or "(empty)") + note


def question(exam: Report, row: Report) -> Markup:
    """A question of the exam with the answer of each model, and on demand its right answer and its documents."""
    answers = [
        (marked(name, row["answers"][name]["right"]), model_answer(row["answers"][name]))
        for name in exam["models"]
        if name in row["answers"]
    ]
    found = [f"Retrieved: {'; '.join(row['retrieved'])}"] if row["retrieved"] else []
    lines = [
        "; ".join(row["accepted"]) or "(none: the documents do not say)",
        f"Question {row['id']}, {KINDS[row['kind']]}."
        + (f" Documents that state it: {', '.join(row['documents'])}." if row["documents"] else ""),
        *found,
    ]
    right = details("Right answer", Markup("").join(map(paragraph, lines)))
    return paragraph(row["question"], "question") + cards(answers, "stack") + right


def exam_page(exam: Report, measures: Mapping[str, Report], newest: str, facts: Mapping[str, str]) -> str:
    """The exam as a page of its own. `facts` are those of the model, for the head of the page."""
    right = measures.get(EXAM_MEASURES["single"])
    lead, verdict_shown = [counted(len(exam["rows"]), "question") + "."], None
    if right is not None and newest != "base":
        word = verdict(right["differences"][f"{newest}-base"], right["better"])
        state: Literal["good", "bad", "mixed"] = "good" if word == "better" else "bad" if word == "worse" else "mixed"
        words = f"{word} than" if word in ("better", "worse") else "not significantly different from"
        verdict_shown = Verdict(f"{newest.upper()} is {words} the base model", state)
        shares = ", ".join(f"{name} {estimate['value']:.0%}" for name, estimate in right["models"].items())
        lead.append(f"Right answers to questions about one fact: {shares}.")
    sections = [("Measures", exam_summary(exam, measures, newest)), ("Questions", exam_questions(exam, newest))]
    example = question(exam, exam["rows"][exam["drawn"][0]])
    return page("Exam", lead, sections, facts=facts, verdict=verdict_shown, sample=example)


def shown_answer(answer: Report) -> str:
    """An answer with its mark, as text."""
    return f"{RIGHT if answer['right'] else WRONG}: {answer['text'] or '(empty)'}"


def drawn_title(exam: Report, newest: str, seed: int) -> str:
    """How the questions of the summary were drawn."""
    first = f"; the first is the first drawn that base fails and {newest} passes" if exam["first_learned"] else ""
    return f"{len(exam['drawn'])} exam questions, drawn with seed {seed}{first}"


def _value(estimate: Report | None) -> str:
    return "(not asked)" if estimate is None else estimated(estimate)


def _gain(measure: Report, newest: str) -> tuple[str, ...]:
    if newest == "base":
        return ()
    difference = measure["differences"][f"{newest}-base"]
    shown = estimated(difference, sign=True)
    return shown, verdict(difference, measure["better"])
