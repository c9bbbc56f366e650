"""The page *Drift*: what people ask a served model that the documents do not cover, and a file of these questions."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from fastapi import FastAPI
from fastapi.responses import Response

from llm_engineering.evaluation.measures.exam import best_scores
from llm_engineering.feedback.served import AskedQuestions, asked_questions
from llm_engineering.review.site import Context, Covered, paged

ROWS = 100
# Of questions that are written from the documents, this many percent count as not covered. For the embedded handbook, 61 % of
# 500 general questions do.
PERCENTILE = 5


class Drift(NamedTuple):
    """What is asked and not covered.

    Attributes:
        limit: the score below which a question is not covered.
        uncovered: the questions below it, with how often each was asked and the BM25 score of its best passage. The most
            frequent is the first, and of equally frequent ones that with the lowest score.
    """

    limit: float
    uncovered: list[tuple[str, int, float]]


def find_drift(asked: AskedQuestions, covered: Covered) -> Drift:
    """Compare each question's best passage with the best passages of held-out questions.

    Args:
        covered: at least one passage and one held-out question.
    """
    scores = best_scores([*covered.heldout, *asked.questions], covered.passages)
    limit = float(np.percentile(scores[: len(covered.heldout)], PERCENTILE))
    scored = zip(asked.questions.items(), scores[len(covered.heldout) :], strict=True)
    found = [(question, times, score) for (question, times), score in scored if score < limit]
    return Drift(limit, sorted(found, key=lambda one: (-one[1], one[2])))


def add_drift_page(app: FastAPI, context: Context) -> None:
    """Add the page `/drift`, and its list as `/drift/questions.txt`."""
    reviews = context.reviews

    @lru_cache(maxsize=1)
    def compared(_: tuple[tuple[str, int], ...]) -> tuple[AskedQuestions, Drift | None]:
        asked = asked_questions(reviews.served)
        return asked, find_drift(asked, reviews.read_covered()) if asked.questions else None

    def newest() -> tuple[AskedQuestions, Drift | None]:
        # The log only grows, so its files and their sizes say whether there is more to compare.
        files = sorted(reviews.served.glob("*.jsonl"))
        return compared(tuple((file.name, file.stat().st_size) for file in files))

    @app.get("/drift")
    def drift(page_number: int = 1) -> Response:
        asked, found = newest()
        uncovered = found.uncovered if found is not None else []
        number, pages = paged(len(uncovered), ROWS, page_number)
        return context.page(
            "drift.html",
            active="drift",
            asked=asked,
            found=found,
            rows=uncovered[(number - 1) * ROWS :][:ROWS],
            number=number,
            pages=pages,
            percentile=PERCENTILE,
        )

    @app.get("/drift/questions.txt")
    def as_text() -> Response:
        _, found = newest()
        lines = [f"{' '.join(question.split())}\n" for question, _, _ in (found.uncovered if found else [])]
        # Not shown in the browser: the text is what anybody asked.
        headers = {"Content-Disposition": 'attachment; filename="questions.txt"'}
        content = "".join(lines).encode("utf-8", "replace")
        return Response(content, media_type="text/plain; charset=utf-8", headers=headers)
