"""Every measure of every model with its interval, and what sets the newest model apart from the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from llm_engineering.evaluation.statistics import Bootstrap, Estimate, Rows, Transform


class Measure(NamedTuple):
    """What a measure is called, in which unit, and which way is better; None where neither is."""

    title: str
    unit: str
    better: Literal["lower", "higher"] | None
    transform: Transform | None = None


MEASURES = {
    "heldout_loss": Measure("Held-out loss", "nats a token", "lower"),
    "perplexity": Measure("Perplexity", "per token", "lower", np.exp),
    "preference_accuracy": Measure("Preference accuracy", "share of pairs", "higher"),
    "preference_margin": Measure("Preference margin", "nats a token", "higher"),
    "rouge_l": Measure("ROUGE-L against the reference", "F1", "higher"),
    "stopped": Measure("Answers that end by themselves", "share of answers", "higher"),
    "repetition": Measure("Repeated 4-grams", "share of an answer", "lower"),
    "length_ratio": Measure("Length against the reference", "ratio of tokens", None),
    "empty": Measure("Empty answers", "share of answers", "lower"),
    "checks": Measure("Own check", "share passed", "higher"),
    "judge_win_rate": Measure("Judge", "share won", "higher"),
}


def compare(what: Measure, rows: Mapping[str, Rows], newest: str, bootstrap: Bootstrap) -> dict[str, Any]:
    """A measure as the evaluation report holds it.

    Args:
        rows: by model; they are the same for every model.
        newest: the model whose differences to all others are given, as `dpo-base` for `dpo` minus `base`.
    """
    models = {name: bootstrap.estimate(values, what.transform) for name, values in rows.items()}
    differences = {
        f"{newest}-{name}": bootstrap.difference(rows[newest], values, what.transform)
        for name, values in rows.items()
        if name != newest
    }
    return entry(what, models, differences)


def entry(what: Measure, models: Mapping[str, Estimate], differences: Mapping[str, Estimate]) -> dict[str, Any]:
    """One measure as the evaluation report holds it."""
    return {
        "title": what.title,
        "unit": what.unit,
        "better": what.better,
        "models": {name: estimate._asdict() for name, estimate in models.items()},
        "differences": {name: estimate._asdict() for name, estimate in differences.items()},
    }


def flat(measures: Mapping[str, Any]) -> dict[str, float]:
    """The values alone, as `measure_model`."""
    return {
        f"{key}_{name}": estimate["value"]
        for key, found in measures.items()
        for name, estimate in found["models"].items()
    }


def verdict(difference: Mapping[str, Any], better: str | None) -> str:
    """What a difference amounts to, in words: only an interval without 0 tells models apart."""
    low, high = difference["low"], difference["high"]
    if low is None or not (low > 0 or high < 0):
        return "not told apart"
    if better is None:
        return "higher" if low > 0 else "lower"
    return "better" if (low > 0) == (better == "higher") else "worse"
