"""The exam as sections of a page: the measures of each kind of questions, and every question with every answer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from llm_engineering.evaluation.exam import RETRIEVAL
from llm_engineering.evaluation.statistics import verdict
from llm_engineering.recipe.evaluation_blocks import EXAM_MEASURES
from llm_engineering.reports.page import interval, page, paragraph, table

Report = Mapping[str, Any]
KINDS = {
    "single": "one fact",
    "multi_hop": "two facts",
    "unanswerable": "not in the documents",
    "control": "general",
}
# From and to how many training questions for a fact.
_WORDINGS: tuple[tuple[int, float], ...] = ((0, 0), (1, 1), (2, 3), (4, math.inf))
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
    return paragraph(note) + table(head, rows) + paragraph(clusters, "small") + read + _by_wordings(exam, newest)


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


def _by_wordings(exam: Report, newest: str) -> Markup:
    """The share of right answers by the number of training questions for the fact; nothing if no number is known."""
    rows = []
    for low, high in _WORDINGS:
        found = [row for row in exam["rows"] if row.get("wordings") is not None and low <= row["wordings"] <= high]
        if found:
            right = sum(row["answers"][newest]["right"] for row in found)
            name = str(low) if low == high else f"{low} or more" if high == math.inf else f"{low} to {high}"
            rows.append((name, len(found), f"{right} ({right / len(found):.0%})"))
    if not rows:
        return Markup("")
    note = (
        "Questions on one fact, by the number of different training questions with the same answer that were written from the "
        "documents that state the fact."
    )
    return paragraph(note) + table(["Training questions for the fact", "Exam questions", f"Right, {newest}"], rows)


def exam_questions(exam: Report) -> Markup:
    """Every question, its right answer, and each model's answer, marked right or wrong."""
    rows = []
    for row in exam["rows"]:
        accepted = row["accepted"][0] if row["accepted"] else "(none: the documents do not say)"
        answers = [_marked(row["answers"].get(name)) for name in exam["models"]]
        found = f" Retrieved: {'; '.join(row['retrieved'])}" if row["retrieved"] else ""
        documents = (", ".join(row["documents"]) or "(none)") + "." + found
        rows.append((row["id"], row["question"], KINDS[row["kind"]], accepted, *answers, documents))
    head = ["Id", "Question", "Kind", "Right answer", *exam["models"], "Documents that state it"]
    note = (
        f"Answers are generated greedily, with at most {exam['max_new_tokens']} tokens. Only the first sentence is judged, by "
        "rule. A right answer in other words than the accepted ones counts as wrong."
    )
    return paragraph(note, "small") + table(head, rows)


def exam_page(exam: Report, measures: Mapping[str, Report], newest: str, lead: str) -> str:
    """The exam as a page of its own."""
    sections = [("Measures", exam_summary(exam, measures, newest)), ("Questions", exam_questions(exam))]
    return page("Exam", lead, sections)


def shown_answer(answer: Report) -> str:
    """An answer with its mark, as text."""
    return f"{RIGHT if answer['right'] else WRONG}: {answer['text'] or '(empty)'}"


def drawn_title(exam: Report, newest: str, seed: int) -> str:
    """How the questions of the summary were drawn."""
    first = f"; the first is the first drawn that base fails and {newest} passes" if exam["first_learned"] else ""
    return f"{len(exam['drawn'])} exam questions, drawn with seed {seed}{first}"


def _marked(answer: Report | None) -> str:
    return "(not asked)" if answer is None else shown_answer(answer)


def _value(estimate: Report | None) -> str:
    return "(not asked)" if estimate is None else interval(estimate["value"], estimate["low"], estimate["high"])


def _gain(measure: Report, newest: str) -> tuple[str, ...]:
    if newest == "base":
        return ()
    difference = measure["differences"][f"{newest}-base"]
    shown = interval(difference["value"], difference["low"], difference["high"], sign=True)
    return shown, verdict(difference, measure["better"])
