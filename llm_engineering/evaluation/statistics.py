"""Bootstrap confidence intervals over rows, paired differences between models, and tables of both."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from llm_engineering.recipe.evaluation_blocks import Measure

# Numbers drawn at once: bounds the memory, whatever the number of rows.
_DRAWN_AT_ONCE = 2_000_000

Floats = NDArray[np.float64]
Transform = Callable[[Any], Any]


class Rows(NamedTuple):
    """What one model did on each row; the measure is the sum of `totals` over the sum of `weights`.

    A mean over rows has weights of 1; a loss a token has a row's tokens as its weight.
    """

    totals: Floats
    weights: Floats

    @classmethod
    def of(cls, totals: Sequence[float] | Floats, weights: Sequence[float] | Floats | None = None) -> Rows:
        """From plain numbers; without weights, each row weighs the same."""
        sums = np.asarray(totals, dtype=np.float64)
        return cls(sums, np.ones_like(sums) if weights is None else np.asarray(weights, dtype=np.float64))

    @property
    def value(self) -> float:
        """The measure on these rows."""
        return float(self.totals.sum() / self.weights.sum())


class Estimate(NamedTuple):
    """A measure on `n` rows with its interval, which is None where one row says nothing about others."""

    value: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Bootstrap:
    """Percentile intervals over `resamples` draws of the rows (Efron and Tibshirani 1993, chapter 13).

    Percentiles alone are too narrow on few rows: the normal quantile that they stand for is replaced by the t quantile
    on n - 1 degrees of freedom, times sqrt(n / (n - 1)) (the expanded interval of Hesterberg 2015,
    arXiv:1411.5279). The seed alone decides which rows are drawn: the same ones for every model.
    """

    resamples: int
    confidence: float
    seed: int

    def estimate(self, rows: Rows, transform: Transform | None = None) -> Estimate:
        """A model's measure. `transform` is applied to the ratio, e.g. `np.exp` for perplexity."""

        def statistic(totals: Floats, weights: Floats, axis: int = -1) -> Floats:
            return _ratio(totals, weights, transform, axis)

        return self._interval(rows, statistic)

    def difference(self, first: Rows, second: Rows, transform: Transform | None = None) -> Estimate:
        """The first model's measure minus the second's; both on the same rows, in the same order."""

        def statistic(*parts: Floats, axis: int = -1) -> Floats:
            return _ratio(parts[0], parts[1], transform, axis) - _ratio(parts[2], parts[3], transform, axis)

        return self._interval((*first, *second), statistic)

    def _interval(self, parts: Sequence[Floats], statistic: Callable[..., Floats]) -> Estimate:
        n = len(parts[0])
        value = float(statistic(*parts))
        if n == 1:
            return Estimate(value, None, None, n)
        expanded = stats.t.ppf((1 - self.confidence) / 2, n - 1) * math.sqrt(n / (n - 1))
        found = stats.bootstrap(
            parts,
            statistic,
            n_resamples=self.resamples,
            batch=max(1, _DRAWN_AT_ONCE // n),
            vectorized=True,
            paired=True,
            confidence_level=float(1 - 2 * stats.norm.cdf(expanded)),
            method="percentile",
            rng=np.random.default_rng(self.seed),
        ).confidence_interval
        return Estimate(value, float(found.low), float(found.high), n)


def _ratio(totals: Floats, weights: Floats, transform: Transform | None, axis: int) -> Floats:
    ratio: Floats = totals.sum(axis=axis) / weights.sum(axis=axis)
    if transform is None:
        return ratio
    # The exponential of a loss that has exploded is infinite, and that is what it says.
    with np.errstate(over="ignore"):
        transformed: Floats = transform(ratio)
        return transformed


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
