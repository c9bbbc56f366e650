"""Intervals cover the true value at the stated rate."""

import math

import numpy as np
import pytest
from scipy import stats

from benchmarks.coverage import ALONE, DOCUMENTS, FACTS, FREQUENT, HALF, RARE, count_covered
from llm_engineering.evaluation.statistics import TRANSFORMS, Bootstrap, Rows, compare
from llm_engineering.recipe.evaluation_blocks import MEASURES
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
    # Two clusters with the values 5/3 and 10/3: the interval reaches beyond both.
    assert together.low < 5 / 3 < 10 / 3 < together.high


def test_the_interval_of_two_rows_is_that_of_a_t_with_one_degree_of_freedom():
    half = stats.t.ppf(0.975, 1)
    assert Bootstrap(500, 0.95, 7).estimate(Rows.of([1.0, 3.0])) == pytest.approx((2.0, 2 - half, 2 + half, 2))


def test_the_seed_decides_and_one_row_has_no_interval():
    # The values are so skewed that the resamples decide the upper end.
    rows = Rows.of(np.exp(2 * np.random.default_rng(0).normal(0, 1, 60)))
    assert Bootstrap(500, 0.95, 7).estimate(rows) == Bootstrap(500, 0.95, 7).estimate(rows)
    assert Bootstrap(500, 0.95, 7).estimate(rows) != Bootstrap(500, 0.95, 8).estimate(rows)
    rows = Rows.of([1.0, 2.0, 4.0, 8.0])
    assert Bootstrap(500, 0.95, 7).estimate(Rows.of([3.0])) == (3.0, None, None, 1)
    assert Bootstrap(500, 0.95, 7).difference(rows, rows)[:3] == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("cells", [HALF, RARE, FREQUENT])
@pytest.mark.parametrize(
    ("sizes", "correlation"),
    [(FACTS, 0.0), (FACTS, 0.2), (FACTS, 0.5), (DOCUMENTS, 0.0), (DOCUMENTS, 0.2), (DOCUMENTS, 0.5), (ALONE, 0.0)],
)
def test_intervals_of_shares_and_their_differences_cover_at_least_the_stated_rate(sizes, correlation, cells):
    """Two questions a fact, documents of very different sizes, and questions alone; also for shares near 0 and 1.

    400 experiments are allowed to miss a little more often. Resamples alone cover a share of 0.02 in half of them.
    """
    counts = count_covered(cells, sizes, correlation, EXPERIMENTS)
    for name, count in ((name, counts[name]) for name in ("share", "difference")):
        assert count >= stats.binom.ppf(0.001, EXPERIMENTS, 0.93), f"{name}: {count} of {EXPERIMENTS}"


# Rows of each document in a small held-out split: three documents have most of them.
UNEVEN = [14, 10, 8, 2, 2, 1, 1, 1]


@pytest.mark.parametrize("correlation", [0.0, 0.2, 0.5])
def test_losses_of_uneven_documents_are_covered_only_by_intervals_over_documents(correlation):
    """Losses of a document's rows have a common part. Intervals over rows take it for many observations."""
    generator = np.random.default_rng(8)
    numbers = np.repeat(np.arange(len(UNEVEN)), UNEVEN)
    covered = {"documents": 0, "rows": 0}
    for experiment in range(EXPERIMENTS):
        common, own = generator.normal(0, 1, len(UNEVEN))[numbers], generator.normal(0, 1, len(numbers))
        losses = Rows.of(3 + math.sqrt(correlation) * common + math.sqrt(1 - correlation) * own)
        bootstrap = Bootstrap(100, 0.95, experiment)
        found = {"documents": bootstrap.estimate(losses.in_clusters(numbers)), "rows": bootstrap.estimate(losses)}
        for name, estimate in found.items():
            covered[name] += estimate.low <= 3 <= estimate.high
    least = stats.binom.ppf(0.001, EXPERIMENTS, 0.95)
    assert covered["documents"] >= least, covered
    assert (covered["rows"] >= least) == (correlation == 0), covered


