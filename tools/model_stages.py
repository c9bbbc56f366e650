"""The commands that list the versions of a model and move them between stages: models list, promote, rollback."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from llm_engineering.errors import RequestError
from llm_engineering.recipe.loading import load_recipe
from tools.cli import DEFAULT_RECIPE, Config, Json, Note, Overrides, VersionNumber, prepare_zenml

# As the report of the evaluation calls them.
SHOWN = ("heldout_loss", "preference_accuracy", "rouge_l")


def list_versions(
    config: Config = DEFAULT_RECIPE,
    overrides: Overrides = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="How many.")] = 20,
    as_json: Json = False,
) -> int:
    """List the versions of a model.

    The recipe says which model is meant.

    Example: `llm-engineering models list --limit 5`
    """
    recipe = load_recipe(config, overrides or ())
    prepare_zenml()
    from tools.versions import all_versions

    versions = [_described(version) for version in all_versions(recipe.name)[:limit]]
    if as_json:
        print(json.dumps({"model": recipe.name, "versions": versions}))
        return 0
    if not versions:
        print(f"There is no version of {recipe.name} yet. `make run-sft` makes the first one.")
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
            ", ".join(f"{name} v{number}" for name, number in version["data"].items()),
            version["made"].replace("T", " ")[:16],
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    return 0


def promote(
    version: VersionNumber,
    config: Config = DEFAULT_RECIPE,
    overrides: Overrides = None,
    note: Note = "",
    force: Annotated[
        bool, typer.Option("--force", help="Promote also a version that did not pass its gate. Needs --note.")
    ] = False,
) -> int:
    """Move a model version to production.

    The version has to have passed its gate against the version that is in production now.

    Example: `llm-engineering models promote 3 --note "better on the new documents"`
    """
    note = note.strip()
    if force and not note:
        raise RequestError(
            "--force needs a NOTE that says why: make promote VERSION=… ARGS=--force NOTE='who asked for it, and why'"
        )
    recipe = load_recipe(config, overrides or ())
    prepare_zenml()
    from pipelines.registry import StaleError, adapter_of, move, person, stages
    from tools.versions import find_version

    found = find_version(recipe.name, version)
    production = stages(recipe.name).production
    now = production[-1].number if production else None
    if now == found.number:
        raise RequestError(f"{recipe.name} version {now} is in production already.")
    if adapter_of(found) is None:
        raise RequestError(f"{recipe.name} version {found.number} has no model: its run ended before. See make runs.")
    against = now
    if not force:
        artifact = found.get_artifact("promotion_decision")
        decision = artifact.load() if artifact is not None else None
        if decision is None or not decision.passed:
            why = "Its run ended before the gate." if decision is None else decision.reason
            raise RequestError(
                f"{recipe.name} version {found.number} has not passed its gate. {why} To promote it all the same: "
                "ARGS=--force NOTE='why'."
            )
        against = decision.incumbent
    try:
        move(found, "production", against, person(), note)
    except StaleError as error:
        if force:
            raise RequestError(
                f"Production of {recipe.name} has changed since the command began: version {found.number} is not "
                "promoted. See `make models`, and repeat the command if it still holds."
            ) from error
        raise RequestError(
            f"{recipe.name} version {found.number} passed its gate, but {error}. Run it again to be judged against that "
            "(training comes from the cache), or promote it all the same: ARGS=--force NOTE='why'."
        ) from error
    former = f"version {now} was there before, `make rollback` puts it back" if now is not None else "the first one"
    print(f"{recipe.name} version {found.number} is in production: {former}.")
    return 0


def rollback(config: Config = DEFAULT_RECIPE, overrides: Overrides = None, note: Note = "") -> int:
    """Put the former production version back.

    Example: `llm-engineering models rollback --note "answers are too long"`
    """
    recipe = load_recipe(config, overrides or ())
    prepare_zenml()
    from pipelines.registry import person, roll_back

    state = roll_back(recipe.name, person(), note.strip())
    print(f"{recipe.name} version {state.production[-1].number} is in production again.")
    return 0


def _described(version: Any) -> dict[str, Any]:
    """What the table shows of a model version; `measures` are those of the model that its run ended with."""
    from pipelines.registry import adapter_of
    from tools.versions import newest_artifacts

    adapter = adapter_of(version)
    facts = version.run_metadata
    artifacts = newest_artifacts(version)
    decision = artifacts.get("promotion_decision")
    ending = f"_{adapter.name}" if adapter is not None else None
    measures = {k.removesuffix(ending): v for k, v in facts.items() if k.endswith(ending)} if ending else {}
    data = {
        name: artifacts[f"{name}_dataset"] for name in ("instruction", "preference") if f"{name}_dataset" in artifacts
    }
    return {
        "version": version.number,
        "id": str(version.id),
        "stage": version.stage,
        "model": adapter.name if adapter is not None else None,
        "gate": decision.run_metadata.get("outcome") if decision is not None else None,
        "measures": measures,
        "data": {name: artifact.version for name, artifact in data.items()},
        "changed": {key: facts[key] for key in ("stage_change", "changed_by", "changed_at", "note") if key in facts},
        "made": version.created.isoformat(),
    }
