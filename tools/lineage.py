"""Shows where a model version comes from, back to the documents: python -m tools.lineage VERSION [--json]"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from llm_engineering.errors import RequestError
from llm_engineering.recipe.loading import load_recipe
from tools.cli import add_recipe_arguments, exit_code, prepare_zenml, start_logging

# Which of a version's artifacts the others are the origin of.
ENDS = ("promotion_decision", "evaluation_report", "dpo_adapter", "sft_adapter")


def main() -> int:
    """Print the tables; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.lineage", description="Show where a model comes from.")
    parser.add_argument("version", help="its number, as `make models` shows it")
    parser.add_argument("--json", action="store_true", help="end with one JSON object on stdout")
    add_recipe_arguments(parser)
    arguments = parser.parse_args()
    start_logging(arguments.debug)
    return exit_code(lambda: _show(arguments), arguments.debug)


def _show(arguments: argparse.Namespace) -> int:
    recipe = load_recipe(arguments.config, arguments.set)
    prepare_zenml()
    from tools.versions import find_version

    found = lineage(recipe.name, find_version(recipe.name, arguments.version))
    if arguments.json:
        print(json.dumps(found))
        return 0
    console = Console(width=None if sys.stdout.isatty() else 240, highlight=False, markup=False)
    facts = _table(f"{recipe.name} version {found['version']}", "What", "Value")
    for name in ("stage", "run", "recipe_hash", "code_version", "base_model", "base_revision"):
        facts.add_row(name.replace("_", " "), str(found[name] or "none"))
    console.print(facts)
    artifacts = _table("Artifacts", "Artifact", "Made by", "Code", "From", "Id", "SHA-256 of SHA256SUMS")
    for artifact in found["artifacts"]:
        artifacts.add_row(
            f"{artifact['name']} v{artifact['version']}",
            artifact["step"],
            artifact["code"],
            "\n".join(artifact["from"]),
            artifact["id"],
            artifact["sha256"] or "not recorded",
        )
    console.print(artifacts)
    sources = _table("Sources", "Read by", "File", "SHA-256")
    for artifact, files in found["sources"].items():
        for file, value in files.items():
            sources.add_row(artifact, file, value)
    console.print(sources)
    if found["changes"]:
        changes = _table("Changes of stage", "When (UTC)", "What", "By", "Note")
        for change in found["changes"]:
            changes.add_row(change["at"][:16].replace("T", " "), change["action"], change["by"], change["note"])
        console.print(changes)
    return 0


def lineage(model: str, version: Any) -> dict[str, Any]:
    """A model version's artifacts back to the documents, with hashes.

    Raises:
        RequestError: its run ended before there was a model.
    """
    from pipelines.registry import adapter_of, history
    from tools.versions import newest_artifacts, producer, sources_of, with_origins

    adapter = adapter_of(version)
    if adapter is None:
        raise RequestError(f"{model} version {version.number} has no model: its run ended before. See `make runs`.")
    own = newest_artifacts(version)
    chain = list(with_origins([own[name] for name in ENDS if name in own]))
    facts = version.run_metadata
    artifacts, sources = [], {}
    for artifact in chain:
        step = producer(artifact)
        given = [g for versions in step.inputs.values() for g in versions] if step is not None else []
        artifacts.append(
            {
                "name": artifact.artifact.name,
                "version": artifact.version,
                "id": str(artifact.id),
                "uri": artifact.uri,
                "sha256": artifact.content_hash,
                "step": step.name if step is not None else "",
                "code": step.config.environment.get("CODE_VERSION", "") if step is not None else "",
                "from": [f"{g.artifact.name} v{g.version}" for g in given],
            }
        )
        if recorded := sources_of(artifact):
            sources[f"{artifact.artifact.name} v{artifact.version}"] = recorded
    return {
        "model": model,
        "version": version.number,
        "id": str(version.id),
        "stage": version.stage,
        "run": next((artifact.run.name for artifact in chain[:1]), None),
        "recipe_hash": facts.get("recipe_hash"),
        "code_version": facts.get("code_version"),
        "base_model": adapter.base.name_or_path,
        "base_revision": adapter.base.revision,
        "artifacts": artifacts,
        "sources": sources,
        "changes": [change.model_dump(mode="json") for change in history(model) if change.version == version.number],
    }


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


if __name__ == "__main__":
    sys.exit(main())
