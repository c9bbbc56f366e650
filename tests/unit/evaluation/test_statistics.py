"""Intervals cover the true value at the stated rate."""

import math

import numpy as np
import pytest
from scipy import stats

from llm_engineering.evaluation.statistics import Bootstrap, Rows
from llm_engineering.reports.page import interval

EXPERIMENTS = 400
CONFIDENCE = 0.9
# Range of counts in 400 experiments with rate 0.9 that chance leaves once in a thousand times.
BOUNDS = stats.binom.ppf((0.0005, 0.9995), EXPERIMENTS, CONFIDENCE)


def made_up(generator, n, gain):
    """Token counts of rows, and the losses of two models with the same hard rows. The second is better by `gain`."""
    tokens = generator.integers(5, 60, n).astype(float)
    hardness = generator.gamma(9.0, 1 / 3, n)
    first = hardness + generator.normal(0, 0.2, n)
    second = hardness - gain + generator.normal(0, 0.2, n)
    return tokens, first, second


@pytest.mark.parametrize("n", [20, 100])
def test_intervals_cover_a_known_difference_at_the_stated_rate(n):
    generator = np.random.default_rng(1)
    covered = dict.fromkeys(("mean", "mean difference", "token-weighted", "token-weighted difference"), 0)
    for experiment in range(EXPERIMENTS):
        bootstrap = Bootstrap(500, CONFIDENCE, experiment)
        tokens, first, second = made_up(generator, n, 0.1)
        plain = Rows.of(first), Rows.of(second)
        weighted = Rows.of(first * tokens, tokens), Rows.of(second * tokens, tokens)
        truths = {
            "mean": (3.0, bootstrap.estimate(plain[0])),
            "mean difference": (-0.1, bootstrap.difference(plain[1], plain[0])),
            "token-weighted": (3.0, bootstrap.estimate(weighted[0])),
            "token-weighted difference": (-0.1, bootstrap.difference(weighted[1], weighted[0])),
        }
        for name, (truth, found) in truths.items():
            covered[name] += found.low <= truth <= found.high
    for name, count in covered.items():
        assert BOUNDS[0] <= count <= BOUNDS[1], f"{name}: {count} of {EXPERIMENTS}, not within {BOUNDS}"


def test_long_rows_weigh_more_in_every_resample():
    # Rows of 1 and 99 tokens: the mean over tokens is near that of the long rows, in every resample too.
    rows = Rows.of([5.0 * 1, 1.0 * 99] * 20, [1.0, 99.0] * 20)
    found = Bootstrap(1000, 0.95, 0).estimate(rows)
    assert found.value == pytest.approx((5 + 99) / 100)
    assert 1.0 < found.low < found.value < found.high < 1.2


def test_paired_differences_are_narrower_than_unpaired_ones():
    tokens, first, second = made_up(np.random.default_rng(2), 100, 0.1)
    bootstrap = Bootstrap(1000, 0.95, 0)
    first, second = Rows.of(first * tokens, tokens), Rows.of(second * tokens, tokens)
    paired = bootstrap.difference(second, first)
    one, other = bootstrap.estimate(first), bootstrap.estimate(second)
    unpaired = np.hypot(one.high - one.low, other.high - other.low)
    assert paired.high - paired.low < unpaired / 4
    assert paired.high < 0
    # The intervals of the two models overlap: only the paired difference shows which model is better.
    assert other.high > one.low


def test_the_interval_of_perplexity_is_that_of_the_loss_exponentiated():
    rows = Rows.of(np.random.default_rng(3).gamma(4.0, 1.0, 50))
    bootstrap = Bootstrap(1000, 0.95, 0)
    loss, perplexity = bootstrap.estimate(rows), bootstrap.estimate(rows, np.exp)
    assert perplexity[:3] == pytest.approx(np.exp(loss[:3]), rel=1e-3)
    assert bootstrap.difference(rows, Rows.of(rows.totals + 1), np.exp).value == pytest.approx(
        np.exp(loss.value) * (1 - np.e)
    )


