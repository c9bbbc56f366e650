"""Confidence intervals over clusters of rows, and paired differences between models, as the report holds them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

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

    @property
    def is_share(self) -> bool:
        """Whether the measure is a share of the rows: each row counts once, with 0 or 1."""
        return bool(np.isin(self.totals, (0.0, 1.0)).all() and (self.weights == 1).all())


class Estimate(NamedTuple):
    """A measure over `n` rows, with the ends of its interval; they are None if there is only one row or cluster."""

    value: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Bootstrap:
    """Intervals that treat the rows of a cluster as one observation. A row without a cluster is one of its own.

    A share of rows has the score interval of Wilson (1927), and a difference of shares that of Tango (1998, Statistics in
    Medicine 17:891) for paired answers. They are not empty where every answer is the same: 0 right answers of 40 do not show
    that the share is 0. Rows in clusters count as fewer rows (see `_effective_rows`).

    Every other measure has the wider ends of two intervals. One is the percentile interval over `resamples` resamples of the
    clusters (Efron and Tibshirani 1993, chapter 13; Davison and Hinkley 1997, section 3.8), which follows skewed values. Its
    normal quantiles are replaced by t quantiles times sqrt(n / (n - 1)) (Hesterberg 2015, arXiv:1411.5279). Only the seed
    decides which clusters a resample has, so it has the same ones for every model. The other is the t interval with the
    jackknife's standard error over clusters, because resamples of a few clusters do not spread widely enough (MacKinnon,
    Nielsen and Webb 2023, Journal of Econometrics 232:272).

    In both cases t has as many degrees of freedom as the effective number of clusters (see `_freedom`) less one.
    """

    resamples: int
    confidence: float
    seed: int

    def estimate(self, rows: Rows, transform: Transform | None = None) -> Estimate:
        """Estimate a model's measure. `transform`, which must rise, is applied to the ratio, e.g. `np.exp` for perplexity."""
        if len(rows.units[0]) == 1:
            return Estimate(float(_ratio(rows.totals, rows.weights, transform=transform)), None, None, len(rows.totals))
        if transform is None and rows.is_share:
            return self.share_won(rows)
        return self._interval(rows.units, _ratio, rows, transform)

    def share_won(self, rows: Rows) -> Estimate:
        """Estimate a mean of values from 0 to 1, such as wins with ties of 0.5, with Wilson's interval.

        The interval lies between 0 and 1, and is not empty if all rows are ties. It is wide enough, because such values vary
        less than zeros and ones with the same mean.
        """
        if len(rows.units[0]) == 1:
            return Estimate(rows.value, None, None, len(rows.totals))
        return Estimate(rows.value, *_wilson(rows.value, self._effective_rows(rows), self._z), len(rows.totals))

    def difference(self, first: Rows, second: Rows, transform: Transform | None = None) -> Estimate:
        """Estimate the first model's measure minus the second's. Both have the same rows and clusters in the same order."""
        gains = first._replace(totals=first.totals - second.totals)
        if transform is None and first.is_share and second.is_share and len(first.units[0]) > 1:
            gained, lost = float((gains.totals > 0).mean()), float((gains.totals < 0).mean())
            ends = _tango(gained, lost, self._effective_rows(gains), self._z)
            return Estimate(first.value - second.value, *ends, len(first.totals))

        def statistic(*parts: Floats, axis: int = -1) -> Floats:
            return _ratio(parts[0], parts[1], axis, transform) - _ratio(parts[2], parts[3], axis, transform)

        return self._interval((*first.units, *second.units), statistic, first)

    @property
    def _z(self) -> float:
        # scipy takes half a second to import, and the pages and the exam's file, which import this module, do without.
        from scipy import stats

        return float(stats.norm.ppf((1 + self.confidence) / 2))

    def _t(self, freedom: float) -> float:
        from scipy import stats

        return float(stats.t.ppf((1 + self.confidence) / 2, freedom))

    def _effective_rows(self, rows: Rows) -> float:
        """The number of independent rows that would show as much as these rows in clusters.

        This is the number of rows divided by the design effect: the jackknife's variance over clusters, divided by the variance
        for independent rows. It is at least 1. If all values are equal, the design effect is unknown, and is taken to be that
        of clusters whose rows are always equal. The squared ratio of t quantiles corrects for few clusters (Korn and Graubard 1998, Survey Methodology
        24:193).
        """
        totals, weights = rows.units
        n = len(rows.totals)
        independent = float(np.square(rows.totals).mean() - rows.value**2) / (n - 1)
        effect = _standard_error((totals, weights), _ratio) ** 2 / independent if independent > 0 else _size(weights)
        return n / max(1.0, effect) * (self._t(n - 1) / self._t(_freedom(weights))) ** 2

    def _interval(
        self, parts: Sequence[Floats], statistic: Callable[..., Floats], rows: Rows, transform: Transform | None = None
    ) -> Estimate:
        """The wider ends of the percentile interval and the t interval. Both are transformed."""
        from scipy import stats

        n, weights = len(parts[0]), parts[1]
        value = float(statistic(*parts))
        if n == 1:
            return Estimate(value, None, None, len(rows.totals))
        freedom = _freedom(weights)
        expanded = -self._t(freedom) * math.sqrt(n / (n - 1))
        resampled = stats.bootstrap(
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
        half = self._t(freedom) * _standard_error(parts, statistic)
        ends = np.array([value, min(resampled.low, value - half), max(resampled.high, value + half)])
        with np.errstate(over="ignore"):
            value, low, high = (ends if transform is None else transform(ends)).tolist()
        return Estimate(value, low, high, len(rows.totals))


def _size(weights: Floats) -> float:
    """The mean size of the cluster of a row, or of a token. It is the design effect if all rows of a cluster are equal."""
    return float(np.square(weights).sum() / weights.sum())


def _freedom(weights: Floats) -> float:
    """The effective number of clusters less one, at least 1 (Kish 1965). Equal clusters count fully, others less.

    Args:
        weights: the sizes of the clusters.
    """
    return max(1.0, float(weights.sum()) / _size(weights) - 1)


def _standard_error(parts: Sequence[Floats], statistic: Callable[..., Floats]) -> float:
    """The jackknife's standard error: the statistic without each cluster, around the statistic of all (Efron 1982)."""
    n = len(parts[0])
    # The sum over all clusters but one stands for these clusters, because the statistic depends only on sums.
    without = statistic(*((part.sum() - part)[:, None] for part in parts))
    return math.sqrt((n - 1) / n * float(np.square(without - statistic(*parts)).sum()))


def _wilson(share: float, n: float, z: float) -> tuple[float, float]:
    """Wilson's interval of a share of `n` rows; `n` need not be a whole number."""
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # Rounding must not leave the share itself outside.
    return min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half))


