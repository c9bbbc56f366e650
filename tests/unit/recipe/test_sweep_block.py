"""The block `sweep`: ranges that cannot be drawn from, and trials that could not be compared, are refused."""

import pytest

from llm_engineering.errors import RequestError
from llm_engineering.recipe.loading import load_recipe
from llm_engineering.recipe.sweep_block import Range


def load(ranges, *more):
    return load_recipe("configs/local.yaml", [f"sweep={{ranges: {{{ranges}}}}}", *more])


@pytest.mark.parametrize(
    ("ranges", "words"),
    [
        ("sft.lora.r: {choices: [8]}", "at least 2 items"),
        ("sft.lora.r: {choices: [8, 16], low: 4}", "choices stand alone"),
        ("sft.lora.r: {low: 8}", "name low and high"),
        ("sft.lora.r: {low: 8, high: 8}", "must be below high"),
        ("sft.weight_decay: {low: 0, high: 1, log: true}", "log needs a low above 0"),
        ("sft.weight_decay: {low: 0.1, high: 1, log: true, step: 0.1}", "log and step"),
        ("evaluation.batch_size: {choices: [1, 2]}", "does not change the trained model"),
        ("dpo.beta: {low: 0.1, high: 1}", "changes what the validation loss of dpo measures"),
        # The SFT model is the reference of DPO's loss.
        ("sft.learning_rate: {low: 1e-5, high: 1e-4}, dpo.learning_rate: {low: 1e-5, high: 1e-4}", "sweep sft alone"),
    ],
)
def test_a_range_is_refused(ranges, words):
    with pytest.raises(RequestError, match=words):
        load(ranges)


def test_a_stage_after_the_one_that_decides_is_refused():
    with pytest.raises(RequestError, match="has no effect on sft"):
        load("dpo.learning_rate: {low: 1e-5, high: 1e-4}", "sweep.stage=sft")


def test_the_last_stage_with_a_range_decides():
    chain = ["sft", "dpo"]
    assert load("dpo.learning_rate: {low: 1e-5, high: 1e-4}").sweep.stage_of(chain) == "dpo"
    assert load("sft.learning_rate: {low: 1e-5, high: 1e-4}").sweep.stage_of(chain) == "sft"
    assert load("data.wordings: {low: 1, high: 4}").sweep.stage_of(chain) == "sft"


@pytest.mark.parametrize(
    ("values", "inside", "outside"),
    [
        (Range(low=1e-5, high=1e-3, log=True), [1e-5, 1e-4, 1e-3], [2e-3, None, "1e-4"]),
        (Range(low=8, high=64, step=8), [8, 24, 64], [12, 72]),
        (Range(low=0.1, high=0.4, step=0.1), [0.1, 0.3], [0.25]),
        (Range(choices=[None, 8, "all"]), [None, 8, "all"], [16]),
    ],
)
def test_a_range_holds_its_values(values, inside, outside):
    assert [values.holds(value) for value in (*inside, *outside)] == [True] * len(inside) + [False] * len(outside)
