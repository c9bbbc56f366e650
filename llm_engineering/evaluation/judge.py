"""A model judges the newest model's answers against each other model's, in both orders."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from llm_engineering.errors import WorkError
from llm_engineering.evaluation.statistics import Bootstrap, Rows, entry
from llm_engineering.generation.types import Answer, Client, Failure, Messages, Sampling
from llm_engineering.recipe.evaluation_blocks import MEASURES

PROMPT_FILE = Path(__file__).parent / "prompts" / "judge.txt"
JSON_FIELD = "verdict"
Outcome = Literal["won", "lost", "tie", "unparsable"]
# A verdict that cannot be read speaks for neither, and still counts.
_SCORES: dict[Outcome, float] = {"won": 1.0, "tie": 0.5, "unparsable": 0.5, "lost": 0.0}
_VERDICT = re.compile(r"\W*(a|b|tie)\W*", re.IGNORECASE)


class Question(NamedTuple):
    """What was asked, and the reference answer."""

    question: str
    reference: str


class Duel(NamedTuple):
    """The newest model against another, row by row: its outcome as answer A, and as answer B."""

    outcomes: list[tuple[Outcome, Outcome]]
    unparsable: Counter[str]

    @property
    def scores(self) -> Rows:
        """A row's mean over both orders: 1 for two verdicts won, 0 for two lost."""
        return Rows.of([(_SCORES[first] + _SCORES[second]) / 2 for first, second in self.outcomes])

    @property
    def agreement(self) -> float:
        """Share of rows whose two orders came to the same verdict; one that cannot be read agrees with none."""
        same = [first == second != "unparsable" for first, second in self.outcomes]
        return sum(same) / len(same)


def judge(
    questions: Sequence[Question],
    answers: Mapping[str, Sequence[str]],
    newest: str,
    client: Client,
    max_new_tokens: int,
    bootstrap: Bootstrap,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Let the client judge every row twice against each other model, at temperature 0.

    Judges favour a place, often the first (Zheng et al. 2023, arXiv:2306.05685): hence both orders.

    Args:
        answers: texts by model, in the questions' order.

    Returns:
        What the report says of the judge, and the measure `judge_win_rate`: a model's share won (a tie is half a win),
        and as difference the share won minus the share lost.

    Raises:
        WorkError: the endpoint refuses, or a cap is reached; what was answered is stored.
    """
    duels = _duels(questions, answers, newest, client, Sampling(max_new_tokens, 0.0, bootstrap.seed))
    names = list(duels)
    won = {name: duels[name].scores for name in names}
    shares = {name: 1 - won[name].totals for name in names}
    shares[newest] = np.mean([won[name].totals for name in names], axis=0)
    scores = {name: bootstrap.estimate(Rows.of(shares[name])) for name in answers}
    net = {f"{newest}-{name}": bootstrap.estimate(Rows.of(2 * won[name].totals - 1)) for name in names}
    found = {
        "model": client.identity,
        "prompt_hash": hashlib.sha256(PROMPT_FILE.read_bytes()).hexdigest()[:12],
        "seed": bootstrap.seed,
        "temperature": 0,
        "duels": {
            f"{newest}-{name}": {
                "rows": len(duel.outcomes),
                "verdicts": _counts(duel),
                "unparsable": dict(duel.unparsable),
                "agreement": duel.agreement,
                "win_rate": bootstrap.estimate(duel.scores)._asdict(),
                "outcomes": duel.outcomes,
            }
            for name, duel in duels.items()
        },
    }
    return found, entry(MEASURES["judge_win_rate"], scores, net)


def _duels(
    questions: Sequence[Question],
    answers: Mapping[str, Sequence[str]],
    newest: str,
    client: Client,
    sampling: Sampling,
) -> dict[str, Duel]:
    others = [name for name in answers if name != newest]
    prompt = PROMPT_FILE.read_text(encoding="utf-8").strip()

    def request(row: int, first: str, second: str) -> Messages:
        texts = {"first": answers[first][row], "second": answers[second][row]}
        return [{"role": "user", "content": prompt.format(**questions[row]._asdict(), **texts)}]

    rows = range(len(questions))
    requests = [request(row, *order) for name in others for row in rows for order in ((newest, name), (name, newest))]
    if client.writes_json:
        sampling = Sampling(sampling.max_new_tokens, sampling.temperature, sampling.seed, json_field=JSON_FIELD)
    try:
        verdicts = iter(client.answer(requests, sampling, "verdicts"))
    except WorkError as error:
        raise WorkError(f"evaluation.judge, whose keys are those of generation: {error}") from error
    duels = {}
    for name in others:
        duel = Duel([], Counter())
        for _ in rows:
            first, second = (_outcome(next(verdicts), place, duel.unparsable) for place in ("a", "b"))
            duel.outcomes.append((first, second))
        duels[name] = duel
    return duels


def _outcome(verdict: Answer | Failure, place: str, unparsable: Counter[str]) -> Outcome:
    """The outcome for the newest model, whose answer stood at `place`, `a` or `b`."""
    if isinstance(verdict, Failure):
        unparsable[verdict.reason] += 1
        return "unparsable"
    match = _VERDICT.fullmatch(verdict.text)
    if match is None:
        unparsable["no_verdict"] += 1
        return "unparsable"
    said = match[1].lower()
    return "tie" if said == "tie" else "won" if said == place else "lost"


def _counts(duel: Duel) -> dict[Outcome, int]:
    counts = Counter(outcome for both in duel.outcomes for outcome in both)
    return {name: counts[name] for name in _SCORES}
