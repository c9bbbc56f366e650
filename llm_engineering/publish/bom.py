"""The bill of materials of a model in CycloneDX 1.6 (ECMA-424), and the operations of its training.

The JSON is written here, because cyclonedx-python-lib has no model cards. The tests validate it with that library's schema.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from llm_engineering.recipe.data_blocks import ModelHubConfig
from llm_engineering.recipe.model_blocks import EMBEDDED_MODEL
from llm_engineering.recipe.stages import STAGES

# Tokens that known base models were trained on. SmolLM2-135M: arXiv:2502.02737.
_BASE_TOKENS = {EMBEDDED_MODEL: 2e12}
_APPROACHES = {"text": "self-supervised", "prompt": "reinforcement-learning"}


def base_tokens(base: str, hub: ModelHubConfig | None) -> float | None:
    """Tokens that a base model was trained on, by its name or from the recipe; None if they are not known."""
    return _BASE_TOKENS.get(base) or (hub.base_training_tokens if hub is not None else None)


def compute_facts(flops: Mapping[str, float], parameters: int, tokens: float | None) -> dict[str, Any]:
    """The floating-point operations of the stages, and their share of those of the base model's training.

    Args:
        flops: operations by stage.
        parameters: number of the base model's parameters, N.
        tokens: tokens that the base model was trained on, D; its training took 6·N·D operations. None if they are not known.

    Returns:
        `base_flops` and `share` are None if `tokens` is not known.
    """
    total = sum(flops.values())
    base = 6 * parameters * tokens if tokens is not None else None
    return {
        "stages": dict(flops),
        "total": total,
        "base_parameters": parameters,
        "base_tokens": tokens,
        "base_flops": base,
        "share": total / base if base is not None else None,
    }


def bill_of_materials(evidence: Mapping[str, Any]) -> dict[str, Any]:
    """The bill of materials as CycloneDX JSON: the model with its card, its base model, datasets and libraries.

    Args:
        evidence: what `models evidence` has gathered. The same evidence gives the same bytes.
    """
    model, base = evidence["model"], evidence["base"]
    datasets = [
        {
            "type": "data",
            "bom-ref": f"dataset:{data['name']}",
            "name": data["name"],
            "version": data["version"],
            "hashes": _hashes(data["sha256"]),
            "licenses": _licences(evidence["licences"]["data"]),
            "data": [
                {
                    "type": "dataset",
                    "name": data["name"],
                    "contents": {"properties": _properties({**data["rows"], **_prefixed("origin", data["origins"])})},
                }
            ],
        }
        for data in evidence["datasets"]
    ]
    libraries = [
        {
            "type": "library",
            "bom-ref": f"pkg:pypi/{name}@{version}",
            "name": name,
            "version": version,
            # Names as PyPI normalises them. A local version as 2.13.0+cpu has a character that is escaped.
            "purl": f"pkg:pypi/{re.sub(r'[-_.]+', '-', name).lower()}@{quote(version)}",
        }
        for name, version in evidence["packages"].items()
    ]
    ancestor = {
        "type": "machine-learning-model",
        "bom-ref": "base-model",
        "name": base["name"],
        "version": base["revision"],
        "licenses": _licences(evidence["licences"]["base_model"]),
    }
    component = {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": model["name"],
        "version": str(model["version"]),
        "hashes": _hashes(model["sha256"]),
        "licenses": _licences(evidence["licences"]["model"]),
        "pedigree": {"ancestors": [{key: value for key, value in ancestor.items() if key != "bom-ref"}]},
        "modelCard": {
            "modelParameters": {
                "approach": {"type": _APPROACHES.get(STAGES[model["trained_stage"]].rows, "supervised")},
                "task": "text-generation",
                "architectureFamily": "transformer",
                "modelArchitecture": base["architecture"],
                "datasets": [{"ref": data["bom-ref"]} for data in datasets],
                "inputs": [{"format": "text"}],
                "outputs": [{"format": "text"}],
            },
            "quantitativeAnalysis": {"performanceMetrics": _metrics(evidence["measures"])},
            "considerations": {"technicalLimitations": evidence["limits"]},
        },
        "properties": _properties(
            {**_prefixed("lineage", model["lineage"]), **_prefixed("flops", evidence["compute"]["stages"])}
        ),
    }
    parts = [ancestor, *datasets, *libraries]
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{model['id']}",
        "version": 1,
        "metadata": {
            "timestamp": model["created"],
            "tools": {"components": [{"type": "application", "name": "llm-engineering"}]},
            "component": component,
        },
        "components": parts,
        "dependencies": [{"ref": "model", "dependsOn": [part["bom-ref"] for part in parts]}],
    }


def _metrics(measures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each measure of each model, with its interval."""
    return [
        {
            "type": f"{measure['title']} ({measure['unit']})",
            "value": str(estimate["value"]),
            "slice": name,
            **(
                {"confidenceInterval": {"lowerBound": str(estimate["low"]), "upperBound": str(estimate["high"])}}
                if estimate["low"] is not None
                else {}
            ),
        }
        for measure in measures.values()
        for name, estimate in measure["models"].items()
    ]


def _hashes(sha256: str | None) -> list[dict[str, str]]:
    return [{"alg": "SHA-256", "content": sha256}] if sha256 else []


def _licences(name: str | None) -> list[dict[str, Any]]:
    # As a name: the hub's short names are no SPDX identifiers.
    return [{"license": {"name": name}}] if name else []


def _prefixed(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}:{name}": value for name, value in values.items()}


def _properties(values: Mapping[str, Any]) -> list[dict[str, str]]:
    return [{"name": f"llm-engineering:{name}", "value": str(value)} for name, value in values.items()]
