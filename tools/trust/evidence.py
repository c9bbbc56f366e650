"""The command `models evidence`: what a version is made of, from its lineage, as a page, as JSON and as a bill of materials."""

from __future__ import annotations

import json
import sys
from typing import Any

from llm_engineering.recipe.loading import load_recipe
from llm_engineering.recipe.recipe import Recipe
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.stages import STAGES
from tools.cli import DEFAULT_RECIPE, Config, Json, Overrides, VersionNumber, prepare_zenml


def evidence(
    version: VersionNumber, config: Config = DEFAULT_RECIPE, overrides: Overrides = None, as_json: Json = False
) -> int:
    """Write a page, JSON and a bill of materials that show what a version is made of.

    They contain the training content, licences, operations, measures with intervals, signatures and libraries. Everything
    comes from the lineage. Only licences and the tokens of the base model's training come from the recipe's `hub` block.

    Example: `llm-engineering models evidence 3`
    """
    recipe = load_recipe(config, overrides or ())
    prepare_zenml()
    from llm_engineering.publish.bom import bill_of_materials
    from llm_engineering.reports.evidence_report import evidence_page
    from llm_engineering.reports.page import write_report
    from tools.model_versions.versions import find_version

    found = find_version(recipe.name, version)
    data = _gathered(recipe, found)
    folder = Settings().llm_output_dir / "evidence" / f"{recipe.name}-{found.number}"
    write_report(folder, data, evidence_page(data))
    (folder / "bom.cdx.json").write_text(json.dumps(bill_of_materials(data), indent=2), encoding="utf-8")
    print(folder / "report.html", file=sys.stderr if as_json else sys.stdout)
    if as_json:
        print(json.dumps(data))
    return 0


def _gathered(recipe: Recipe, version: Any) -> dict[str, Any]:
    """Everything that was recorded of a version.

    Args:
        recipe: the recipe of the command, for licences and the base model's tokens.

    Raises:
        RequestError: the version has no model, or was made with another version of the recipe's schema.
    """
    import torch

    from llm_engineering.models.base_model import load_config
    from llm_engineering.models.fit import on_meta
    from llm_engineering.publish import dataset_card
    from llm_engineering.publish.bom import base_tokens, compute_facts
    from llm_engineering.publish.model_card import base_licence, data_licence
    from tools.model_versions.handover import data_limits, dataset_facts, recipe_of
    from tools.model_versions.provenance import describe, lineage_of
    from tools.model_versions.versions import newest_artifacts, trained_adapter

    lineage = lineage_of(recipe.name, version)
    adapter, own, made_with = trained_adapter(version), newest_artifacts(version), recipe_of(version)
    chain = [stage for stage in made_with.chain_to(adapter.name) if stage in lineage["training"]]
    kinds: dict[str, str] = {}
    for stage in made_with.chain_to(adapter.name):
        kinds.setdefault(STAGES[stage].rows, f"formatted_{stage}")
    datasets = [
        {
            **dataset_facts(kind, formatted, own, made_with).model_dump(),
            "origins": dataset_card.origins(own[f"{kind}_dataset"].load()),
        }
        for kind, formatted in kinds.items()
    ]
    environments = {stage: facts["environment"] for stage, facts in lineage["training"].items()}
    config = load_config(adapter.base, Settings())
    base = on_meta(config, torch.float32, "eager", recipe.model.trust_remote_code)
    name, hub = adapter.base.name_or_path, recipe.hub
    return {
        "model": {
            "name": recipe.name,
            "version": version.number,
            "id": lineage["id"],
            "created": f"{version.created:%Y-%m-%dT%H:%M:%SZ}",
            "stage": lineage["stage"],
            "trained_stage": adapter.name,
            "sha256": adapter.artifact.content_hash,
            "lineage": {
                **{key: str(lineage[key]) for key in ("run", "recipe_hash", "code_version")},
                **{f"{stage} trained with": describe(environment) for stage, environment in environments.items()},
                **{f"{a['name']} v{a['version']}": a["sha256"] or "not recorded" for a in lineage["artifacts"]},
            },
        },
        "base": {
            "name": dataset_card.public_name(name),
            "revision": str(adapter.base.revision),
            "architecture": config.model_type,
        },
        "datasets": datasets,
        "sources": [
            [artifact, dataset_card.public_name(file), value]
            for artifact, files in lineage["sources"].items()
            for file, value in files.items()
        ],
        "people": lineage["people"],
        "licences": {
            "model": hub.license if hub is not None else None,
            "base_model": base_licence(name, hub),
            "data": data_licence(made_with) or (recipe.data.hub.license if recipe.data.hub is not None else None),
        },
        "compute": compute_facts(
            {stage: lineage["training"][stage]["flops"] for stage in chain},
            sum(parameter.numel() for parameter in base.parameters()),
            base_tokens(name, hub),
        ),
        # A version may not be evaluated.
        "measures": own["evaluation_report"].load().report()["measures"] if "evaluation_report" in own else {},
        "limits": data_limits(list(kinds), made_with),
        "packages": {name: v for environment in environments.values() for name, v in environment["packages"].items()},
        "signatures": _signatures(version),
        "replay": _replay(recipe.name, version.number),
    }


def _signatures(version: Any) -> list[dict[str, str]]:
    """The signatures that are artifacts of the version; empty if it is not signed."""
    from pipelines.repeats import linked_artifacts
    from tools.model_versions.signatures import SIGNATURES

    return [
        {
            "version": str(artifact.version),
            "created": f"{artifact.created:%Y-%m-%d %H:%M}",
            "facts": ", ".join(
                f"{name} {value}" for name, value in artifact.run_metadata.items() if isinstance(value, str)
            ),
        }
        for artifact in linked_artifacts(version)
        if artifact.artifact.name == SIGNATURES
    ]


def _replay(model: str, number: int) -> dict[str, Any] | None:
    """The report of the last replay of a version; None if it was never replayed to the end."""
    file = Settings().llm_output_dir / "replays" / f"{model}-{number}" / "report.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
