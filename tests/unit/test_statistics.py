"""Intervals that cover the truth as often as they say."""

import math

import numpy as np
import pytest
from llm_engineering.reports.page import interval
from scipy import stats

from llm_engineering.evaluation.statistics import Bootstrap, Rows

EXPERIMENTS = 400
CONFIDENCE = 0.9
# What 400 experiments show if the rate is 0.9, all but once in a thousand times.
BOUNDS = stats.binom.ppf((0.0005, 0.9995), EXPERIMENTS, CONFIDENCE)


def made_up(generator, n, gain):
    """Losses a row of two models that find the same rows hard, and tokens a row; the second is better by `gain`."""
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


def test_long_rows_weigh_more_and_are_drawn_with_their_weight():
    # Rows of 1 and 99 tokens: the mean over tokens is near the long rows', and so is every resample that has one.
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
    # By themselves the intervals overlap: only the pairs show which model is better.
    assert other.high > one.low


def test_perplexity_has_the_interval_of_the_loss_exponentiated():
    rows = Rows.of(np.random.default_rng(3).gamma(4.0, 1.0, 50))
    bootstrap = Bootstrap(1000, 0.95, 0)
    loss, perplexity = bootstrap.estimate(rows), bootstrap.estimate(rows, np.exp)
    assert perplexity[:3] == pytest.approx(np.exp(loss[:3]), rel=1e-3)
    assert bootstrap.difference(rows, Rows.of(rows.totals + 1), np.exp).value == pytest.approx(
        np.exp(loss.value) * (1 - np.e)
    )


def test_of_two_rows_the_interval_is_all_that_was_seen():
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
def test_intervals_are_shown_to_two_digits_of_their_width(estimate, sign, text):
    assert interval(*estimate, sign=sign) == text
