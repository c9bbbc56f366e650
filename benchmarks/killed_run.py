"""What `file_kills` interrupts as a whole: `run sft` of a tiny chain, from the command line to the gate."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sqlite3
from contextlib import closing
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import yaml
from zenml.orchestrators.publish_utils import publish_successful_step_run

from benchmarks.file_kills import Did, Work
from tests.integration.preloaded import LIBRARIES
from tests.tiny_models import KINDS, write_model
from tools.cli import PROJECT_ROOT, main

# What commands import and compute before and in their work, so that the forked processes need not.
for library in LIBRARIES:
    import_module(library)

_RECIPE: dict[str, Any] = {
    "extends": str(PROJECT_ROOT / "configs" / "python_reference.yaml"),
    "name": "tiny",
    "chain": ["sft"],
    "data": {"train_unfit": True, "split": {"validation_fraction": 0.2, "test_fraction": 0.2}},
    "formatting": {"max_length": 192, "chat_template": "chatml"},
    "sft": {"max_steps": 4, "learning_rate": 1e-2, "eval_steps": 2, "save_steps": 2, "packing": False},
    "evaluation": {"max_new_tokens": 2, "generated_rows": 2, "sample_answers": 2, "bootstrap_samples": 100},
    "exam": None,
    "promotion": {"sft": {"better_than": {"base": {"heldout_loss": 0.0}}}},
    "compute": {"device": "cpu", "dtype": "float32"},
    "tracking": {"comet": "off"},
}
# Artifacts whose files contain times or names of runs.
_DATED = ("data_report", "training_report", "evaluation_page", "promotion_decision")
_ENDED = ("completed", "cached", "failed")
# Names that differ in each run: ids, hashes and times.
_OWN_NAME = re.compile(r"[0-9a-f]{8}-[0-9a-f-]{27}|[0-9a-f]{12,}|\d{4}_\d\d_\d\d-[\d_]+")


def _command(folder: Path, *arguments: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "ZENML_CONFIG_PATH": str(folder / "zenml"),
        "ZENML_LOCAL_STORES_PATH": str(folder / "stores"),
        "LLM_OUTPUT_DIR": str(folder / "outputs"),
        "LLM_CACHE_DIR": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    code = main(arguments)
    assert code == 0, f"the exit code is {code}"


def _prepare(folder: Path) -> None:
    """Write a model, rows and a recipe, and make ZenML's store, which takes seconds."""
    write_model(folder / "model", KINDS["llama"])
    # The folder of the runs has this one's name without its ending.
    home = folder.with_suffix("")
    rows = [
        {"instruction": f"Where does {n} stand?", "output": f"The number {n} stands before {n + 1}."} for n in range(40)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    data = {**_RECIPE["data"], "instructions": str(home / "rows.jsonl")}
    recipe = {**_RECIPE, "model": {"name_or_path": str(home / "model")}, "data": data}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    _command(folder, "runs")
    config = folder / "zenml" / "config.yaml"
    config.write_text(config.read_text(encoding="utf-8").replace(str(folder), str(home)), encoding="utf-8")


def _run(folder: Path, did: Did) -> None:
    def published(*arguments: Any, **named: Any) -> Any:
        step = publish_successful_step_run(*arguments, **named)
        # The gate is asked in every run.
        if step.name != "promote":
            did(step.name)
        return step

    # The copy of the store is up to date. ZenML would read all its migrations to find this out.
    os.environ["DISABLE_DATABASE_MIGRATION"] = "true"
    with patch("zenml.orchestrators.step_runner.publish_successful_step_run", published):
        _command(folder, "run", "sft", "--config", str(folder / "recipe.yaml"))


def _ask(folder: Path, question: str, *values: str) -> list[tuple[Any, ...]]:
    database = folder / "stores" / "default_zen_store" / "zenml.db"
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        return connection.execute(question, values).fetchall()


def _stored(folder: Path) -> dict[str, Any]:
    """The state of the newest run, its artifacts, the versions of the model, and what claims to be still running."""
    ((run, status),) = _ask(folder, "SELECT id, status FROM pipeline_run ORDER BY created DESC LIMIT 1")
    artifacts = _ask(
        folder,
        "SELECT s.name, o.name, v.uri FROM step_run_output_artifact o JOIN step_run s ON s.id = o.step_id "
        "JOIN artifact_version v ON v.id = o.artifact_id WHERE s.pipeline_run_id = ?",
        run,
    )
    return {
        "status": status,
        "unfinished": [
            state
            for table in ("pipeline_run", "step_run")
            for (state,) in _ask(folder, f"SELECT status FROM {table}")  # noqa: S608
            if state not in _ENDED
        ],
        "versions": _ask(folder, "SELECT number, stage FROM model_version"),
        "artifacts": {
            f"{step}.{name}": "dated" if name in _DATED else _hash(Path(uri)) for step, name, uri in sorted(artifacts)
        },
    }


def _hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            digest.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def _files(folder: Path) -> list[str]:
    """The files of the outputs, and the folders of artifacts that no run knows, without the names that differ in each run."""
    known = {uri for (uri,) in _ask(folder, "SELECT uri FROM artifact_version")}
    places = [folder / name for name in ("outputs", "cache")]
    found = {str(path.relative_to(folder)) for place in places for path in place.rglob("*")}
    found |= {
        f"unknown: {path.relative_to(folder)}"
        # A store, a step, an output, a run of the step, and an id.
        for path in (folder / "stores").glob("*/*/*/*/*")
        if str(path) not in known and path.is_dir() and "logs" not in path.parts
    }
    return sorted({_OWN_NAME.sub("*", name) for name in found})


RUN = Work("run", _run, _stored, _prepare, _files, faults=("kill",), varies=True)
