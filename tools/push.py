"""Publishes a dataset on the Hugging Face Hub: python -m tools.push {instruction,preference} [--repo owner/name]"""

from __future__ import annotations

import argparse
import logging
import sys
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from llm_engineering.errors import RequestError
from llm_engineering.recipe.data_blocks import HubConfig
from llm_engineering.recipe.loading import differences, load_recipe, recipe_hash
from llm_engineering.recipe.recipe import Recipe
from tools.cli import exit_code, prepare_zenml, start_logging

if TYPE_CHECKING:
    from datasets import DatasetDict
    from zenml.models import ArtifactVersionResponse, ModelVersionResponse

    from llm_engineering.publish.dataset_card import CardFacts, Kind

logger = logging.getLogger("llm_engineering.push")

FORMATTED = {"instruction": "formatted_sft", "preference": "formatted_dpo"}


def main() -> int:
    """Parse the command line and publish; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.push", description="Publish a dataset of the last run.")
    parser.add_argument("kind", choices=("instruction", "preference"))
    parser.add_argument("--config", default="configs/local.yaml", help="the recipe (default: %(default)s)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override one key of the recipe"
    )
    parser.add_argument("--repo", metavar="OWNER/NAME", help="instead of the one in the recipe's data.hub")
    parser.add_argument("--public", action="store_true", help="for everyone to see; without it, private")
    parser.add_argument("--allow-secrets", action="store_true", help="publish although credentials were found")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    arguments = parser.parse_args()
    start_logging(arguments.debug)
    return exit_code(lambda: _push(arguments), arguments.debug)


def _push(arguments: argparse.Namespace) -> int:
    recipe = load_recipe(arguments.config, arguments.set)
    hub = recipe.data.hub
    if hub is None:
        raise RequestError(
            "The recipe does not say under which licence the data may be published. Add it, e.g. "
            "--set data.hub.license=cc-by-4.0 (`other` if it has no short name)."
        )
    named = hub.instruction_repo_id if arguments.kind == "instruction" else hub.preference_repo_id
    repo_id = arguments.repo or named
    if repo_id is None:
        raise RequestError(
            f"No repository is named for the {arguments.kind} dataset: add --repo owner/name, or "
            f"data.hub.{arguments.kind}_repo_id to the recipe."
        )
    private = hub.private and not arguments.public

    from llm_engineering.publish.dataset_card import render_card
    from llm_engineering.publish.hub import check_repo_id, check_secrets, public_rows, push_dataset
    from llm_engineering.recipe.settings import Settings

    check_repo_id(repo_id)
    prepare_zenml()
    version, dataset_version = _newest(recipe, arguments.kind)
    made_with = _made_with(dataset_version, recipe, arguments.kind)
    dataset = dataset_version.load()
    if not arguments.allow_secrets:
        check_secrets(dataset, masked=made_with.data.rules.secret == "mask")
    places = [made_with.model.name_or_path, made_with.documents.path]
    places += [place for place in (made_with.data.instructions, made_with.data.preferences) if place is not None]
    rows = public_rows(dataset, places)
    facts = _facts(arguments.kind, version, dataset_version, made_with, hub, dataset, rows)

    logger.info("Dataset:     %s version %s of %s", dataset_version.artifact.name, dataset_version.version, recipe.name)
    logger.info("Rows:        %s", ", ".join(f"{name} {count}" for name, count in facts.rows.items()))
    logger.info("Columns:     %s", ", ".join(facts.columns))
    logger.info("Model:       %s", facts.model)
    logger.info("Licence:     %s", hub.license)
    logger.info("Publishing:  %s, %s", repo_id, "private" if private else "PUBLIC: everyone can read it")
    print(push_dataset(rows, render_card(facts), repo_id, private, Settings().hf_token))
    return 0


def _newest(recipe: Recipe, kind: str) -> tuple[ModelVersionResponse, ArtifactVersionResponse]:
    """The newest run's model version that holds a dataset of this kind, and the dataset."""
    from zenml.client import Client

    # A cached dataset is older than the run that used it last, so the runs are asked, not the artifacts.
    try:
        versions = Client().list_model_versions(model=recipe.name, sort_by="desc:number", size=100).items
    except KeyError:
        versions = []
    for version in versions:
        artifact = version.get_artifact(f"{kind}_dataset")
        if artifact is not None:
            return version, artifact
    raise RequestError(f"There is no {kind} dataset of {recipe.name} yet. `make datasets` makes one.")


