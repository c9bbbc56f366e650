"""Has a judge model compare the newest model's answers with those of each other model, in both orders."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from llm_engineering.data.rows import InstructionRow
from llm_engineering.errors import WorkError
from llm_engineering.evaluation.measures.exam import by_document
from llm_engineering.evaluation.statistics import Bootstrap, Floats, Rows, entry
from llm_engineering.generation.types import Answer, Client, Failure, Messages, Sampling
from llm_engineering.recipe.evaluation_blocks import MEASURES

PROMPT_FILE = Path(__file__).parent / "prompts" / "judge.txt"
JSON_FIELD = "verdict"
Outcome = Literal["won", "lost", "tie", "unparsable"]
# An unparsable verdict counts as a tie.
_SCORES: dict[Outcome, float] = {"won": 1.0, "tie": 0.5, "unparsable": 0.5, "lost": 0.0}
_VERDICT = re.compile(r"\W*(a|b|tie)\W*", re.IGNORECASE)


class Duel(NamedTuple):
    """The newest model against one other model.

    Attributes:
        outcomes: for each row, the newest model's outcome as answer A and as answer B.
        unparsable: number of unparsable verdicts by reason.
    """

    outcomes: list[tuple[Outcome, Outcome]]
    unparsable: Counter[str]

    @property
    def scores(self) -> Rows:
        """Each row's mean score over both orders: 1 for two wins, 0 for two losses."""
        return Rows.of([(_SCORES[first] + _SCORES[second]) / 2 for first, second in self.outcomes])

    @property
    def agreement(self) -> float:
        """Share of rows with the same outcome in both orders. An unparsable verdict never agrees."""
        same = [first == second != "unparsable" for first, second in self.outcomes]
        return sum(same) / len(same)


def judge(
    rows: Sequence[InstructionRow],
    answers: Mapping[str, Sequence[str]],
    newest: str,
    client: Client,
    max_new_tokens: int,
    bootstrap: Bootstrap,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Have the client judge every row in both orders, for each model that the newest is compared with.

    Both orders are needed because judges prefer a position, often the first (Zheng et al. 2023, arXiv:2306.05685).
    The temperature is 0.

    Args:
        answers: each model's answers by its name, in the order of the rows.

    Returns:
        The report's `judge`, and the measure `judge_win_rate`: each model's share of wins (a tie is half a win), and
        as differences the share of wins minus the share of losses.

    Raises:
        WorkError: the endpoint refuses the requests, or a cap is reached. Verdicts received so far are stored.
    """
    duels = _duels(rows, answers, newest, client, Sampling(max_new_tokens, 0.0, bootstrap.seed))
    documents = by_document(rows)
    wins = {name: duel.scores.totals for name, duel in duels.items()}
    report = {
        "model": client.identity,
        "prompt_hash": hashlib.sha256(PROMPT_FILE.read_bytes()).hexdigest()[:12],
        "seed": bootstrap.seed,
        "temperature": 0,
        "duels": {
            f"{newest}-{name}": {
                "rows": len(duel.outcomes),
                "verdicts": {name: sum(pair.count(name) for pair in duel.outcomes) for name in _SCORES},
                "unparsable": dict(duel.unparsable),
                "agreement": duel.agreement,
                "win_rate": bootstrap.share_won(duel.scores.in_clusters(documents))._asdict(),
                "outcomes": duel.outcomes,
            }
            for name, duel in duels.items()
        },
    }
    return report, win_rate("judge_win_rate", wins, newest, documents, bootstrap)


def win_rate(
    measure: str, wins: Mapping[str, Floats], newest: str, documents: Sequence[int], bootstrap: Bootstrap
) -> dict[str, Any]:
    """A measure's entry in the report: each model's share of wins, and as differences the share of wins minus that of losses.

    The share of the newest model is the mean over all models that it is compared with.

    Args:
        wins: for each other model by its name, the newest model's result on each row: 1 for a win, 0.5 for a tie, else 0.
        documents: the number of each row's document.
    """
    shares = {name: 1 - won for name, won in wins.items()} | {newest: np.mean(list(wins.values()), axis=0)}
    rows = {name: Rows.of(share).in_clusters(documents) for name, share in shares.items()}
    net = {
        f"{newest}-{name}": bootstrap.difference(Rows.of(won).in_clusters(documents), rows[name])
        for name, won in wins.items()
    }
    return entry(MEASURES[measure], {name: bootstrap.share_won(found) for name, found in rows.items()}, net)


def _duels(
    rows: Sequence[InstructionRow],
    answers: Mapping[str, Sequence[str]],
    newest: str,
    client: Client,
    sampling: Sampling,
) -> dict[str, Duel]:
    others = [name for name in answers if name != newest]
    prompt = PROMPT_FILE.read_text(encoding="utf-8").strip()

    def request(row: int, first: str, second: str) -> Messages:
        turns = rows[row].prompt
        texts = {
            # All turns of a conversation, with their roles.
            "question": "\n\n".join(f"{turn.role}: {turn.content}" for turn in turns)
            if turns[1:]
            else turns[0].content,
            "reference": rows[row].completion[0].content,
            "first": answers[first][row],
            "second": answers[second][row],
        }
        return [{"role": "user", "content": prompt.format(**texts)}]

    requests = [
        request(row, *order)
        for name in others
        for row in range(len(rows))
        for order in ((newest, name), (name, newest))
    ]
    if client.writes_json:
        sampling = Sampling(sampling.max_new_tokens, sampling.temperature, sampling.seed, json_field=JSON_FIELD)
    try:
        verdicts = iter(client.answer(requests, sampling, "verdicts"))
    except WorkError as error:
        raise WorkError(f"evaluation.judge (read generation.* as evaluation.judge.*): {error}") from error
    duels = {}
    for name in others:
        duel = Duel([], Counter())
        for _ in rows:
            first, second = (_outcome(next(verdicts), position, duel.unparsable) for position in ("a", "b"))
            duel.outcomes.append((first, second))
        duels[name] = duel
    return duels


def _outcome(verdict: Answer | Failure, position: str, unparsable: Counter[str]) -> Outcome:
    """The outcome for the newest model, whose answer was at `position` `a` or `b`. Counts unparsable verdicts."""
    if isinstance(verdict, Failure):
        unparsable[verdict.reason] += 1
        return "unparsable"
    match = _VERDICT.fullmatch(verdict.text)
    if match is None:
        unparsable["no_verdict"] += 1
        return "unparsable"
    better = match[1].lower()
    return "tie" if better == "tie" else "won" if better == position else "lost"
