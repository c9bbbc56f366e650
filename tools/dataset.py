"""The commands `inspect`, which reports on a dataset file, and `push-dataset`, which publishes a dataset of a run."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from llm_engineering.errors import RequestError
from llm_engineering.recipe.data_blocks import HubConfig
from llm_engineering.recipe.loading import load_recipe, recipe_hash, stored_recipe
from llm_engineering.recipe.recipe import Recipe
from llm_engineering.recipe.stages import STAGES
from tools.cli import DEFAULT_RECIPE, Config, Json, Overrides, prepare_zenml

if TYPE_CHECKING:
    from datasets import DatasetDict
    from zenml.models import ArtifactVersionResponse, ModelVersionResponse

    from llm_engineering.publish.dataset_card import CardFacts, Kind

logger = logging.getLogger("llm_engineering.dataset")


def inspect(
    file: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="A file, a folder saved by `datasets`, or the id of a dataset on the hub. Append #SPLIT to choose a split.",
        ),
    ],
    config: Config = DEFAULT_RECIPE,
    overrides: Overrides = None,
    against: Annotated[
        str | None,
        typer.Option(
            "--against", metavar="EVAL_FILE", help="Report rows of this evaluation file that are also in DATA."
        ),
    ] = None,
    as_json: Json = False,
) -> int:
    """Report on a dataset file without training on it.

    The report shows the format, the rows that would be set aside and why, the duplicates, the lengths in tokens, and
    whether the file is fit to train on. The tokenizer and the rules come from the recipe.

    Example: `llm-engineering inspect rows.jsonl --against evaluation.jsonl`
    """
    if file in ("", "."):
        raise RequestError("The name of a dataset is missing. Add it: make inspect DATA=rows.jsonl")
    recipe = load_recipe(config, overrides or ())

    from llm_engineering.models.chat_template import pin_chat_template
    from llm_engineering.models.revision import pin_revision
    from llm_engineering.models.tokenizer import load_tokenizer
    from llm_engineering.recipe.settings import Settings
    from llm_engineering.reports.data_report import inspect_file

    settings = Settings()
    settings.check_writable()
    model = pin_revision(recipe.model)
    formatting = pin_chat_template(recipe.formatting, model, settings)
    tokenizer = load_tokenizer(model, settings, formatting.chat_template)
    folder = settings.llm_output_dir / "inspect" / Path(file).name.partition(".")[0]
    report = inspect_file(file, against, tokenizer, recipe.data, formatting, folder)
    _print_report(report, folder)
    if as_json:
        print(json.dumps(report))
    return 0


def push_dataset(
    kind: Annotated[
        Literal["instruction", "preference", "labelled", "prompt"],
        typer.Argument(
            help="Dataset to publish: instruction (questions with answers), preference (pairs of answers), labelled (good and "
            "bad answers) or prompt (questions with accepted answers)."
        ),
    ],
    config: Config = DEFAULT_RECIPE,
    overrides: Overrides = None,
    repo: Annotated[
        str | None,
        typer.Option(
            "--repo", metavar="OWNER/NAME", help="The repository on the hub. Default: the one in the recipe's data.hub."
        ),
    ] = None,
    public: Annotated[
        bool,
        typer.Option(
            "--public", help="Publish in a public repository. Default: as data.hub.private of the recipe says."
        ),
    ] = False,
    allow_secrets: Annotated[
        bool, typer.Option("--allow-secrets", help="Publish the dataset even if credentials were found in it.")
    ] = False,
) -> int:
    """Publish a dataset of the last run on the Hugging Face Hub.

    The recipe must name the licence: `--set data.hub.license=cc-by-4.0`.

    Example: `llm-engineering push-dataset instruction --repo someone/handbook-questions`
    """
    recipe = load_recipe(config, overrides or ())
    hub = recipe.data.hub
    if hub is None:
        raise RequestError(
            "The recipe names no licence for publishing the data. Add one, for example "
            "--set data.hub.license=cc-by-4.0 (`other` if it has no short name)."
        )
    repo_id = repo or getattr(hub, f"{kind}_repo_id")
    if repo_id is None:
        raise RequestError(
            f"The repository for the {kind} dataset is not set: add --repo owner/name, or "
            f"data.hub.{kind}_repo_id to the recipe."
        )
    private = hub.private and not public

    from llm_engineering.publish.dataset_card import render_card
    from llm_engineering.publish.hub import check_repo_id, check_secrets, public_rows
    from llm_engineering.publish.hub import push_dataset as publish
    from llm_engineering.recipe.settings import Settings

    check_repo_id(repo_id)
    prepare_zenml()
    version, dataset_version = newest_dataset(recipe, kind)
    what = f"The newest {kind} dataset of {recipe.name}"
    made_with = stored_recipe(_parameters(dataset_version), what, "Create it again: `make datasets`.")
    dataset = dataset_version.load()
    if not allow_secrets:
        check_secrets(dataset, masked=made_with.data.rules.secret == "mask")
    places = [made_with.model.name_or_path, made_with.documents.path]
    data = made_with.data
    own = map(data.file, ("instruction", "preference", "labelled", "prompt"))
    places += [place for place in own if place is not None]
    rows = public_rows(dataset, places)
    facts = _facts(kind, version, dataset_version, made_with, hub, dataset, rows)

    logger.info("Dataset:     %s version %s of %s", dataset_version.artifact.name, dataset_version.version, recipe.name)
    logger.info("Rows:        %s", ", ".join(f"{name} {count}" for name, count in facts.rows.items()))
    logger.info("Columns:     %s", ", ".join(facts.columns))
    logger.info("Model:       %s", facts.model)
    logger.info("Licence:     %s", hub.license)
    logger.info("Publishing:  %s, %s", repo_id, "private" if private else "PUBLIC: everyone can read it")
    print(publish(rows, render_card(facts), repo_id, private, Settings().hf_token))
    return 0


def _print_report(report: dict[str, Any], folder: Path) -> None:
    logger.info("Format:            %s", report["format"])
    logger.info("Rows:              %d read, %d kept", report["rows"], report["kept"])
    for reason, count in report["quarantined"].items():
        logger.info("  set aside:       %d %s", count, reason)
    logger.info("Exact duplicates:  %d", report["exact_duplicates"])
    logger.info("Near duplicates:   %d", report["near_duplicates"])
    for rule, count in report["findings"].items():
        logger.info("  kept, reported:  %d %s", count, rule)
    logger.info("Leaked into test:  %d", report["leaked_into_test"])
    if report["unread_columns"]:
        logger.info("Columns not read:  %s", ", ".join(report["unread_columns"]))
    if report["respaced_answers"]:
        logger.info(
            "White space:       the chat template changed that of answers in %d rows", report["respaced_answers"]
        )
    for note in report["template"]:
        logger.info("Chat template:     %s", note)
    logger.info("Tokens:            %s", ", ".join(f"{name} {value:g}" for name, value in report["tokens"].items()))
    logger.info("Report:            %s", folder / "report.html")
    logger.info("%s", "Fit to train on." if report["fit_to_train"] else f"Not fit to train on: {report['why']}.")


def newest_dataset(recipe: Recipe, kind: str) -> tuple[ModelVersionResponse, ArtifactVersionResponse]:
    """The model version of the last run that has a dataset of this kind, and the dataset.

    Raises:
        RequestError: no version has one.
    """
    from pipelines.repeats import last_used
    from tools.model_versions.versions import all_versions

    # The newest artifact may not be the last one used: a run can reuse an older one from the cache.
    for version in sorted(all_versions(recipe.name), key=last_used, reverse=True):
        artifact = version.get_artifact(f"{kind}_dataset")
        if artifact is not None:
            return version, artifact
    raise RequestError(f"{recipe.name} has no {kind} dataset yet. Create one: `make datasets`.")


def _parameters(dataset: ArtifactVersionResponse) -> dict[str, Any]:
    """The parameters of the pipeline run that created the dataset."""
    return dataset.run.config.parameters or {}


def _facts(
    kind: Kind,
    version: ModelVersionResponse,
    dataset_version: ArtifactVersionResponse,
    made_with: Recipe,
    hub: HubConfig,
    dataset: DatasetDict,
    rows: DatasetDict,
) -> CardFacts:
    """The facts for the dataset card, from the metadata of the runs."""
    from llm_engineering.publish import dataset_card

    data = made_with.data
    own, said = data.own(kind), dataset_card.PEOPLE_SAID if data.only_people(kind) else None
    candidates = version.get_artifact(f"{data.made_of(kind)}_candidates")
    names = [f"formatted_{name}" for name, stage in STAGES.items() if stage.rows == kind]
    formatted = next(filter(None, map(version.get_artifact, names)), None)
    recorded = candidates.run_metadata if candidates else {}
    # Generated pairs come from the instructions, so the prompts are recorded with those.
    instructions = version.get_artifact("instruction_candidates")
    asked: Any = instructions.run_metadata if instructions and not (own or said) else {}
    base = f"{made_with.model.name_or_path}@{made_with.model.revision}"
    wrote = dataset_card.SERVED if said else dataset_card.public_name(str(recorded.get("generated_by", base)))
    return dataset_card.CardFacts(
        name=made_with.name,
        kind=kind,
        hub=hub,
        documents=dataset_card.public_name(own or said or data.file("instruction") or made_with.documents.path),
        model=dataset_card.OWN_DATASET if own else wrote,
        prompts={str(name): str(version) for name, version in dict(asked.get("prompts", {})).items()},
        recipe_hash=recipe_hash(made_with),
        code_version=str(_parameters(dataset_version)["inputs"]["code"]),
        stages=dataset_card.stage_counts(dataset),
        rows={split: len(part) for split, part in rows.items()},
        tokens=int(str(formatted.run_metadata["tokens"])) if formatted else None,
        columns=rows["train"].column_names,
        origins=dataset_card.origins(rows),
        limits=dataset_card.limits(kind, data),
    )
