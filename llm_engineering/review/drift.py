"""Finds what people ask a served model that the documents do not cover."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from llm_engineering.documents.passages import Passage
from llm_engineering.evaluation.measures.exam import best_scores
from llm_engineering.feedback.served import Asked

# Of questions that are written from the documents, this many percent count as not covered. For the embedded handbook, 61 % of
# 500 general questions do.
PERCENTILE = 5


class Covered(NamedTuple):
    """What the documents cover: all their passages, and questions that were written from them and held out."""

    passages: Sequence[Passage]
    heldout: Sequence[str]


class Uncovered(NamedTuple):
    """A question that the documents do not cover.

    Attributes:
        asked: how often.
        score: the BM25 score of the best passage.
    """

    question: str
    asked: int
    score: float


class Drift(NamedTuple):
    """What is asked, compared with what the documents cover.

    Attributes:
        limit: the score below which a question is not covered.
        uncovered: the questions below it, the most frequent first, and of equally frequent ones the lowest score.
        asked: the number of different questions.
        requests: how often they were asked.
    """

    limit: float
    uncovered: list[Uncovered]
    asked: int
    requests: int


def find_drift(asked: Asked, covered: Covered) -> Drift:
    """Compare each question's best passage with the best passages of held-out questions.

    Args:
        asked: at least one question.
        covered: at least one passage and one held-out question.
    """
    texts = list(asked.questions)
    scores = best_scores([*covered.heldout, *texts], covered.passages)
    limit = float(np.percentile(scores[: len(covered.heldout)], PERCENTILE))
    found = [
        Uncovered(text, asked.questions[text], score)
        for text, score in zip(texts, scores[len(covered.heldout) :], strict=True)
        if score < limit
    ]
    found.sort(key=lambda one: (-one.asked, one.score))
    return Drift(limit, found, len(texts), sum(asked.questions.values()))
