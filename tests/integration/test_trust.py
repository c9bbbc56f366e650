"""A version of a small model: its evidence, and its replay in processes and folders of its own."""

import json
import re
import signal
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from tests.integration.conftest import TIMEOUT_S, Project, make_project

DATABASE = Path("stores", "default_zen_store", "zenml.db")


def models(project: Project, command: str, *arguments: str):
    return project.command("models", command, *arguments, "--config", str(project.recipe))


def stored(project: Project) -> list[int]:
    """Numbers of the runs, steps and artifacts in ZenML's database."""
    with closing(sqlite3.connect(project.folder / DATABASE)) as database:
        tables = ("pipeline_run", "step_run", "artifact_version", "model_version")
        return [database.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in tables]


def edit_record(project: Project, table: str, column: str, then: str, now: str) -> None:
    """Replace a text in the records of ZenML's database."""
    with closing(sqlite3.connect(project.folder / DATABASE)) as database, database:
        changed = database.execute(
            f"UPDATE {table} SET {column} = replace({column}, ?, ?) WHERE {column} LIKE ?",
            (then, now, f"%{then}%"),
        )
        assert changed.rowcount > 0


@pytest.fixture(scope="module")
def own(tiny_model, unused, child_python, tmp_path_factory) -> Project:
    """A project with one version."""
    project = make_project(tmp_path_factory.mktemp("replay"), tiny_model, unused)
    project.env |= child_python
    trained = project.run("sft")
    assert trained.code == 0, trained.stderr
    return project


def test_the_evidence_of_a_version_has_every_section_and_a_valid_bill_of_materials(own):
    made = models(own, "evidence", "1", "--json", "--set", "hub.license=mit", "--set", "hub.base_training_tokens=1e6")
    assert made.code == 0, made.stderr
    found, folder = made.json, own.folder / "outputs" / "evidence" / "tiny-1"
    assert json.loads((folder / "report.json").read_text()) == found
    (dataset,) = found["datasets"]
    assert dataset["name"] == "instruction_dataset"
    assert sum(dataset["rows"].values()) == sum(dataset["origins"].values()) > 0
    assert [row[1] for row in found["sources"]] == ["instructions.jsonl"]
    assert found["licences"] == {"model": "mit", "base_model": None, "data": None}
    compute = found["compute"]
    assert compute["total"] == compute["stages"]["sft"] > 0
    assert compute["base_flops"] == 6 * compute["base_parameters"] * 1e6
    assert compute["share"] == compute["total"] / compute["base_flops"]
    assert found["measures"]["heldout_loss"]["models"]["sft"]["low"] is not None
    assert found["packages"]["torch"]
    assert "1 thread, Python" in found["model"]["lineage"]["sft trained with"]
    page = (folder / "report.html").read_text()
    for section in ("Training content", "Licences", "Training operations", "Measures", "Limits", "Signatures", "Replay",
                    "Lineage", "Bill of materials"):  # fmt: skip
        assert f"<h2>{section}<input" in page
    assert "Not signed." in page
    bom = (folder / "bom.cdx.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(bom) is None
    assert str(own.folder) not in bom + page + made.stdout.splitlines()[-1]


def test_an_interrupted_replay_continues_and_is_equal_byte_for_byte(own):
    before = stored(own)
    assert all(before)
    process = own.start("models", "replay", "1", "--config", str(own.recipe))
    for line in process.stderr:
        if "Running sft" in line:
            process.send_signal(signal.SIGTERM)
            break
    _, said = process.communicate(timeout=TIMEOUT_S)
    assert process.wait() == 130, said
    folder = own.folder / "outputs" / "replays" / "tiny-1"
    assert (folder / "run" / "zenml").is_dir()

    replayed = models(own, "replay", "1", "--json")
    assert replayed.code == 0, replayed.stderr
    report = replayed.json
    assert report["equal"]
    assert {one["what"] for one in report["compared"]} >= {
        "weights of sft", "losses of sft", "measure heldout_loss", "instruction_dataset", "formatted_sft",
    }  # fmt: skip
    assert (report["environment"], report["code"]) == ({"sft": []}, [])
    # The folder keeps the report only, and the project's own store has no new run.
    assert sorted(file.name for file in folder.iterdir()) == ["lock", "report.json"]
    assert json.loads((folder / "report.json").read_text()) == report
    assert stored(own) == before


def test_a_changed_dataset_is_named_before_any_work(own):
    file = own.folder / "instructions.jsonl"
    content = file.read_text()
    file.write_text(content.replace("number 7", "number 70"))
    replayed = models(own, "replay", "1")
    file.write_text(content)
    assert replayed.code == 2
    assert f"instruction_candidates v1 {file} changed" in replayed.stderr
    assert "Running" not in replayed.stderr


def test_another_seed_and_library_are_told_with_the_size_of_the_difference(own):
    lineage = models(own, "lineage", "1", "--json").json["training"]["sft"]["environment"]
    version = lineage["packages"]["torch"]
    code = next(
        one["code"] for one in models(own, "lineage", "1", "--json").json["artifacts"] if one["step"] == "train_sft"
    )
    edit_record(own, "step_configuration", "config", code, "c0de00000000")
    edit_record(own, "run_metadata", "value", f'"torch": "{version}"', '"torch": "2.0.0"')
    edit_record(own, "run_metadata", "value", '"seed": 42', '"seed": 43')
    replayed = models(own, "replay", "1", "--json")
    assert replayed.code == 1, replayed.stderr
    report = replayed.json
    assert report["environment"] == {"sft": [f"torch 2.0.0 → {version}"]}
    # The commit of the version's run is this one, and its adapter may be that of an earlier run.
    assert report["code"] == [f"train_sft c0de00000000 → {code}"]
    found = {one["what"]: one["difference"] for one in report["compared"]}
    assert re.search(
        r"^1 of 5 files differ \(adapter_model.safetensors\); \d+ of \d+ tensors differ, by at most \d",
        found["weights of sft"],
    )
    assert re.search(r"losses differ \(loss of step 1, .*; by at most \d", found["losses of sft"])
    assert re.search(r"sft \d\S* \[.* → \d", found["measure heldout_loss"])
    assert "instruction_dataset" in found
    # What differs stays, to be looked at.
    assert (own.folder / "outputs" / "replays" / "tiny-1" / "run" / "stores").is_dir()
