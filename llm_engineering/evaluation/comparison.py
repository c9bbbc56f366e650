"""Every measure of every model with its interval, and what sets the newest model apart from the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from llm_engineering.config_evaluation import Measure
from llm_engineering.evaluation.statistics import Bootstrap, Estimate, Rows, Transform

# What is made of the ratio of sums that a measure otherwise is.
TRANSFORMS: dict[str, Transform] = {"perplexity": np.exp}


def compare(
    what: Measure, rows: Mapping[str, Rows], newest: str, bootstrap: Bootstrap, transform: Transform | None = None
) -> dict[str, Any]:
    """A measure as the evaluation report holds it.

    Args:
        rows: by model; they are the same for every model.
        newest: the model whose differences to all others are given, as `dpo-base` for `dpo` minus `base`.
    """
    models = {name: bootstrap.estimate(values, transform) for name, values in rows.items()}
    differences = {
        f"{newest}-{name}": bootstrap.difference(rows[newest], values, transform)
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
