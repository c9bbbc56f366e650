"""llm-compressor's files answer as the model does, or are not kept."""

import importlib.util
import json
import os

import pytest
import torch

from llm_engineering.errors import RequestError, WorkError
from llm_engineering.evaluation.measures.exam import ExamRow
from llm_engineering.models.device import choose_device
from llm_engineering.publish.exports.compressed import check_compressed, export_compressed
from llm_engineering.publish.verification import HeldoutRow
from llm_engineering.recipe.compute_blocks import ComputeConfig
from llm_engineering.recipe.loading import load_recipe
from tests.conftest import ROOT
from tests.tiny_models import KINDS, SIZES, write_model

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llmcompressor") is None and not os.environ.get("CI"),
    reason="needs llm-compressor (pip install -c requirements.lock -e '.[dev]')",
)

GENERATOR = torch.Generator().manual_seed(7)
IDS = [torch.randint(10, 270, (24,), generator=GENERATOR).tolist() for _ in range(8)]
ROWS = [HeldoutRow("row", ids, [-100] * 4 + ids[4:]) for ids in IDS[:4]]
EXAM = [(ExamRow(question="Who founded the mill?", answers=["Nobody"]), False)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model whose matrices have rows of 64 and 128 numbers."""
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, KINDS["qwen3"]._replace(shape=SIZES | {"hidden_size": 64, "intermediate_size": 128}))
    return folder


def export(model, output, quant, settings, *changes):
    recipe = load_recipe(ROOT / "configs" / "local.yaml", changes)
    return export_compressed(model, output, recipe, quant, ROWS, EXAM, 4, IDS, settings)


def stored(folder):
    config = json.loads((folder / "config.json").read_text())
    return config["quantization_config"]["config_groups"]["group_0"]["weights"]


def test_weights_in_fp8_give_nearly_the_same_log_probabilities(model, settings, tmp_path):
    check = export(model, tmp_path / "out", "FP8", settings)
    assert stored(tmp_path / "out")["num_bits"] == 8
    assert stored(tmp_path / "out")["type"] == "float"
    assert check.tensors["F8_E4M3"] == 14
    assert check.tokens == 80
    assert 0 < check.mean_difference < 0.05
    assert check.described.startswith("safetensors, FP8 (tensors: ")
    # Everything that a server needs is there, and nothing is left beside it.
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors"} <= names
    assert [folder.name for folder in tmp_path.iterdir() if "out" in folder.name] == ["out"]


def test_awq_searches_scales_on_training_rows(model, settings, tmp_path, monkeypatch):
    # It copies activations to memory that a card reads. There is none here.
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    check = export(model, tmp_path / "out", "AWQ", settings)
    assert stored(tmp_path / "out")["num_bits"] == 4
    assert stored(tmp_path / "out")["group_size"] == 64
    assert check.tensors["I32"] > 0
    assert 0 < check.mean_difference < 0.5


def test_a_model_that_loses_too_much_is_not_kept(model, settings, tmp_path):
    with pytest.raises(WorkError, match="The safetensors file is not kept: FP8 lowers .*Export it without QUANT"):
        export(model, tmp_path / "out", "FP8", settings, "export.max_logprob_loss=1e-9")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.partial").exists()


def test_rows_that_cannot_be_divided_into_groups_are_refused(settings, tmp_path):
    write_model(tmp_path / "model", KINDS["qwen3"]._replace(shape=SIZES | {"hidden_size": 48}))
    with pytest.raises(RequestError, match=r"groups 128, 64, 32 weights, and this model has .* rows of .*48"):
        export(tmp_path / "model", tmp_path / "out", "AWQ", settings)


def test_missing_packages_and_cards_are_named(monkeypatch):
    cpu = choose_device(ComputeConfig(device="cpu"))
    with pytest.raises(RequestError, match="QUANT=AWQ needs a CUDA card.*QUANT=FP8 needs none"):
        check_compressed("AWQ", cpu)
    check_compressed("FP8", cpu)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match="QUANT=FP8 needs llm-compressor.*\\[compressed\\]"):
        check_compressed("FP8", cpu)
