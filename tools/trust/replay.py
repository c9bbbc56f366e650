"""The command `models replay`: trains a version again from its lineage in a folder of its own, and compares both.

`python -m tools.trust.replay FOLDER` is the process that trains. It has a ZenML configuration, artifact stores and
outputs of its own, so nothing of the user's is changed, and no stored result is reused.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.table import Table

from llm_engineering.errors import INTERRUPTED, RequestError, WorkError
from llm_engineering.recipe.loading import load_recipe
from llm_engineering.recipe.recipe import Recipe
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.training_blocks import TrackingConfig
from tools.cli import DEFAULT_RECIPE, Config, Json, Overrides, VersionNumber, exit_code, prepare_zenml, start_logging
from tools.terminal import console

logger = logging.getLogger("llm_engineering.replay")

# In the folder of the training process: what it is asked, and what it has made.
_REQUEST, _LINEAGE = "request.json", "lineage.json"
# Artifacts whose files contain times or names of runs. What they say is compared instead.
_REPORTS = ("promotion_decision", "evaluation_page", "evaluation_report", "training_report")


def replay(
    version: VersionNumber, config: Config = DEFAULT_RECIPE, overrides: Overrides = None, as_json: Json = False
) -> int:
    """Train a version again from its lineage, and compare weights, losses, measures and rows.

    First the recorded hashes of documents, datasets and the base model are compared with the present ones. Answers that
    earlier runs have stored are not reused. The exit code is 0 if everything is equal, and 1 if something differs.

    Example: `llm-engineering models replay 3`
    """
    recipe = load_recipe(config, overrides or ())
    Settings().check_writable()
    prepare_zenml()
    from llm_engineering.training.processes.ranks import run_lock
    from tools.model_versions.provenance import lineage_of
    from tools.model_versions.versions import find_version

    found = find_version(recipe.name, version)
    then = lineage_of(recipe.name, found)
    request = _request(found)
    _check_inputs(found)
    folder = (Settings().llm_output_dir / "replays" / f"{recipe.name}-{found.number}").resolve()
    own, written = folder / "run", folder / "report.json"
    with run_lock(folder):
        if written.exists():
            # An earlier replay ended. One that was interrupted continues.
            shutil.rmtree(own, ignore_errors=True)
            written.unlink()
        own.mkdir(exist_ok=True)
        (own / _REQUEST).write_text(json.dumps(request), encoding="utf-8")
        _train(own, then)
        report = _compared(then, json.loads((own / _LINEAGE).read_text(encoding="utf-8")))
        written.write_text(json.dumps(report, indent=2), encoding="utf-8")
        if report["equal"]:
            shutil.rmtree(own)
    _print(report, sys.stderr if as_json else sys.stdout)
    logger.info("%s: %s", "Report" if report["equal"] else "Report and artifacts of the replay", folder)
    if as_json:
        print(json.dumps(report))
    return 0 if report["equal"] else 1


def _request(version: Any) -> dict[str, Any]:
    """What the training process needs: the pipeline, the recipe and the inputs of the run that made the version.

    Raises:
        RequestError: the version has another version's schema of the recipe, or needs a model of another run.
    """
    from pipelines.inputs import Inputs
    from tools.model_versions.versions import newest_artifacts, trained_adapter

    number, own, adapter = version.number, newest_artifacts(version), trained_adapter(version)
    run = own.get("evaluation_report", adapter.artifact).run
    parameters = run.config.parameters or {}
    try:
        recipe = Recipe.model_validate(version.run_metadata.get("recipe", parameters["recipe"]))
        inputs = Inputs.model_validate(parameters["inputs"])
    except (KeyError, ValidationError) as error:
        raise RequestError(
            f"Version {number} was made with another version of the recipe's schema, so it cannot be replayed with this code. "
            "Check out the commit that `make lineage` shows, and replay it there."
        ) from error
    if inputs.reward_models:
        raise RequestError(
            f"Version {number} uses a reward model of another version ({', '.join(inputs.reward_models)}), and a replay trains "
            "only what its own chain trains. Replay that version first; a chain with the stage reward can be replayed as a whole."
        )
    # The replay trains earlier stages itself, and has no model in production.
    inputs = inputs.model_copy(update={"adapters": {}, "incumbent": None})
    recipe = recipe.model_copy(update={"tracking": TrackingConfig(comet="off")})
    pipeline = "retrain" if run.pipeline is not None and run.pipeline.name == "retrain" else adapter.name
    return {"pipeline": pipeline, "recipe": recipe.model_dump(mode="json"), "inputs": inputs.model_dump(mode="json")}


def _check_inputs(version: Any) -> None:
    """Raise a RequestError that names each input, or file of the version, that is not as recorded."""
    from tools.model_versions.provenance import ENDS, check_version
    from tools.model_versions.versions import newest_artifacts, with_origins

    own = newest_artifacts(version)
    findings = check_version(version, list(with_origins([own[name] for name in ENDS if name in own])))
    if findings:
        said = "; ".join(" ".join(filter(None, (f.where, f.file, f.what, f.detail))) for f in findings)
        raise RequestError(
            f"Version {version.number} cannot be replayed, because its inputs are not those of its training: {said}. Restore "
            "these files, and repeat the command."
        )


def _train(folder: Path, then: Mapping[str, Any]) -> None:
    """Run the training process to its end.

    Raises:
        RequestError, WorkError: the process failed. Its log has the reason.
        KeyboardInterrupt: Ctrl-C, SIGTERM or SIGHUP; a checkpoint was saved.
    """
    from llm_engineering.training.processes.launch import run_processes

    said = Settings().llm_output_dir / "said"
    if said.is_dir():
        shutil.copytree(said, folder / "outputs" / "said", dirs_exist_ok=True)
    # ZenML's variables would lead to the user's server, store or repository.
    own = {k: v for k, v in os.environ.items() if not k.startswith("ZENML_") and k != "DISABLE_DATABASE_MIGRATION"}
    own |= {
        "ZENML_CONFIG_PATH": str(folder / "zenml"),
        "ZENML_LOCAL_STORES_PATH": str(folder / "stores"),
        "ZENML_REPOSITORY_PATH": str(folder),
        "LLM_OUTPUT_DIR": str(folder / "outputs"),
    }
    # Sums over another number of threads round differently.
    own["OMP_NUM_THREADS"] = str(max(trained["environment"]["threads"] for trained in then["training"].values()))
    ended = run_processes([sys.executable, "-m", "tools.trust.replay", str(folder)], [own])
    if ended.received is not None or ended.codes == [INTERRUPTED]:
        raise KeyboardInterrupt
    if ended.codes != [0]:
        kind = RequestError if ended.codes == [2] else WorkError
        raise kind(
            f"The replay ended with exit code {ended.codes[0]}; its reason is above. Remove it, and repeat the command: finished "
            "steps are not repeated."
        )


def _retrain(folder: Path) -> int:
    """Train in this process, and write the lineage of the new version."""
    request = json.loads((folder / _REQUEST).read_text(encoding="utf-8"))
    recipe = Recipe.model_validate(request["recipe"])
    from tools.recipe_checks import check_machine

    check_machine(recipe)
    prepare_zenml()
    from pipelines.inputs import Inputs
    from pipelines.repeats import version_of
    from tools import results
    from tools.model_versions.provenance import lineage_of
    from tools.run import launch
    from tools.zenml_store import forget_lost

    results.repair_killed()
    forget_lost()
    runs = launch(request["pipeline"], recipe, Inputs.model_validate(request["inputs"]), cache=True)
    lineage = lineage_of(recipe.name, version_of(runs[-1]))
    (folder / _LINEAGE).write_text(json.dumps(lineage), encoding="utf-8")
    return 0


def _compared(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """The comparison as JSON: what was compared, and what differs of the code and the environments."""
    from llm_engineering.publish.replayed import ReplayDifference, compare_losses, compare_measures, compare_weights

    sides = [{artifact["name"]: artifact for artifact in side["artifacts"]} for side in (then, now)]
    found = []
    for stage in now["training"]:
        adapters = (_stored(side[f"{stage}_adapter"]["uri"]).path for side in sides)
        reports = (_stored(side["training"][stage]["report"]).report()["history"] for side in (then, now))
        found += [compare_weights(stage, *adapters), compare_losses(stage, *reports)]
    for name in dict.fromkeys([*sides[0], *sides[1]]):
        if name not in _REPORTS and not name.endswith("_adapter"):
            one, other = (side.get(name) for side in sides)
            same = one is not None and other is not None and one["sha256"] == other["sha256"]
            found.append(ReplayDifference(name, "") if same else _differing_artifact(name, one, other))
    if "evaluation_report" in sides[0]:
        found += compare_measures(*(_stored(side["evaluation_report"]["uri"]).report() for side in sides))
    return {
        "model": then["model"],
        "version": then["version"],
        "equal": not any(one.difference for one in found),
        "code": differing_code(
            then, {"commit": now["code_version"], **{made["step"]: made["code"] for made in now["artifacts"]}}
        ),
        "environment": {
            stage: _environments(trained["environment"], now["training"][stage]["environment"])
            for stage, trained in then["training"].items()
        },
        "compared": [one._asdict() for one in found],
    }


def differing_code(then: Mapping[str, Any], now: Mapping[str, str]) -> list[str]:
    """Which codes of a lineage are not those of `now`: the commit of the run, and the hashes of the steps' code and libraries.

    A version may have data and adapters of earlier runs, so the commit alone does not tell with which code they were made.
    """
    made = [("commit", then["code_version"]), *((one["step"], one["code"]) for one in then["artifacts"])]
    return [f"{name} {code} → {now[name]}" for name, code in dict.fromkeys(made) if now.get(name, code) != code]


def _differing_artifact(name: str, then: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> Any:
    from datasets import DatasetDict
    from zenml.client import Client

    from llm_engineering.publish.replayed import ReplayDifference, compare_rows
    from steps.materializers import HFDatasetMaterializer

    if then is None or now is None:
        return ReplayDifference(name, f"only in the {'replay' if then is None else 'version'}")
    one = Client().get_artifact_version(then["id"]).load()
    if not isinstance(one, DatasetDict):
        return ReplayDifference(name, "its files differ")
    other = HFDatasetMaterializer(now["uri"]).load(DatasetDict)
    assert isinstance(other, DatasetDict)
    return compare_rows(name, one, other)


def _environments(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    from llm_engineering.publish.replayed import differing_environment
    from steps.caching import LIBRARIES

    return differing_environment(then, now, (*LIBRARIES, "numpy", "safetensors"))


def _stored(uri: str) -> Any:
    from steps.materializers import Directory, DirectoryMaterializer

    return DirectoryMaterializer(uri).load(Directory)


def _print(report: Mapping[str, Any], file: Any) -> None:
    shown = console(file, 200)
    table = Table(title=f"{report['model']} version {report['version']} and its replay", title_justify="left")
    for column in ("What", "Difference"):
        table.add_column(column, overflow="fold")
    for stage, differing in report["environment"].items():
        table.add_row(f"environment of {stage}", ", ".join(differing) or "equal")
    table.add_row("code", ", ".join(report["code"]) or "equal")
    for one in report["compared"]:
        table.add_row(one["what"], one["difference"] or "equal")
    shown.print(table)
    shown.print("The replay is equal, byte for byte." if report["equal"] else "The replay differs.")


if __name__ == "__main__":
    start_logging(debug=False)
    sys.exit(exit_code(lambda: _retrain(Path(sys.argv[1])), debug=False))
