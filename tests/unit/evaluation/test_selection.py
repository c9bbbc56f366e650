"""The lowest of several losses, by chance and of a training."""

import numpy as np
import pytest

from llm_engineering.evaluation.selection import by_chance, expected_lowest, validation_loss


@pytest.mark.parametrize("count", [1, 2, 6, 50])
def test_the_lowest_of_several_values_lies_as_far_below_the_mean_as_drawn_ones(count):
    drawn = np.random.default_rng(0).standard_normal((20_000, count)).min(axis=1).mean()
    assert expected_lowest(count) == pytest.approx(-drawn, abs=0.02)


def test_chance_is_measured_with_the_repeats():
    found = by_chance(6, [1.0, 1.2, 1.1])
    assert (found["mean"], found["spread"]) == (pytest.approx(1.1), pytest.approx(0.1))
    assert found["lowest"] == pytest.approx(1.1 - 0.1 * expected_lowest(6))


def test_one_more_run_lies_in_the_interval_of_the_repeats():
    drawn = np.random.default_rng(0).normal(2.0, 0.3, (4000, 4))
    found = [by_chance(6, losses[:3].tolist()) for losses in drawn]
    inside = [one["low"] <= losses[3] <= one["high"] for one, losses in zip(found, drawn, strict=True)]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.015)


def test_the_validation_loss_is_that_of_the_kept_model():
    history = [{"loss": 1.0}, {"eval_loss": 0.4}, {"eval_loss": 0.7}]
    assert validation_loss({"history": history, "config": {"load_best": False}}) == 0.7
    assert validation_loss({"history": history, "config": {"load_best": True}}) == 0.4
