"""Bootstrap confidence intervals over rows or clusters of rows, and paired differences between models, as the report holds them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from llm_engineering.recipe.evaluation_blocks import Measure

# Row indices that are resampled at once. 2 million indices of 8 bytes take 16 MB, whatever the number of rows.
_RESAMPLED_AT_ONCE = 2_000_000

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Transform = Callable[[Any], Any]


class Rows(NamedTuple):
    """One model's values on each row. The measure is the sum of `totals` divided by the sum of `weights`.

    For a mean over rows every weight is 1; for a loss per token a row's weight is its number of tokens.

    Attributes:
        clusters: the number of each row's cluster; None if every row is one of its own. Rows of a cluster are not
            independent, e.g. questions about the same document, so a resample has all rows of a cluster or none.
    """

    totals: Floats
    weights: Floats
    clusters: Integers | None = None

    @classmethod
    def of(
        cls,
        totals: Sequence[float] | Floats,
        weights: Sequence[float] | Floats | None = None,
    ) -> Rows:
        """Make rows from numbers. Without weights, every row has weight 1."""
        values = np.asarray(totals, dtype=np.float64)
        return cls(values, np.ones_like(values) if weights is None else np.asarray(weights, dtype=np.float64))

    def in_clusters(self, clusters: Sequence[int]) -> Rows:
        """The same rows with the number of each row's cluster."""
        return self._replace(clusters=np.asarray(clusters, dtype=np.int64))

    @property
    def units(self) -> tuple[Floats, Floats]:
        """The totals and the weights of what is resampled: of each cluster the sums over its rows."""
        if self.clusters is None:
            return self.totals, self.weights
        _, places = np.unique(self.clusters, return_inverse=True)
        totals, weights = np.zeros(places.max() + 1), np.zeros(places.max() + 1)
        np.add.at(totals, places, self.totals)
        np.add.at(weights, places, self.weights)
        return totals, weights

    @property
    def value(self) -> float:
        """The measure over all rows."""
        return float(self.totals.sum() / self.weights.sum())


class Estimate(NamedTuple):
    """A measure over `n` rows, with the ends of its interval; they are None if there is only one row or cluster."""

    value: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Bootstrap:
    """Percentile intervals over `resamples` resamples of the rows (Efron and Tibshirani 1993, chapter 13).

    Rows in clusters are resampled by cluster (Davison and Hinkley 1997, section 3.8); n is then the number of clusters.
    Plain percentile intervals are too narrow for few rows. They correspond to normal quantiles, which are replaced here
    by t quantiles with n - 1 degrees of freedom, times sqrt(n / (n - 1)) (the expanded interval of Hesterberg 2015,
    arXiv:1411.5279). Only the seed decides which rows a resample has, so it has the same rows for every model.
    """

    resamples: int
    confidence: float
    seed: int

    def estimate(self, rows: Rows, transform: Transform | None = None) -> Estimate:
        """Estimate a model's measure. `transform` is applied to the ratio, e.g. `np.exp` for perplexity."""
        return self._interval(rows.units, partial(_ratio, transform=transform), len(rows.totals))

    def difference(self, first: Rows, second: Rows, transform: Transform | None = None) -> Estimate:
        """Estimate the first model's measure minus the second's. Both have the same rows and clusters in the same order."""

        def statistic(*parts: Floats, axis: int = -1) -> Floats:
            return _ratio(parts[0], parts[1], axis, transform) - _ratio(parts[2], parts[3], axis, transform)

        return self._interval((*first.units, *second.units), statistic, len(first.totals))

    def _interval(self, parts: Sequence[Floats], statistic: Callable[..., Floats], rows: int) -> Estimate:
        n = len(parts[0])
        value = float(statistic(*parts))
        if n == 1:
            return Estimate(value, None, None, rows)
        expanded = stats.t.ppf((1 - self.confidence) / 2, n - 1) * math.sqrt(n / (n - 1))
        interval = stats.bootstrap(
            parts,
            statistic,
            n_resamples=self.resamples,
            batch=max(1, _RESAMPLED_AT_ONCE // n),
            vectorized=True,
            paired=True,
            confidence_level=float(1 - 2 * stats.norm.cdf(expanded)),
            method="percentile",
            rng=np.random.default_rng(self.seed),
        ).confidence_interval
        return Estimate(value, float(interval.low), float(interval.high), rows)


def _ratio(totals: Floats, weights: Floats, axis: int = -1, transform: Transform | None = None) -> Floats:
    ratio: Floats = totals.sum(axis=axis) / weights.sum(axis=axis)
    if transform is None:
        return ratio
    # The perplexity of a diverged model is infinite. It is reported as infinite, without a warning.
    with np.errstate(over="ignore"):
        transformed: Floats = transform(ratio)
        return transformed


# The measures that are a function of the ratio; all others are the ratio itself.
TRANSFORMS: dict[str, Transform] = {"perplexity": np.exp}


def compare(
    measure: Measure, rows: Mapping[str, Rows], newest: str, bootstrap: Bootstrap, transform: Transform | None = None
) -> dict[str, Any]:
    """Estimate a measure of every model, and its differences, as an entry of the evaluation report.

    Args:
        rows: each model's values, on the same rows.
        newest: the model that all others are compared with. The entry `dpo-base` is `dpo` minus `base`.
    """
    models = {name: bootstrap.estimate(values, transform) for name, values in rows.items()}
    differences = {
        f"{newest}-{name}": bootstrap.difference(rows[newest], values, transform)
        for name, values in rows.items()
        if name != newest
    }
    return entry(measure, models, differences) | {"clusters": len(rows[newest].units[0])}


def entry(measure: Measure, models: Mapping[str, Estimate], differences: Mapping[str, Estimate]) -> dict[str, Any]:
    """A measure's entry in the evaluation report."""
    return {
        "title": measure.title,
        "unit": measure.unit,
        "better": measure.better,
        "models": {name: estimate._asdict() for name, estimate in models.items()},
        "differences": {name: estimate._asdict() for name, estimate in differences.items()},
    }


def verdict(difference: Mapping[str, Any], better: str | None) -> str:
    """A difference in words. It is not significant if its interval includes 0, or if it has no interval.

    Args:
        difference: an `Estimate` as the report holds it.
        better: `lower` or `higher`; None if neither direction is better.
    """
    low, high = difference["low"], difference["high"]
    if low is None or not (low > 0 or high < 0):
        return "not significant"
    if better is None:
        return "higher" if low > 0 else "lower"
    return "better" if (low > 0) == (better == "higher") else "worse"
