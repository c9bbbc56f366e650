"""The bill of materials is valid CycloneDX, and the operations of training are compared with those of the base model."""

import json

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from llm_engineering.publish.bom import base_tokens, bill_of_materials, compute_facts
from llm_engineering.recipe.data_blocks import ModelHubConfig
from llm_engineering.recipe.model_blocks import EMBEDDED_MODEL


def evidence(**changes):
    value = {"value": 2.0, "low": 1.0, "high": 3.0, "n": 9}
    return {
        "model": {
            "name": "tiny", "version": 3, "id": "3e671687-395b-41f5-a30f-a58921a69b79", "created": "2026-11-29T21:00:00Z",
            "stage": None, "trained_stage": "sft", "sha256": "a" * 64, "lineage": {"run": "sft-1"},
        },
        "base": {"name": "embedded:smollm2", "revision": "1", "architecture": "llama"},
        "datasets": [
            {"name": "instruction_dataset", "version": "1", "sha256": "b" * 64, "rows": {"train": 5}, "origins": {"human": 5}}
        ],
        "licences": {"model": None, "base_model": "apache-2.0", "data": "cc-by-4.0"},
        "packages": {"torch": "2.13.0+cpu", "ruamel.yaml": "0.18", "Jinja2": "3.1"},
        "measures": {"loss": {"title": "Loss", "unit": "nats", "models": {"sft": value, "base": {**value, "low": None}}}},
        "limits": ["Rules checked the rows."],
        "compute": {"stages": {"sft": 1e15}},
        **changes,
    }  # fmt: skip


def test_the_bill_of_materials_is_valid_and_lists_every_part():
    bom = bill_of_materials(evidence())
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(bom)) is None
    parts = {part["bom-ref"]: part for part in bom["components"]}
    assert bom["dependencies"] == [{"ref": "model", "dependsOn": list(parts)}]
    assert parts["pkg:pypi/torch@2.13.0+cpu"]["purl"] == "pkg:pypi/torch@2.13.0%2Bcpu"
    assert parts["pkg:pypi/ruamel.yaml@0.18"]["purl"] == "pkg:pypi/ruamel-yaml@0.18"
    assert parts["base-model"]["licenses"] == [{"license": {"name": "apache-2.0"}}]
    card = bom["metadata"]["component"]["modelCard"]
    assert card["modelParameters"]["datasets"] == [{"ref": "dataset:instruction_dataset"}]
    metrics = card["quantitativeAnalysis"]["performanceMetrics"]
    assert metrics[0]["confidenceInterval"] == {"lowerBound": "1.0", "upperBound": "3.0"}
    assert "confidenceInterval" not in metrics[1]


def test_a_bill_with_a_wrong_part_is_refused_by_the_schema():
    bom = bill_of_materials(evidence())
    bom["metadata"]["component"]["modelCard"]["modelParameters"]["approach"]["type"] = "guessing"
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(bom)) is not None


def test_the_share_of_the_base_models_operations():
    found = compute_facts({"sft": 6e14, "dpo": 2e14}, 100, 4e12)
    assert found["total"] == 8e14
    assert found["base_flops"] == 2.4e15
    assert found["share"] == pytest.approx(1 / 3)
    assert compute_facts({"sft": 1.0}, 100, None)["share"] is None


def test_the_tokens_of_other_base_models_come_from_the_recipe():
    assert base_tokens(EMBEDDED_MODEL, None) == 2e12
    assert base_tokens("owner/name", None) is None
    assert base_tokens("owner/name", ModelHubConfig(license="mit", base_training_tokens=15e12)) == 15e12
