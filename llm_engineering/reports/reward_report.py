"""The evaluation report of a reward model as a page: how well it orders held-out pairs, and the rewards themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from llm_engineering.evaluation.statistics import verdict
from llm_engineering.progress import counted
from llm_engineering.recipe.evaluation_blocks import REWARD_MEASURE
from llm_engineering.reports.page import NARROW_INCHES, cards, interval, interval_bars, line_chart, page, paragraph
from llm_engineering.reports.training_report import training_charts

Report = Mapping[str, Any]
_BINS = 20


def reward_page(data: Report, training: Report | None) -> str:
    """The whole page.

    Args:
        data: the report as JSON (`evaluate_reward`).
        training: the training report of the reward model, if there is one.
    """
    measure, newest = data["measures"][REWARD_MEASURE], data["newest"]
    bars = {
        "chance" if name != newest else name: (e["value"], e["low"], e["high"]) for name, e in measure["models"].items()
    }
    note = (
        f"The bracket is a {data['confidence']:.0%} interval over documents, or over pairs that name no document. A model that "
        "orders the pairs at random reaches 0.5."
    )
    sections = [
        ("Pairs in the right order", paragraph(note, "small") + interval_bars(bars, measure["unit"])),
        ("Rewards", _distribution(data["rewards"])),
    ]
    if training is not None:
        sections.append(
            (f"Training of {training['stage']}", cards(training_charts(training["history"], NARROW_INCHES)))
        )
    sections.append(("Pairs", _pairs(data["pairs"])))
    return page("Evaluation report: reward model", _lead(data), sections)


def _lead(data: Report) -> str:
    measure = data["measures"][REWARD_MEASURE]
    found, above = measure["models"][data["newest"]], measure["differences"][f"{data['newest']}-base"]
    word = {"better": "more often than", "worse": "less often than"}.get(
        verdict(above, measure["better"]), "not significantly more often than"
    )
    shown = interval(found["value"], found["low"], found["high"])
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
    body = paragraph(note, "small")
    for number, pair in enumerate(pairs, 1):
        answers = [
            (f"{name}: {pair[name]['reward']:+.2f}", paragraph(pair[name]["text"])) for name in ("chosen", "rejected")
        ]
        body += Markup("<p><strong>{}. {}</strong></p>{}").format(number, pair["prompt"], cards(answers, "answers"))
    return body
