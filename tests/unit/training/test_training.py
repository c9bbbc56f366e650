"""Training a model of two small layers: the DPO reference, resuming, telemetry, and the data that Comet receives."""

import json
import logging
import math
import zipfile
from pathlib import Path

import pytest
import torch
from datasets import DatasetDict
from safetensors.torch import load_file

from llm_engineering.errors import RequestError
from llm_engineering.models.base_model import load_model
from llm_engineering.models.device import choose_device
from llm_engineering.recipe.compute_blocks import ComputeConfig
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.stage_blocks import DPOConfig, SFTConfig
from llm_engineering.recipe.training_blocks import TrackingConfig
from llm_engineering.training.dpo import dpo_trainer
from llm_engineering.training.trainer.checkpoints import remove_finished
from tests.tiny_models import formatted, logged, prepared, train, training_setup

STEPS = {
    "learning_rate": 1e-2,
    "num_train_epochs": 1,
    "gradient_accumulation_steps": 1,
    "save_steps": 2,
    "eval_steps": 2,
}
SFT = SFTConfig(**STEPS, per_device_train_batch_size=1, packing=True)
DPO = DPOConfig(**STEPS, per_device_train_batch_size=2)


@pytest.fixture(scope="module")
def setup(tiny_model):
    return training_setup(tiny_model, chat_template=None)