@pytest.mark.parametrize("clusters", [20, 60])
def test_intervals_over_clusters_cover_the_true_value_and_those_over_rows_do_not(clusters):
    """Documents of one to eight rows, whose questions are answered right or wrong together."""
    generator = np.random.default_rng(4)
    covered = {"clusters": 0, "rows": 0, "difference": 0}
    for experiment in range(EXPERIMENTS):
        sizes = generator.integers(1, 9, clusters)
        numbers = np.repeat(np.arange(clusters), sizes)
        easy, learned = generator.beta(1, 1, clusters)[numbers], generator.beta(1, 1, clusters)[numbers]
        first, second = (generator.random(len(numbers)) < chance for chance in (easy, (easy + learned) / 2))
        bootstrap = Bootstrap(500, CONFIDENCE, experiment)
        one, other = Rows.of(first), Rows.of(second)
        found = {
            "clusters": bootstrap.estimate(one.in_clusters(numbers)),
            "rows": bootstrap.estimate(one),
            "difference": bootstrap.difference(other.in_clusters(numbers), one.in_clusters(numbers)),
        }
        for name, truth in (("clusters", 0.5), ("rows", 0.5), ("difference", 0.0)):
            covered[name] += found[name].low <= truth <= found[name].high
    for name in ("clusters", "difference"):
        assert BOUNDS[0] <= covered[name] <= BOUNDS[1], f"{name}: {covered[name]} of {EXPERIMENTS}, not within {BOUNDS}"
    assert covered["rows"] < BOUNDS[0]


def test_clusters_of_one_row_change_nothing_and_one_cluster_has_no_interval():
    rows = Rows.of([1.0, 2.0, 4.0, 8.0], [1.0, 1.0, 2.0, 2.0])
    bootstrap = Bootstrap(500, 0.95, 7)
    assert bootstrap.estimate(rows.in_clusters([3, 5, 8, 9])) == bootstrap.estimate(rows)
    assert bootstrap.estimate(rows.in_clusters([1, 1, 1, 1])) == (rows.value, None, None, 4)
    together = bootstrap.estimate(rows.in_clusters([0, 1, 0, 1]))
    assert (together.value, together.n) == (rows.value, 4)
    # Two clusters: the ends are the values of the clusters.
    assert (together.low, together.high) == pytest.approx((5 / 3, 10 / 3))


def test_the_interval_of_two_rows_spans_both_values():
    assert Bootstrap(500, 0.95, 7).estimate(Rows.of([1.0, 3.0])) == (2.0, 1.0, 3.0, 2)


def test_the_seed_decides_and_one_row_has_no_interval():
    rows = Rows.of([1.0, 2.0, 4.0, 8.0])
    assert Bootstrap(500, 0.95, 7).estimate(rows) == Bootstrap(500, 0.95, 7).estimate(rows)
    assert Bootstrap(500, 0.95, 7).estimate(rows) != Bootstrap(500, 0.95, 8).estimate(rows)
    assert Bootstrap(500, 0.95, 7).estimate(Rows.of([3.0])) == (3.0, None, None, 1)
    assert Bootstrap(500, 0.95, 7).difference(rows, rows)[:3] == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("estimate", "sign", "text"),
    [
        ((2.8154, 2.7422, 2.8931), False, "2.82 [2.74, 2.89]"),
        ((-0.1762, -0.2349, -0.1031), True, "-0.18 [-0.23, -0.10]"),
        ((0.32, 0.064, 0.548), True, "+0.32 [+0.06, +0.55]"),
        ((21.63, 18.61, 24.94), False, "21.6 [18.6, 24.9]"),
        ((1234.5, 1000.0, 1500.0), False, "1234 [1000, 1500]"),
        ((0.0, 0.0, 0.0), True, "0.00 [0.00, 0.00]"),
        ((0.51234, None, None), True, "+0.512"),
        ((math.inf, math.inf, math.inf), False, "inf [inf, inf]"),
        ((math.nan, math.nan, math.nan), False, "nan [nan, nan]"),
    ],
)
def test_intervals_are_shown_with_two_digits_of_their_width(estimate, sign, text):
    assert interval(*estimate, sign=sign) == text
