"""KTO on a model of two small layers: the balance of labels, the order of rows, the reference and what is learned."""

import logging
import re

import pytest
from datasets import Dataset
from pydantic import ValidationError

from llm_engineering.errors import RequestError, WorkError
from llm_engineering.recipe.stage_blocks import KTOConfig
from llm_engineering.training.kto import balance, batched, kto_trainer
from tests.renew_references import STEPS as REFERENCE_STEPS
from tests.tiny_models import formatted, logged, prepared, train

STEPS = REFERENCE_STEPS | {"per_device_train_batch_size": 4}
KTO = KTOConfig(**STEPS)


@pytest.fixture
def answers(alpaca_tokenizer, tmp_path):
    return formatted("labelled", 16, alpaca_tokenizer, tmp_path)


@pytest.mark.parametrize(
    ("good", "bad", "weights", "ratio", "warns"),
    [
        (30, 30, {}, "1.00", False),
        (40, 30, {}, "1.33", False),
        (41, 30, {}, "1.37", True),
        (29, 30, {}, "0.97", True),
        (90, 10, {}, "9.00", True),
        (90, 10, {"undesirable_weight": 8}, "1.12", False),
        (10, 90, {"desirable_weight": 9}, "1.00", False),
        (90, 10, {"loss_type": "apo_zero_unpaired"}, "9.00", False),
    ],
)
def test_the_balance_is_printed_and_outside_its_bounds_warned_of(good, bad, weights, ratio, warns):
    config = KTOConfig(**STEPS, **weights)
    line, warning = balance(good, bad, config)
    assert f"{good} good" in line
    assert f"{ratio} to 1" in line
    assert bool(warning) == warns
    # The weights that the warning names bring the balance into the bounds.
    for name, least, most in re.findall(r"kto\.(\w+) between (\S+) and ([\d.]+\d)", warning):
        for value in (least, most):
            assert balance(good, bad, config.model_copy(update={name: float(value)}))[1] == ""


def test_rows_of_one_label_alone_are_refused(answers, setup, settings):
    good = answers["train"].filter(lambda row: row["label"])
    answers["train"] = good
    with pytest.raises(RequestError, match="has no bad answer.*label is false"):
        train(answers, KTO, setup, settings)


def test_a_batch_of_one_row_is_refused():
    with pytest.raises(ValidationError, match="per_device_train_batch_size must be above 1"):
        KTOConfig(**STEPS | {"per_device_train_batch_size": 1})
    assert KTOConfig(**STEPS | {"per_device_train_batch_size": 1}, loss_type="apo_zero_unpaired").beta == 0.1
    with pytest.raises(ValidationError, match="wrong fields"):
        KTOConfig(**STEPS, train_sampling_strategy="random")


def test_rows_are_shuffled_once_and_rotated_within_their_batches():
    rows = Dataset.from_list(
        [{"prompt_ids": [n], "completion_ids": [n + 100], "label": True, "id": "i"} for n in range(10)]
    )
    found = batched(rows, 4, 7, estimates=True)
    order = [row["prompt_ids"][0] for row in found]
    assert sorted(order) == list(range(10)) != order
    for start in (0, 4, 8):
        own = found[start : start + 4]
        assert own["KL_completion_ids"] == own["completion_ids"][-1:] + own["completion_ids"][:-1]
    assert batched(rows, 4, 7, estimates=False).column_names == ["prompt_ids", "completion_ids", "label"]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_reference_is_the_model_before_kto(method, answers, setup, settings):
    config = KTO.model_copy(update={"method": method, "undesirable_weight": 3.0})
    run = prepared(answers, config, setup, settings)
    metrics = kto_trainer(run, run.load_policy(), config).evaluate()
    # The log-probabilities of weights that are trained are rounded in another order than those of frozen ones.
    for name in ("rewards/chosen", "rewards/rejected", "kl"):
        assert metrics[f"eval_{name}"] == pytest.approx(0, abs=1e-6)
    # Two of the four validation rows are bad: half of (1 + 3) / 2.
    assert metrics["eval_loss"] == pytest.approx(1.0, abs=1e-6)


def test_good_answers_become_likelier_than_bad_ones(answers, setup, settings, caplog):
    with caplog.at_level(logging.INFO):
        result = train(answers, KTO.model_copy(update={"num_train_epochs": 4}), setup, settings)
    assert logged(result, "eval_rewards/margins")[-1] > 0.05
    assert "kto: 8 good × weight 1 to 8 bad × weight 1 answers, 1.00 to 1" in caplog.text
    # The report shows the tokens of the first completions.
    assert len(result.summary["labels"]) == 3
    assert not (result.adapter / "ref").exists()


def test_a_batch_halved_to_one_row_ends_the_run(answers, setup, settings):
    run = prepared(answers, KTO, setup, settings)
    with pytest.raises(WorkError, match="two rows at a time"):
        kto_trainer(run, None, KTO.model_copy(update={"per_device_train_batch_size": 1}))