def test_the_loss_of_few_documents_is_covered():
    """Four documents: resamples alone cover the true loss in 0.86 of the experiments instead of 0.95."""
    generator = np.random.default_rng(6)
    numbers = np.repeat(np.arange(4), [2, 3, 3, 5])
    covered = 0
    for experiment in range(EXPERIMENTS):
        losses = generator.normal(0, 0.5, 4)[numbers] + generator.normal(3, 1, len(numbers))
        tokens = generator.integers(5, 60, len(numbers)).astype(float)
        found = Bootstrap(100, 0.95, experiment).estimate(Rows.of(losses * tokens, tokens).in_clusters(numbers))
        covered += found.low <= 3 <= found.high
    assert covered >= stats.binom.ppf(0.001, EXPERIMENTS, 0.95)


def test_shares_have_the_intervals_of_wilson_and_tango():
    bootstrap = Bootstrap(100, 0.95, 1)
    wilson = stats.binomtest(4, 40).proportion_ci(method="wilson")
    assert bootstrap.estimate(Rows.of([1] * 4 + [0] * 36)) == pytest.approx((0.1, *wilson, 40))
    # 21 pairs with one and seven discordant ones: the interval is published in Fagerland, Lydersen and Laake 2014.
    first, second = Rows.of([1] * 2 + [0] * 19), Rows.of([1] + [0] + [1] * 7 + [0] * 12)
    found = bootstrap.difference(first, second)
    assert found[:3] == pytest.approx((-6 / 21, -0.517, -0.026), abs=5e-4)


def test_equal_answers_are_no_proof_that_two_models_are_equal():
    """The interval depends on the number of questions, so a bound that these questions cannot show is not passed."""
    bootstrap = Bootstrap(100, 0.95, 1)
    none = Rows.of([0] * 40)
    assert bootstrap.estimate(none) == pytest.approx((0.0, 0.0, 0.0876, 40), abs=1e-4)
    assert bootstrap.difference(none, none) == pytest.approx((0.0, -0.0876, 0.0876, 40), abs=1e-4)
    half = Rows.of([0, 1] * 20)
    assert bootstrap.difference(half, half) == pytest.approx((0.0, -0.0876, 0.0876, 40), abs=1e-4)
    # Ten questions about one fact show as much as one.
    facts = np.repeat(np.arange(40), 10)
    many = Rows.of([0] * 400).in_clusters(facts)
    assert bootstrap.difference(many, many) == pytest.approx((0.0, -0.093, 0.093, 400), abs=2e-3)


@pytest.mark.parametrize(
    ("measure", "values", "low", "high"),
    [
        ("heldout_loss", [0.1, 0.9], 0, None),
        ("document_loss", [0.1, 0.9], 0, None),
        ("perplexity", [0.1, 0.9], 1, None),
        ("length_ratio", [0.1, 0.9], 0, None),
        ("rouge_l", [0.1, 0.8], 0, 1),
        ("repetition", [0.1, 0.8], 0, 1),
        ("question_gain", [0.1, 0.9], None, None),
    ],
)
def test_intervals_end_where_no_value_is_possible(measure, values, low, high):
    """Of two rows, the t interval reaches far beyond both values on each side."""
    rows = {"base": Rows.of(values), "sft": Rows.of(values[::-1])}
    found = compare(MEASURES[measure], rows, "sft", Bootstrap(500, 0.95, 7), TRANSFORMS.get(measure))
    interval_of = found["models"]["base"]
    assert interval_of["low"] == low or (low is None and interval_of["low"] < 0)
    assert interval_of["high"] == high or (high is None and interval_of["high"] > 2)
    difference = found["differences"]["sft-base"]
    assert (difference["low"], difference["high"]) == (-1, 1) or high is None


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