@pytest.fixture(scope="module")
def sft_data(tokenizer, tmp_path_factory):
    return formatted("instruction", 16, tokenizer, tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def dpo_data(tokenizer, tmp_path_factory):
    return formatted("preference", 8, tokenizer, tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def sft_adapter(sft_data, setup, tmp_path_factory) -> Path:
    settings = Settings(llm_output_dir=tmp_path_factory.mktemp("sft"))
    return train(sft_data, SFT, setup, settings).adapter


def test_sft_lowers_the_loss_and_leaves_no_pickle(sft_data, setup, settings):
    result = train(sft_data, SFT.model_copy(update={"num_train_epochs": 4}), setup, settings)
    losses = logged(result)
    assert losses[-1] < losses[0] - 0.3
    assert {file.suffix for file in result.adapter.iterdir()} <= {".safetensors", ".json", ".jinja"}
    assert not (result.adapter.parent / "checkpoints").exists()
    assert json.loads((result.adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == (
        setup.model.name_or_path
    )


def test_a_pipeline_can_store_the_model_before_the_checkpoints_are_removed(sft_data, setup, settings):
    config = SFT.model_copy(update={"max_steps": 2, "save_steps": 1})
    whole = train(sft_data, config, setup, settings, parameters={"run_id": "one"})
    # The disk was full, so the same step runs again.
    again = train(sft_data, config, setup, settings, parameters={"run_id": "two"})
    assert again.summary["resumed_from"] == "checkpoint-2"
    assert logged(again) == logged(whole)
    remove_finished(again.adapter.parents[1])
    assert not (again.adapter.parent / "checkpoints").exists()


def test_only_trls_warnings_about_unpadded_rows_are_hidden(sft_data, setup, settings, caplog):
    name = "trl.trainer.sft_trainer"
    with caplog.at_level(logging.WARNING, logger=name):
        train(sft_data, SFT.model_copy(update={"max_steps": 1}), setup, settings)
        assert [record for record in caplog.records if record.name == name] == []
        logging.getLogger(name).warning("The model may not learn to stop.")
    assert [record.getMessage() for record in caplog.records if record.name == name] == [
        "The model may not learn to stop."
    ]


def test_reference_of_dpo_is_the_sft_model(sft_adapter, dpo_data, setup, settings):
    run = prepared(dpo_data, DPO, setup, settings, start=sft_adapter)

    def rewards_before_the_first_step(reference=None):
        trainer = dpo_trainer(run, run.load_policy(), DPO)
        trainer.ref_model = reference
        return trainer.evaluate()

    metrics = rewards_before_the_first_step()
    assert metrics["eval_rewards/chosen"] == metrics["eval_rewards/rejected"] == 0
    assert metrics["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)

    with_base = rewards_before_the_first_step(load_model(setup.model, settings, run.device))
    assert abs(with_base["eval_rewards/chosen"]) > 1e-3


def test_dpo_prefers_the_chosen_answer(sft_adapter, dpo_data, setup, settings):
    before = load_file(sft_adapter / "adapter_model.safetensors")
    result = train(dpo_data, DPO.model_copy(update={"num_train_epochs": 4}), setup, settings, start=sft_adapter)
    margins = [entry["eval_rewards/margins"] for entry in result.summary["history"] if "eval_rewards/margins" in entry]
    assert margins[-1] > 0.1
    after = load_file(result.adapter / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert not (result.adapter / "ref").exists()


def test_another_learning_rate_is_another_run(sft_data, setup, settings):
    one = train(sft_data, SFT, setup, settings)
    other = train(sft_data, SFT.model_copy(update={"learning_rate": 1e-3}), setup, settings)
    assert one.adapter.parent != other.adapter.parent


def test_comet_archive_has_metrics_and_parameters(sft_data, setup, settings):
    tracked = setup.model_copy(update={"tracking": TrackingConfig(comet="offline")})
    result = train(sft_data, SFT, tracked, settings, parameters={"run_id": "run-1", "formatted_sft_version": "v-1"})
    place = result.summary["comet"]
    with zipfile.ZipFile(place["archive"]) as archive:
        names = archive.namelist()
        messages = [json.loads(line) for line in archive.read("messages.json").decode().splitlines()]
    assert not any("git" in name or name.endswith(".py") for name in names)
    metrics = {}
    parameters = {}
    for entry in messages:
        payload = entry["payload"]
        if entry["type"] == "metric_msg":
            metrics.setdefault(payload["metric"]["metricName"], []).append(payload["metric"]["metricValue"])
        elif entry["type"] == "parameter_msg":
            parameters[payload["param"]["paramName"]] = payload["param"]["paramValue"]
    assert [float(value) for value in metrics["sft/loss"]] == pytest.approx(logged(result))
    for name in ("eval_loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_memory_bytes"):
        assert metrics[f"sft/{name}"], name
    assert parameters["run_id"] == "run-1"
    assert parameters["formatted_sft_version"] == "v-1"
    assert float(parameters["learning_rate"]) == SFT.learning_rate
    assert parameters["seed"] in (7, "7")


def test_comet_cannot_fail_a_run(sft_data, setup, settings, monkeypatch, caplog):
    import comet_ml

    def broken(*args, **kwargs):
        raise ConnectionError("no route to Comet")

    monkeypatch.setattr(comet_ml, "start", broken)
    tracked = setup.model_copy(update={"tracking": TrackingConfig(comet="auto")})
    with caplog.at_level(logging.WARNING):
        result = train(sft_data, SFT, tracked, settings)
    assert result.summary["comet"] == {}
    assert "start failed (ConnectionError: no route to Comet); training continues" in caplog.text


def test_a_device_or_package_that_is_missing_is_refused():
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(RequestError, match="torch finds no CUDA card"):
        choose_device(ComputeConfig(device="cuda"))
    with pytest.raises(RequestError, match="needs CUDA and the package flash_attn"):
        choose_device(ComputeConfig(attn_implementation="flash_attention_2"))


def test_every_automatic_choice_has_a_reason():
    device = choose_device(ComputeConfig())
    assert [reason.partition(":")[0].split()[0] for reason in device.reasons] == ["device", "dtype", "attention"]


def test_data_without_a_split_is_refused(tmp_path, sft_data):
    from llm_engineering.training.__main__ import _load_data

    DatasetDict(train=sft_data["train"]).save_to_disk(tmp_path / "data")
    with pytest.raises(RequestError, match="splits train and validation"):
        _load_data(tmp_path / "data")
