"""The command `models compare`: what differs between two versions of a model, from what their runs have stored."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from llm_engineering.errors import RequestError
from llm_engineering.recipe.loading import differences, load_recipe, value_at
from llm_engineering.recipe.recipe import Recipe
from llm_engineering.recipe.settings import Settings
from tools.cli import DEFAULT_RECIPE, Config, Json, Overrides, prepare_zenml
from tools.model_versions.provenance import ENDS
from tools.terminal import console, titled_table

logger = logging.getLogger("llm_engineering.versions")

# Hexadecimal digits of a hash that are shown.
_HASH = 12


def compare(
    first: Annotated[str, typer.Argument(metavar="VERSION", help="Number of a version, as `models list` shows it.")],
    second: Annotated[str, typer.Argument(metavar="VERSION", help="Number of the version to compare with it.")],
    config: Config = DEFAULT_RECIPE,
    overrides: Overrides = None,
    as_json: Json = False,
) -> int:
    """Compare two versions: recipes, data, measures with paired intervals, curves and answers.

    Nothing is measured again. Measures on other held-out rows are not compared. A page shows all of it.

    Example: `llm-engineering models compare 3 5`
    """
    recipe = load_recipe(config, overrides or ())
    if first.strip() == second.strip():
        raise RequestError(f"Both versions are {first}. Name two: `make models` lists them.")
    prepare_zenml()
    from llm_engineering.reports.comparison_report import comparison_page
    from llm_engineering.reports.page import write_report
    from tools.model_versions.versions import find_version

    sides = [_side(find_version(recipe.name, number)) for number in (first, second)]
    data = _compared(recipe.name, sides)
    folder = Settings().llm_output_dir / "comparisons" / f"{recipe.name}-{sides[0]['number']}-{sides[1]['number']}"
    write_report(folder, data, comparison_page(data))
    _print(data, sys.stderr if as_json else sys.stdout)
    logger.info("Curves and answers: %s", folder / "report.html")
    if as_json:
        print(json.dumps({name: value for name, value in data.items() if name != "training"}))
    return 0


def _side(version: Any) -> dict[str, Any]:
    """What a version's runs have stored.

    Raises:
        RequestError: the version has no model.
    """
    from pipelines.repeats import linked_artifacts
    from tools.model_versions.versions import newest_artifacts, sources_of, trained_adapter, with_origins

    adapter = trained_adapter(version)
    own = newest_artifacts(version)
    reports: dict[str, list[dict[str, Any]]] = {"data_report": [], "training_report": []}
    for artifact in linked_artifacts(version):
        if artifact.artifact.name in reports:
            reports[artifact.artifact.name].append(artifact.load().report())
    stored = version.run_metadata.get("recipe") or (adapter.artifact.run.config.parameters or {})["recipe"]
    facts: dict[str, Any] = {}
    for artifact in with_origins([own[name] for name in ENDS if name in own]):
        for file, digest in sources_of(artifact).items():
            facts[f"{file}, SHA-256"] = digest[:_HASH]
        if artifact.artifact.name.endswith("_dataset"):
            facts[f"{artifact.artifact.name}, SHA-256"] = str(artifact.content_hash)[:_HASH]
    for report in reports["data_report"]:
        facts |= {f"{report['kind']} rows, {split}": count for split, count in report["rows"].items()}
        for stage, counts in report["stages"].items():
            facts |= {f"{stage}, {name}": counts[name] for name in ("read", "kept")}
            facts |= {f"{stage}, set aside: {reason}": count for reason, count in counts["quarantined"].items()}
    return {
        "number": version.number,
        "made": f"{adapter.name} on {adapter.base.name_or_path}, {version.created:%Y-%m-%d %H:%M} UTC",
        "recipe": _with_defaults(stored),
        "facts": facts,
        "evaluation": own["evaluation_report"].load().report() if "evaluation_report" in own else None,
        "training": {report["stage"]: report["history"] for report in reports["training_report"]},
    }


def _with_defaults(stored: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe with all keys; as it was stored, if its schema is another one."""
    try:
        recipe: dict[str, Any] = Recipe.model_validate(stored).model_dump(mode="json")
        return recipe
    except ValidationError:
        return dict(stored)


def _compared(model: str, sides: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The comparison as JSON: only what differs of the recipes and of the data."""
    from llm_engineering.evaluation.row_values import paired
    from llm_engineering.reports.comparison_report import compared_answers

    recipes, facts = [side["recipe"] for side in sides], [side["facts"] for side in sides]
    reports = [side["evaluation"] for side in sides]
    both = None not in reports
    return {
        "model": model,
        "facts": {f"Version {side['number']}": side["made"] for side in sides},
        "names": [f"version {side['number']}" for side in sides],
        "recipes": [[key, *(_shown(value_at(recipe, key)) for recipe in recipes)] for key in differences(*recipes)],
        "data": [
            [name, *(str(found.get(name, "none")) for found in facts)]
            for name in dict.fromkeys([*facts[0], *facts[1]])
            if facts[0].get(name) != facts[1].get(name)
        ],
        "measures": paired(*reports) if both else {},
        "training": {
            stage: [side["training"].get(stage) for side in sides]
            for stage in dict.fromkeys([*sides[0]["training"], *sides[1]["training"]])
        },
        "answers": compared_answers(*reports) if both else [],
    }


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _print(data: dict[str, Any], file: Any) -> None:
    from llm_engineering.reports.comparison_report import measure_rows, sentences

    shown = console(file, 160)
    first, second = data["names"]
    for title, head, rows in (
        ("Recipes: what differs", ["Key", first, second], data["recipes"]),
        ("Data: what differs", ["What", first, second], data["data"]),
        ("Measures", ["Measure", first, second, f"{second} minus {first}", "Verdict"], measure_rows(data)),
    ):
        table = titled_table(title, *head)
        for row in rows:
            table.add_row(*row)
        if rows:
            shown.print(table)
    for sentence in sentences(data):
        shown.print(sentence)
