"""The commands `models list`, `models promote` and `models rollback`: the versions of a model and their stages."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.table import Table

from llm_engineering.errors import RequestError
from llm_engineering.recipe.data_blocks import UNFIT
from llm_engineering.recipe.loading import load_recipe
from llm_engineering.recipe.stages import STAGES
from tools.cli import DEFAULT_RECIPE, Config, Json, Note, Overrides, VersionNumber, prepare_zenml
from tools.terminal import console

# Measures in the table, under their names in the evaluation report.
SHOWN = ("exam_accuracy", "heldout_loss", "preference_accuracy", "rouge_l")


def list_versions(
    config: Config = DEFAULT_RECIPE,
    overrides: Overrides = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Maximum number of versions.")] = 20,
    as_json: Json = False,
) -> int:
    """List the versions of a model.

    The name in the recipe is the name of the model.

    Example: `llm-engineering models list --limit 5`
    """
    recipe = load_recipe(config, overrides or ())
    prepare_zenml()
    from tools.model_versions.versions import all_versions
    from tools.results import repair_killed

    repair_killed()
    versions = [_described(version) for version in all_versions(recipe.name)[:limit]]
    if as_json:
        print(json.dumps({"model": recipe.name, "versions": versions}))
        return 0
    if not versions:
        print(f"{recipe.name} has no version yet. Create the first one: `make run-sft CONFIG={config}`.")
        return 0
    table = Table("Version", "Stage", "Model", "Gate", *SHOWN, "Data", "Made (UTC)", title=recipe.name)
    for version in versions:
        measures = [f"{version['measures'][name]:.4f}" if name in version["measures"] else "" for name in SHOWN]
        table.add_row(
            str(version["version"]),
            version["stage"] or "",
            version["model"] or "none",
            version["gate"] or "not reached",
            *measures,
            ", ".join(f"{name} v{number}" for name, number in version["data"].items())
            + (f", not fit: {', '.join(version[UNFIT])}" if version[UNFIT] else ""),
            version["made"].replace("T", " ")[:16],
        )
    console(width=160).print(table)
    return 0


def promote(
    version: VersionNumber,
    config: Config = DEFAULT_RECIPE,
    overrides: Overrides = None,
    note: Note = "",
    force: Annotated[
        bool, typer.Option("--force", help="Promote the version even if it did not pass its gate. Needs --note.")
    ] = False,
) -> int:
    """Move a model version to production.

    The version must have passed its gate, and the gate must have compared it with the current production version.

    Example: `llm-engineering models promote 3 --note "better on the new documents"`
    """
    note = note.strip()
    if force and not note:
        raise RequestError(
            "--force needs a NOTE with the reason: make promote VERSION=… ARGS=--force NOTE='who asked for it, and why'"
        )
    recipe = load_recipe(config, overrides or ())
    prepare_zenml()
    from llm_engineering.recipe.settings import Settings
    from pipelines.registry import StaleError, move, person, stages
    from tools.model_versions.signatures import check_signature, parts_of
    from tools.model_versions.versions import find_version, trained_adapter

    found = find_version(recipe.name, version)
    production = stages(recipe.name).production
    now = production[-1].number if production else None
    if now == found.number:
        raise RequestError(
            f"{recipe.name} version {now} is already in production. Choose another version: `make models` lists them."
        )
    if not STAGES[trained_adapter(found).name].policy:
        raise RequestError(
            f"{recipe.name} version {found.number} holds a reward model, which answers nothing, so it is not promoted: name it by "
            f"its version, e.g. llm-engineering compare --best-of 8 --reward-model {found.number}."
        )
    settings = Settings()
    for part in parts_of(found):
        check_signature(found, part, settings)
    against = now
    if not force:
        artifact = found.get_artifact("promotion_decision")
        decision = artifact.load() if artifact is not None else None
        if decision is None or not decision.passed:
            why = "Its run ended before the gate." if decision is None else decision.reason
            raise RequestError(
                f"{recipe.name} version {found.number} has not passed its gate. {why} To promote it anyway, add "
                "ARGS=--force NOTE='reason'."
            )
        against = decision.incumbent
    try:
        move(found, "production", against, person(), note)
    except StaleError as error:
        if force:
            raise RequestError(
                f"Production of {recipe.name} changed while the command ran, so version {found.number} was not "
                "promoted. See `make models`, and run the command again if you still want to promote it."
            ) from error
        raise RequestError(
            f"{recipe.name} version {found.number} passed its gate, but {error}. Run the training command again: the gate then "
            "compares with the current production version, and training comes from the cache. To promote this version anyway, "
            "add ARGS=--force NOTE='reason'."
        ) from error
    former = f" Version {now} was there before: `make rollback` restores it." if now is not None else ""
    print(f"{recipe.name} version {found.number} is in production.{former}")
    return 0


def rollback(config: Config = DEFAULT_RECIPE, overrides: Overrides = None, note: Note = "") -> int:
    """Move the previous production version back to production.

    Example: `llm-engineering models rollback --note "answers are too long"`
    """
    recipe = load_recipe(config, overrides or ())
    prepare_zenml()
    from pipelines.registry import person, roll_back

    state = roll_back(recipe.name, person(), note.strip())
    print(f"{recipe.name} version {state.production[-1].number} is in production again.")
    return 0


def _described(version: Any) -> dict[str, Any]:
    """A model version as a row of the table; `measures` are those of the last model that its run trained."""
    from pipelines.registry import adapter_of
    from tools.model_versions.versions import newest_artifacts

    adapter = adapter_of(version)
    facts = version.run_metadata
    artifacts = newest_artifacts(version)
    decision = artifacts.get("promotion_decision")
    ending = f"_{adapter.name}" if adapter is not None else None
    measures = {k.removesuffix(ending): v for k, v in facts.items() if k.endswith(ending)} if ending else {}
    data = {
        name: artifacts[f"{name}_dataset"]
        for name in ("instruction", "preference", "labelled", "prompt")
        if f"{name}_dataset" in artifacts
    }
    return {
        "version": version.number,
        "id": str(version.id),
        "stage": version.stage,
        "model": adapter.name if adapter is not None else None,
        "gate": decision.run_metadata.get("outcome") if decision is not None else None,
        "measures": measures,
        "data": {name: artifact.version for name, artifact in data.items()},
        UNFIT: facts.get(UNFIT, {}),
        "changed": {key: facts[key] for key in ("stage_change", "changed_by", "changed_at", "note") if key in facts},
        "made": version.created.isoformat(),
    }
