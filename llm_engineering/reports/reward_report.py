"""The parts of the page about a reward model: how well it orders held-out pairs, and the rewards themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from llm_engineering.evaluation.statistics import verdict
from llm_engineering.progress import counted
from llm_engineering.recipe.evaluation_blocks import REWARD_MEASURE
from llm_engineering.reports.page import (
    Verdict,
    cards,
    details,
    estimated,
    interval_bars,
    line_chart,
    marked,
    paragraph,
)

Report = Mapping[str, Any]
_BINS = 20


class Parts(NamedTuple):
    """What the page of an evaluation shows beside the training and the rules of the gate.

    Attributes:
        found: what the measures say, if the gate has not judged the model.
        sections: those after the rules of the gate.
    """

    title: str
    lead: list[str]
    found: Verdict
    measures: Markup
    sections: list[tuple[str, Markup]]
    sample: Markup | None


def reward_parts(data: Report) -> Parts:
    """The parts of a report of `evaluate_reward`."""
    measure, newest = data["measures"][REWARD_MEASURE], data["newest"]
    bars = {
        "chance" if name != newest else name: (e["value"], e["low"], e["high"]) for name, e in measure["models"].items()
    }
    note = (
        f"The bracket is a {data['confidence']:.0%} interval over documents, or over pairs that name no document. A model that "
        "orders the pairs at random reaches 0.5."
    )
    charts = [
        ("Pairs in the right order", interval_bars(bars, measure["unit"]) + paragraph(note, "small")),
        ("Rewards", _distribution(data["rewards"])),
    ]
    word = verdict(measure["differences"][f"{newest}-base"], measure["better"])
    found = Verdict("Better than chance", "good") if word == "better" else Verdict("Not better than chance", "bad")
    sample = _pair(data["pairs"][0]) if data["pairs"] else None
    pairs = [("Pairs", _pairs(data["pairs"]))]
    return Parts("Evaluation report: reward model", [_lead(data)], found, cards(charts), pairs, sample)


def _lead(data: Report) -> str:
    measure = data["measures"][REWARD_MEASURE]
    found, above = measure["models"][data["newest"]], measure["differences"][f"{data['newest']}-base"]
    word = {"better": "more often than", "worse": "less often than"}.get(
        verdict(above, measure["better"]), "not significantly more often than"
    )
    shown = estimated(found)
    return (
        f"Of {counted(data['heldout_pairs'], 'held-out pair')}, the reward model gives the chosen answer the higher reward in a "
        f"share of {shown}, {word} by chance."
    )


def _distribution(rewards: Mapping[str, Sequence[float]]) -> Markup:
    """The number of answers by their reward, for chosen and rejected answers."""
    low, high = (end(end(values) for values in rewards.values()) for end in (min, max))
    width = (high - low) / _BINS or 1.0
    curves = {}
    for name, values in rewards.items():
        places = [min(_BINS - 1, int((value - low) / width)) for value in values]
        curves[name] = [(low + (place + 0.5) * width, float(places.count(place))) for place in range(_BINS)]
    return line_chart(curves, "reward", "answers")


def _pairs(pairs: Sequence[Report]) -> Markup:
    note = "The first held-out pairs. A reward has no unit: only the difference of two answers to a prompt means something."
    shown = [
        details(
            Markup("{} {}").format(
                pair["prompt"], marked("in order", pair["chosen"]["reward"] > pair["rejected"]["reward"])
            ),
            _pair(pair),
        )
        for pair in pairs
    ]
    return paragraph(note, "small") + Markup("").join(shown)


def _pair(pair: Report) -> Markup:
    answers = [
        (f"{name}: {pair[name]['reward']:+.2f}", paragraph(pair[name]["text"])) for name in ("chosen", "rejected")
    ]
    return paragraph(pair["prompt"], "question") + cards(answers, "stack")
