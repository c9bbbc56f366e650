"""Lists the versions of a recipe's model: python -m tools.models [--limit N] [--json]"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from llm_engineering.recipe.loading import load_recipe
from tools.cli import add_recipe_arguments, exit_code, prepare_zenml, start_logging

# As the report of the evaluation calls them.
SHOWN = ("heldout_loss", "preference_accuracy", "rouge_l")


def main() -> int:
    """Print the table; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.models", description="List the versions of a model.")
    parser.add_argument("--limit", type=int, default=20, help="how many (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="end with one JSON object on stdout")
    add_recipe_arguments(parser)
    arguments = parser.parse_args()
    if arguments.limit < 1:
        parser.error(f"--limit must be at least 1, not {arguments.limit}")
    start_logging(arguments.debug)
    return exit_code(lambda: _list(arguments), arguments.debug)


def _list(arguments: argparse.Namespace) -> int:
    recipe = load_recipe(arguments.config, arguments.set)
    prepare_zenml()
    from tools.versions import all_versions

    versions = [_described(version) for version in all_versions(recipe.name)[: arguments.limit]]
    if arguments.json:
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


if __name__ == "__main__":
    sys.exit(main())