def _made_with(dataset: ArtifactVersionResponse, recipe: Recipe, kind: str) -> Recipe:
    """The recipe that the dataset was made with.

    Raises:
        RequestError: it differs from the present one in what decides the rows.
    """
    try:
        made_with = Recipe.model_validate(_parameters(dataset)["recipe"])
    except (KeyError, ValidationError) as error:
        raise RequestError(
            f"The newest {kind} dataset of {recipe.name} was made with another version of the recipe's schema. "
            "Make it anew: `make datasets`."
        ) from error
    different = differences(_deciding(made_with, kind), _deciding(recipe, kind))
    if different:
        raise RequestError(
            f"The newest {kind} dataset of {recipe.name} was made with another recipe: {', '.join(different)} differ. "
            "Make it anew (`make datasets`), or give the recipe it was made with."
        )
    return made_with


def _parameters(dataset: ArtifactVersionResponse) -> dict[str, Any]:
    """What the pipeline run that made the dataset was given."""
    return dataset.run.config.parameters or {}


def _deciding(recipe: Recipe, kind: str) -> dict[str, Any]:
    """The part of a recipe that decides the rows."""
    other = {"preferences", "test_preferences"} if kind == "instruction" else set()
    return {
        "seed": recipe.seed,
        # The revision is pinned when a run starts.
        "model": {"name_or_path": recipe.model.name_or_path},
        **recipe.model_dump(mode="json", include={"documents", "generation"}),
        "data": recipe.data.model_dump(mode="json", exclude={"hub", *other}),
    }


def _facts(
    kind: Kind,
    version: ModelVersionResponse,
    dataset_version: ArtifactVersionResponse,
    made_with: Recipe,
    hub: HubConfig,
    dataset: DatasetDict,
    rows: DatasetDict,
) -> CardFacts:
    """What the runs recorded about the dataset."""
    from llm_engineering.publish import dataset_card

    own = made_with.data.instructions if kind == "instruction" else made_with.data.preferences
    candidates = version.get_artifact(f"{kind}_candidates")
    formatted = version.get_artifact(FORMATTED[kind])
    recorded = candidates.run_metadata if candidates else {}
    # Pairs come from instructions, which the prompts asked for.
    instructions = version.get_artifact("instruction_candidates")
    asked: Any = instructions.run_metadata if instructions and not own else {}
    base = f"{made_with.model.name_or_path}@{made_with.model.revision}"
    return dataset_card.CardFacts(
        name=made_with.name,
        kind=kind,
        hub=hub,
        documents=dataset_card.public_name(own or made_with.data.instructions or made_with.documents.path),
        model=dataset_card.OWN_DATASET if own else dataset_card.public_name(str(recorded.get("generated_by", base))),
        prompts={str(name): str(version) for name, version in dict(asked.get("prompts", {})).items()},
        recipe_hash=recipe_hash(made_with),
        code_version=str(_parameters(dataset_version)["inputs"]["code"]),
        stages=dataset_card.stage_counts(dataset),
        rows={split: len(part) for split, part in rows.items()},
        tokens=int(str(formatted.run_metadata["tokens"])) if formatted else None,
        columns=rows["train"].column_names,
        origins=dataset_card.origins(rows),
        limits=dataset_card.limits(kind, own is not None, made_with.data.rules),
    )


if __name__ == "__main__":
    sys.exit(main())
