"""What a model version comes from, on artifacts and steps made by hand."""

import shutil
from types import SimpleNamespace

import pytest

from llm_engineering.errors import RequestError
from llm_engineering.models.revision import pin_revision
from llm_engineering.recipe.loading import load_recipe
from llm_engineering.recipe.model_blocks import ModelConfig
from tests.conftest import ROOT
from tools.model_versions import versions


def test_the_model_in_production_is_no_origin_of_the_one_that_is_compared_with_it(monkeypatch):
    made_from = {
        "evaluation_report": {"sft_adapter": ["adapter 2"], "incumbent": ["adapter 1"]},
        "adapter 2": {"formatted_sft": ["documents 2"]},
        "adapter 1": {"formatted_sft": ["documents 1"]},
    }

    def artifact(name):
        return SimpleNamespace(id=name)

    def producer(made):
        given = made_from.get(made.id)
        return given and SimpleNamespace(inputs={key: list(map(artifact, names)) for key, names in given.items()})

    monkeypatch.setattr(versions, "producer", producer)
    found = versions.with_origins([artifact("evaluation_report"), artifact("adapter 2")])
    assert [made.id for made in found] == ["evaluation_report", "adapter 2", "documents 2"]


def test_a_version_is_merged_only_with_the_base_model_of_its_training(small_llama, settings, tmp_path, monkeypatch):
    base = shutil.copytree(small_llama, tmp_path / "base")
    pinned = pin_revision(ModelConfig(name_or_path=str(base)))
    found = versions.Found(
        SimpleNamespace(id=1, number=1, get_artifact=lambda name: None), "sft", {"sft": base}, pinned
    )
    recipe = load_recipe(ROOT / "configs" / "python_reference.yaml", ["compute.device=cpu"])
    merged = [None]
    monkeypatch.setattr(versions, "newest_stored", lambda *_, **__: merged[0])
    with pytest.raises(RequestError, match="Version 1 has no held-out rows"):
        versions.merged_model(found, recipe, settings)

    # Saved anew with other weights
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(
        RequestError, match=r"base has changed since the training: it was folder-.*, and now it is folder-"
    ):
        versions.merged_model(found, recipe, settings)

    base.rename(tmp_path / "elsewhere")
    with pytest.raises(RequestError, match="base of the trained model is missing"):
        versions.merged_model(found, recipe, settings)

    # A registered model needs no base model.
    merged[0] = "the merged model"
    assert versions.merged_model(found, recipe, settings) == "the merged model"
