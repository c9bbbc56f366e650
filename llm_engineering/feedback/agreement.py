"""How often a model's answers were preferred, and how far reviewers agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from llm_engineering.data.rows import folded
from llm_engineering.feedback.comparisons import Choice, Comparison, sessions

# What a verdict gives the first model. A reviewer who wrote a better answer, or found both bad, preferred neither.
SCORES: dict[Choice, float] = {"first": 1.0, "second": 0.0, "tie": 0.5, "bad": 0.5, "written": 0.5}


class JudgedQuestion(NamedTuple):
    """A question on which people compared two models.

    Attributes:
        first, second: the models, by their identities.
        question: `folded` prompt of the question.
        score: the first model's mean score over all verdicts: 1 if everyone preferred it, 0.5 for ties.
    """

    first: str
    second: str
    question: str
    score: float
    verdicts: int

    def of(self, model: str) -> float:
        """The score of one of the two models."""
        return self.score if model == self.first else 1 - self.score


def judged_questions(folder: Path) -> list[JudgedQuestion]:
    """Every question on which two models were compared without retrieval, in all sessions together; one entry for both orders."""
    scores: dict[tuple[str, str, str], list[float]] = {}
    for session in sessions(folder):
        first, second = (model.identity for model in session.models)
        if first == second or any(model.retrieval for model in session.models):
            continue
        for (key, _), verdict in session.verdicts.items():
            question = folded(session.questions[key].prompt)
            score = SCORES[verdict.choice]
            # Sorted, so that it does not matter which model a session names first.
            place = (min(first, second), max(first, second), question)
            scores.setdefault(place, []).append(score if first < second else 1 - score)
    return [JudgedQuestion(*place, sum(found) / len(found), len(found)) for place, found in sorted(scores.items())]


def cohens_kappa(first: Sequence[str], second: Sequence[str]) -> float | None:
    """The agreement of two reviewers on the same questions, corrected for agreement by chance (Cohen 1960).

    Cohen, J. (1960): A coefficient of agreement for nominal scales. Educational and Psychological Measurement 20:37. 1 is full
    agreement, and 0 what chance would give.

    Returns:
        None without a question, and if both always gave the same single verdict, where chance alone would agree too.
    """
    count = len(first)
    if not count:
        return None
    observed = sum(one == other for one, other in zip(first, second, strict=True)) / count
    ours, theirs = Counter(first), Counter(second)
    expected = sum(ours[verdict] * theirs[verdict] for verdict in ours) / count**2
    return None if expected == 1 else (observed - expected) / (1 - expected)


def preferred(choice: Choice) -> str:
    """A verdict for the comparison of reviewers, and with a judge, which cannot write: `first`, `second` or `neither`."""
    return choice if choice in ("first", "second") else "neither"


class Agreement(NamedTuple):
    """The agreement of two judges of a session on the questions that both have judged; `kappa` as `cohens_kappa`."""

    one: str
    other: str
    questions: int
    same: int
    kappa: float | None


def agreements(session: Comparison, others: Mapping[str, Mapping[str, str]]) -> list[Agreement]:
    """The agreement of each two judges of a session: its reviewers, and `others`, e.g. a model.

    Args:
        others: the verdicts of each other judge as `preferred` gives them, by question.
    """
    judges: dict[str, Mapping[str, str]] = {
        name: {key: preferred(v.choice) for (key, by), v in session.verdicts.items() if by == name}
        for name in session.reviewers
    }
    judges |= others
    names = list(judges)
    found = []
    for place, one in enumerate(names):
        for other in names[place + 1 :]:
            both = [key for key in session.questions if key in judges[one] and key in judges[other]]
            ours, theirs = ([judges[name][key] for key in both] for name in (one, other))
            same = sum(a == b for a, b in zip(ours, theirs, strict=True))
            found.append(Agreement(one, other, len(both), same, cohens_kappa(ours, theirs)))
    return found
