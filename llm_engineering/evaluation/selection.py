"""What the best of several trials shows: how low the lowest of n losses lies by chance."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from scipy import integrate, stats

CONFIDENCE = 0.95


@cache
def expected_lowest(n: int) -> float:
    """How many standard deviations the lowest of n normal values lies below their mean, on average.

    This is the mean of the largest order statistic (Tippett 1925, Biometrika 17:364): 0 for one value, 0.56 for two, 1.87
    for twenty.
    """

    def density(z: float) -> float:
        return float(z * n * stats.norm.pdf(z) * stats.norm.cdf(z) ** (n - 1))

    value: float = integrate.quad(density, -np.inf, np.inf)[0]
    return value


def by_chance(trials: int, repeats: Sequence[float]) -> dict[str, Any]:
    """What the lowest loss of as many runs of one recipe would be, if they differed in nothing but the seed.

    Selection favours trials with a lucky seed, so the lowest loss of a sweep is too good (Dodge et al. 2019,
    arXiv:1909.03004; Bouthillier et al. 2021, arXiv:2103.03098). The repeats were not selected: their mean is an unbiased
    loss of the winner's recipe, and their spread is the noise of its training. Another run of it lies from `low` to `high` with
    95 % confidence.

    Args:
        trials: the number of trials that the lowest was chosen from.
        repeats: the validation losses of the winner's recipe with other seeds, at least two.
    """
    mean, spread, count = statistics.fmean(repeats), statistics.stdev(repeats), len(repeats)
    # The prediction interval of one more run: its own noise, and that of the mean.
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * spread * math.sqrt(1 + 1 / count)
    return {
        "trials": trials,
        "repeats": count,
        "mean": mean,
        "spread": spread,
        "lowest": mean - spread * expected_lowest(trials),
        "low": mean - half,
        "high": mean + half,
    }


def validation_loss(summary: Mapping[str, Any]) -> float:
    """The validation loss of the model that a training has kept, from its summary: the last one, or with `load_best` the best."""
    losses = [float(entry["eval_loss"]) for entry in summary["history"] if "eval_loss" in entry]
    return min(losses) if summary["config"]["load_best"] else losses[-1]