def _tango(gained: float, lost: float, n: float, z: float) -> tuple[float, float]:
    """Tango's interval of `gained - lost`: the differences that the score test does not reject.

    Args:
        gained: share of the rows that only the first model has right.
        lost: share of the rows that only the second model has right.
    """
    from scipy import optimize

    value = gained - lost

    def score(difference: float) -> float:
        # `least` is the likeliest share of lost rows, given the difference.
        b = (2 - value) * difference - gained - lost
        least = (math.sqrt(max(0.0, b * b + 8 * lost * difference * (1 - difference))) - b) / 4
        variance = (2 * least + difference * (1 - difference)) / n
        if variance > 0:
            return (value - difference) / math.sqrt(variance)
        return math.copysign(math.inf, value - difference)

    def end(limit: float) -> float:
        if value == limit:
            return limit
        # Without a discordant row the variance at `value` is 0, so the score is not defined there. Its limit is 0.
        return float(optimize.brentq(lambda d: (abs(score(d)) if d != value else 0.0) - z, value, limit))

    return end(-1.0), end(1.0)


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


def possible(estimate: Estimate, least: float, most: float) -> Estimate:
    """The estimate without the part of its interval that is below `least` or above `most`.

    The t interval of a few clusters may reach below a loss of 0. The true value is never there, so the rest of the interval
    contains it just as often.
    """
    if estimate.low is None or estimate.high is None:
        return estimate
    # In this order the ends of a diverged model stay NaN.
    return estimate._replace(low=max(estimate.low, least), high=min(estimate.high, most))


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
    """A measure's entry in the evaluation report, with the possible part of each interval."""
    return {
        "title": measure.title,
        "unit": measure.unit,
        "better": measure.better,
        "models": {name: possible(one, measure.least, measure.most)._asdict() for name, one in models.items()},
        "differences": {
            name: possible(one, -measure.span, measure.span)._asdict() for name, one in differences.items()
        },
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
