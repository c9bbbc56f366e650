"""Gathers what the runs recorded about a model version, for its card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from zenml.models import ArtifactVersionResponse

from llm_engineering.errors import RequestError
from llm_engineering.publish import dataset_card as data_card
from llm_engineering.publish.merge import VERIFICATION
from llm_engineering.publish.model_card import DatasetFacts, ModelCardFacts
from llm_engineering.publish.verification import Verification
from llm_engineering.recipe.recipe import Recipe
from tools.promoted import Found
from tools.versions import newest_artifacts


def card_facts(found: Found, merged: Path, recipe: Recipe) -> ModelCardFacts:
    """What the card of a merged model says; `recipe` is the present one, which says how it is published.

    Raises:
        RequestError: the version was made with another version of the recipe's schema, or was not evaluated.
    """
    number = found.version.number
    try:
        made_with = Recipe.model_validate(found.version.run_metadata["recipe"])
    except (KeyError, ValidationError) as error:
        raise RequestError(
            f"Version {number} of {recipe.name} was made with another version of the recipe's schema, or its run ended "
            "before the gate: make it anew with the run command."
        ) from error
    own = newest_artifacts(found.version)
    if "evaluation_report" not in own:
        raise RequestError(f"Version {number} of {recipe.name} was not evaluated: its card would say nothing of it.")
    kinds = {"instruction": "formatted_sft", **({"preference": "formatted_dpo"} if found.name == "dpo" else {})}
    report = json.loads((own["evaluation_report"].load().path / "report.json").read_text(encoding="utf-8"))
    adapter = own[f"{found.name}_adapter"]
    limits = [
        limit
        for kind in kinds
        for limit in data_card.limits(kind, _own_dataset(made_with, kind) is not None, made_with.data.rules)  # type: ignore[arg-type]
    ]
    return ModelCardFacts(
        recipe=made_with,
        hub=recipe.hub,
        version=number,
        stage=found.name,
        datasets=[_dataset(kind, formatted, own, made_with) for kind, formatted in kinds.items()],
        report=report,
        verification=Verification.model_validate_json((merged / VERIFICATION).read_text(encoding="utf-8")),
        data_limits=list(dict.fromkeys(limits)),
        lineage={
            "run": adapter.run.name,
            "recipe": str(found.version.run_metadata["recipe_hash"]),
            "code": str(found.version.run_metadata["code_version"]),
            **{f"{name} version {a.version}": a.content_hash or "no hash recorded" for name, a in own.items()},
        },
    )


def _own_dataset(recipe: Recipe, kind: str) -> str | None:
    return recipe.data.instructions if kind == "instruction" else recipe.data.preferences


def _dataset(kind: str, formatted: str, own: dict[str, ArtifactVersionResponse], recipe: Recipe) -> DatasetFacts:
    dataset = own[f"{kind}_dataset"]
    facts: Any = dataset.run_metadata
    # Generated pairs are made of the instructions, and so of what those were made of.
    source = _own_dataset(recipe, kind)
    origin = own[f"{kind}_candidates"] if source is not None else own.get("documents", own["instruction_candidates"])
    return DatasetFacts(
        name=dataset.artifact.name,
        source=data_card.public_name(source or recipe.data.instructions or recipe.documents.path),
        hash=str(origin.run_metadata["content_hash"]),
        rows={split: facts[split] for split in ("train", "validation", "test")},
        tokens=int(str(own[formatted].run_metadata["tokens"])) if formatted in own else None,
        set_aside=facts["quarantined"],
        version=str(dataset.version),
        sha256=dataset.content_hash,
    )
