"""What differs between a version and its replay, and by how much."""

import json

import torch
from datasets import Dataset, DatasetDict
from safetensors.torch import save_file

from llm_engineering.publish.replayed import (
    compare_losses,
    compare_measures,
    compare_rows,
    compare_weights,
    differing_environment,
)


def model(folder, weights, **files):
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_weights_are_compared_by_file_and_by_tensor(tmp_path):
    one = {"a": torch.zeros(3), "b": torch.ones(2)}
    then = model(tmp_path / "then", one, config={"r": 8})
    assert compare_weights("sft", then, model(tmp_path / "same", one, config={"r": 8})).difference == ""
    other = model(tmp_path / "other", {**one, "b": torch.tensor([1.0, 1.25])}, config={"r": 8})
    said = compare_weights("sft", then, other)
    assert said.what == "weights of sft"
    assert said.difference == "1 of 2 files differ (model.safetensors); 1 of 2 tensors differ, by at most 0.25"
    shape = model(tmp_path / "shape", {"a": torch.zeros(3), "b": torch.ones(3)}, tokenizer={})
    assert compare_weights("sft", then, shape).difference == (
        "3 of 3 files differ (config.json, model.safetensors, tokenizer.json); 1 of 2 tensors differ, by at most inf"
    )


def test_losses_are_compared_step_by_step():
    then = [{"step": 1, "loss": 2.0}, {"step": 1, "eval_loss": 3.0}, {"step": 2, "loss": 1.5, "tokens_per_second": 9}]
    assert compare_losses("sft", then, [*then[:2], {**then[2], "tokens_per_second": 5}]).difference == ""
    said = compare_losses("sft", then, [then[0], {"step": 1, "eval_loss": 3.5}]).difference
    assert said == "2 of 3 losses differ (eval_loss of step 1, loss of step 2); by at most 0.5"


def test_measures_are_compared_without_the_model_in_production():
    value = {"value": 2.0, "low": 1.0, "high": 3.0}
    then = {"measures": {"loss": {"models": {"base": value, "sft": value, "incumbent": value}}}}
    now = {"measures": {"loss": {"models": {"base": value, "sft": {**value, "low": None}}}}}
    assert compare_measures(then, now) == [("measure loss", "sft 2 [1, 3] → 2")]
    assert compare_measures(then, {"measures": {}}) == [("measure loss", "base 2 [1, 3] → none, sft 2 [1, 3] → none")]


def test_rows_are_compared_by_hash():
    def data(*numbers):
        return DatasetDict(train=Dataset.from_dict({"n": list(numbers)}), test=Dataset.from_dict({"n": [0]}))

    assert compare_rows("d", data(1, 2, 2), data(1, 2, 3)).difference == "train: 1 of 3 rows are gone, 1 are new"
    assert compare_rows("d", data(1, 2), data(2, 1)).difference == "the same rows in another order, or in other files"


def test_environments_differ_in_the_machine_and_the_named_libraries_only():
    then = {"processor": "A", "gpu": "", "threads": 2, "packages": {"torch": "2.12", "pytest": "8"}}
    now = {"processor": "B", "gpu": "", "threads": 2, "packages": {"torch": "2.13", "pytest": "9"}}
    assert differing_environment(then, now, ["torch", "trl"]) == ["processor A → B", "torch 2.12 → 2.13"]
