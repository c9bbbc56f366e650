"""Grouping rows by length: less padding, every row once, and the same order after an interruption."""

import pytest
import torch
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file

from llm_engineering.errors import RequestError
from llm_engineering.recipe.loading import load_recipe
from llm_engineering.recipe.stage_blocks import SFTConfig
from llm_engineering.training import training_run
from llm_engineering.training.sft import sft_trainer
from llm_engineering.training.trainer.resumable import LengthGroupedByEpoch
from tests.conftest import ROOT
from tests.tiny_models import prepared, train, training_setup
from tests.unit.training.steps import break_off

CONFIG = SFTConfig(
    learning_rate=1e-2, num_train_epochs=3, per_device_train_batch_size=2, gradient_accumulation_steps=1,
    save_steps=2, eval_steps=100, packing=False, train_sampling_strategy="group_by_length",
)  # fmt: skip


@pytest.fixture
def setup(small_llama):
    return training_setup(small_llama, max_length=64)


@pytest.fixture(scope="module")
def data():
    """16 rows of 4 to 34 tokens; the second token of each row identifies it."""
    rows = [{"id": f"r{i}", "input_ids": [1, 20 + i, *[5] * (1 + 2 * i), 0]} for i in range(16)]
    for row in rows:
        row["labels"] = [-100, *row["input_ids"][1:]]
    return DatasetDict(train=Dataset.from_list(rows), validation=Dataset.from_list(rows[:2]))


def batches(data, setup, settings, strategy):
    config = CONFIG.model_copy(update={"train_sampling_strategy": strategy})
    run = prepared(data, config, setup, settings)
    policy = run.load_policy()
    torch.manual_seed(1)
    return list(sft_trainer(run, policy, config).get_train_dataloader())


def test_grouped_batches_have_every_row_and_less_padding(data, setup, settings, monkeypatch):
    """The model is treated as one that mixes concatenated rows, so that batches are padded."""
    monkeypatch.setattr(training_run, "keeps_rows_apart", lambda policy, by_row: False)
    padded = {}
    for strategy in ("random", "group_by_length"):
        made = batches(data, setup, settings, strategy)
        assert sorted(int(row[1]) for batch in made for row in batch["input_ids"]) == list(range(20, 36))
        padded[strategy] = sum(batch["input_ids"].numel() for batch in made)
    assert padded["group_by_length"] < padded["random"]


def test_resumed_run_sees_the_rows_of_an_uninterrupted_one(data, setup, settings, tmp_path):
    """The run stops in the second of three epochs. The resumed process never draws the first epoch's random numbers."""
    whole = train(data, CONFIG, setup, settings)
    expected = load_file(whole.adapter / "adapter_model.safetensors")
    elsewhere = settings.model_copy(update={"llm_output_dir": tmp_path / "again"})
    break_off(13, lambda: train(data, CONFIG, setup, elsewhere))
    resumed = train(data, CONFIG, setup, elsewhere)
    assert resumed.summary["resumed_from"] == "checkpoint-12"
    actual = load_file(resumed.adapter / "adapter_model.safetensors")
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_each_epoch_has_its_own_order(data):
    sampler = LengthGroupedByEpoch(2, [len(row) for row in data["train"]["input_ids"]], seed=7)
    first = list(sampler)
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert sorted(sampler) == sorted(first)
    assert list(sampler) != first


def test_grouping_packed_rows_is_refused():
    recipe = ROOT / "configs" / "python_reference.yaml"
    with pytest.raises(RequestError, match="group_by_length has no effect with packing"):
        load_recipe(recipe, ["sft.train_sampling_strategy=group_by_length"])
    recipe = load_recipe(recipe, ["sft.train_sampling_strategy=group_by_length", "sft.packing=false"])
    assert recipe.sft.train_sampling_strategy == "group_by_length"
