"""Promotion, rollback, lineage and verification with a small model, and processes that promote at the same time."""

import json
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from tests.integration.conftest import ROOT, TIMEOUT_S, Project, Run, make_project


def call(project, *commands: list[str]) -> list[Run]:
    """Run commands of the group `models` one after another."""
    return [
        project.command("models", command, *arguments, "--config", str(project.recipe))
        for command, *arguments in commands
    ]


def unwarmed(project: Project) -> Run:
    """Run `sft` in a Python that has imported nothing before, and lists on stderr what it imports."""
    command = ["-X", "importtime", "-m", "tools.cli", "run", "sft", "--config", str(project.recipe), "--json"]
    run = subprocess.run(
        [sys.executable, *command], env=project.env, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    return Run(run.returncode, run.stdout, run.stderr)


def stages(models: Run) -> dict[int, str | None]:
    assert models.code == 0, models.stderr
    return {version["version"]: version["stage"] for version in models.json["versions"]}


@pytest.fixture(scope="module")
def own(tiny_model, unused, tmp_path_factory) -> Project:
    """A project with three versions of a model: 1 is in production, 2 was judged against it, and 3 is stale.

    Two runs repeat version 1, before and after it is promoted.
    """
    project = make_project(tmp_path_factory.mktemp("promotion"), tiny_model, unused)
    project.first = project.run("sft")
    assert project.first.code == 0, project.first.stderr
    project.repeated = unwarmed(project)
    (project.promoted,) = call(project, ["promote", "1", "--note", "the first version"])
    project.compared = project.run("sft")
    project.second = project.run("sft", "--set", "sft.learning_rate=1e-3")
    project.third = project.script("tests.integration.stale", str(project.recipe), "sft.learning_rate=5e-3")
    for run in (project.repeated, project.compared, project.second, project.third):
        assert run.code == 0, run.stderr
    return project


def ran(run: Run) -> list[str]:
    """The steps that did not come from the cache."""
    lines = [line for line in run.stderr.splitlines() if "│ sft: " in line and "completed" in line]
    return [line.split()[2] for line in lines]


def test_a_model_that_passes_goes_to_staging_and_a_worse_one_fails(own):
    assert "Every rule passed, so the model is promoted to staging." in own.first.stderr
    assert "Version 1 is in production" in own.second.stderr
    assert "Not promoted, version 1 stays in production." in own.second.stderr
    assert "heldout_loss better than incumbent by more than 0: -" in " ".join(own.second.stderr.split())


def test_a_cached_repeat_imports_no_library_that_only_a_step_needs(own):
    listed = [line for line in own.repeated.stderr.splitlines() if line.startswith("import time:")]
    imported = {line.rpartition("|")[2].strip() for line in listed}
    assert {"steps.training", "steps.evaluation"} <= imported
    assert not imported & {
        "transformers",
        "trl",
        "peft",
        "comet_ml",
        "boto3",
        "openai",
        "rouge_score",
        "bm25s",
        "sklearn",
        "scipy",
    }


def test_a_cached_repeat_belongs_to_the_version_that_has_its_model(own):
    assert ran(own.repeated) == ["promote"]
    # The model in production changed, so the evaluation ran again. It compared version 1 with itself.
    assert ran(own.compared) == ["evaluate_sft", "promote"]
    metrics = own.compared.json["metrics"]
    assert metrics["heldout_loss_incumbent"] == pytest.approx(metrics["heldout_loss_sft"])
    assert "Nothing changes: this is the model of version 1, which is in production." in own.compared.stderr
    for run in (own.repeated, own.compared):
        assert "No new version: tiny version 1 has this model already, and the run belongs to it." in run.stderr
        assert run.json["model_version"] == 1
    assert "No new version" not in own.first.stderr
    assert own.second.json["model_version"] == 2
    # The table has the version of every run, and the change to staging is recorded once.
    assert own.command("runs").stdout.count("tiny 1 ") == 3
    (lineage,) = call(own, ["lineage", "1", "--json"])
    assert [change["action"] for change in lineage.json["changes"]][:2] == ["stage", "promote"]


def test_a_run_is_stale_if_production_changed_meanwhile(own):
    output = " ".join(own.third.stdout.split())
    assert "Every rule passed, but it was judged with no version in production, and now version 1 is there" in output


def test_models_lists_versions_with_gate_and_stage(own):
    assert own.promoted.code == 0, own.promoted.stderr
    as_json, as_table = call(own, ["list", "--json"], ["list"])
    listed = as_json.json["versions"]
    assert [(v["version"], v["gate"], v["stage"]) for v in listed] == [
        (3, "stale", None),
        (2, "failed", None),
        (1, "passed", "production"),
    ]
    assert listed[2]["changed"]["note"] == "the first version"
    assert "@" in listed[2]["changed"]["changed_by"]
    assert listed[2]["measures"]["heldout_loss"] == pytest.approx(own.first.json["metrics"]["heldout_loss_sft"])
    assert "heldout_loss" in as_table.stdout
    assert "instruction v1" in as_table.stdout


def test_wrong_requests_are_refused(own):
    refused = {
        ("promote", "9"): "There is no version 9 of tiny. Existing versions: 3, 2, 1.",
        ("promote", ""): "VERSION is missing",
        ("promote", "1"): "version 1 is already in production",
        ("promote", "2"): "has not passed its gate. Not promoted, version 1 stays in production.",
        ("promote", "3"): "it was judged with no version in production, and now version 1 is there",
        ("promote", "2", "--force"): "--force needs a NOTE",
        ("rollback",): "no former production version of tiny to go back to: version 1 is the first",
        ("verify", "9"): "There is no version 9 of tiny",
        ("lineage", "x"): "There is no version x of tiny",
    }
    ended = call(own, *map(list, refused), ["list", "--json"])
    for words, run in zip(refused.values(), ended, strict=False):
        assert run.code == 2, run.stderr
        assert words in run.stderr
        assert "Traceback" not in run.stderr
    assert stages(ended[-1]) == {1: "production", 2: None, 3: None}


def test_force_and_rollback(own):
    forced, between, back, after, again, lineage = call(
        own,
        ["promote", "2", "--force", "--note", "asked for by the owner"],
        ["list", "--json"],
        ["rollback", "--note", "a mistake"],
        ["list", "--json"],
        ["rollback"],
        ["lineage", "1", "--json"],
    )
    assert forced.code == 0, forced.stderr
    assert stages(between) == {1: "archived", 2: "production", 3: None}
    assert back.code == 0, back.stderr
    assert "version 1 is in production again" in back.stdout
    assert stages(after) == {1: "production", 2: "archived", 3: None}
    assert again.code == 2
    assert [(change["action"], change["note"]) for change in lineage.json["changes"][1:]] == [
        ("promote", "the first version"),
        ("rollback", "a mistake"),
    ]


def test_lineage_leads_back_to_the_documents(own):
    found = call(own, ["lineage", "1", "--json"])[0].json
    names = {artifact["name"]: artifact for artifact in found["artifacts"]}
    assert names["sft_adapter"]["from"] == ["formatted_sft v1"]
    assert names["formatted_sft"]["from"] == ["instruction_dataset v1"]
    assert names["instruction_dataset"]["from"] == ["instruction_candidates v1"]
    assert all(len(artifact["sha256"]) == 64 for artifact in found["artifacts"])
    assert list(found["sources"]["instruction_candidates v1"]) == [str(own.folder / "instructions.jsonl")]
    assert found["base_revision"].startswith("folder-")
    assert found["recipe_hash"]
    # The manifest is in the format of `sha256sum -c`.
    uri = Path(names["sft_adapter"]["uri"])
    check = subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=uri, capture_output=True, check=False)
    assert check.returncode == 0, check.stderr


def test_verify_names_changed_lost_and_added_files(own):
    untouched, lineage = call(own, ["verify", "1"], ["lineage", "1", "--json"])
    assert untouched.code == 0, untouched.stdout + untouched.stderr
    assert "their sources and the base model are unchanged" in untouched.stdout
    places = {artifact["name"]: Path(artifact["uri"]) for artifact in lineage.json["artifacts"]}
    # Each run of the gate writes a page, also one that repeats this version.
    (page,) = (a["version"] for a in lineage.json["artifacts"] if a["name"] == "evaluation_page")
    adapter = places["sft_adapter"] / "files" / "adapter_model.safetensors"
    report = places["evaluation_page"] / "files" / "report.html"
    instructions = own.folder / "instructions.jsonl"
    former = {file: file.read_bytes() for file in (adapter, report, instructions)}
    adapter.write_bytes(former[adapter][:-1] + bytes([former[adapter][-1] ^ 1]))
    report.unlink()
    added = places["training_report"] / "files" / "added.txt"
    added.write_text("new")
    instructions.write_bytes(former[instructions] + b"\n")
    try:
        manifest = places["formatted_sft"] / "SHA256SUMS"
        former[manifest] = manifest.read_bytes()
        manifest.unlink()
        as_json, as_table = call(own, ["verify", "1", "--json"], ["verify", "1"])
        assert as_json.code == as_table.code == 1
        assert {(f["where"], Path(f["file"]).name, f["what"]) for f in as_json.json["found"]} == {
            ("sft_adapter v1", "adapter_model.safetensors", "changed"),
            (f"evaluation_page v{page}", "report.html", "lost"),
            ("training_report v1", "added.txt", "added"),
            ("formatted_sft v1", "SHA256SUMS", "lost"),
            ("sources of instruction_candidates v1", "instructions.jsonl", "changed"),
        }
        assert "adapter_model.safetensors" in as_table.stdout
    finally:
        for file, content in former.items():
            file.write_bytes(content)
        added.unlink()


def test_a_deleted_version_frees_the_disk_and_keeps_what_other_versions_use(own):
    """Version 2 has a merged model, and its data is that of version 1."""
    exported, lineage, production, unanswered, wrong = call(
        own,
        ["export", "--version", "2"],
        ["lineage", "2", "--json"],
        ["delete", "1", "--yes"],
        ["delete", "2"],
        ["delete", "9", "--yes"],
    )
    merged = Path(exported.stdout.strip())
    assert merged.is_dir(), exported.stderr
    refused = {
        "tiny version 1 cannot be deleted. It is in production: first move another version there": production,
        "Delete tiny version 2? There is no terminal to ask on. Add --yes (with make: ARGS=--yes).": unanswered,
        "There is no version 9 of tiny": wrong,
    }
    for words, run in refused.items():
        assert run.code == 2, run.stderr
        assert words in run.stderr
    assert "merged_model v1" in unanswered.stdout
    assert "Deleting it frees " in unanswered.stdout

    places = {artifact["name"]: Path(artifact["uri"]) for artifact in lineage.json["artifacts"]}
    before = len(list(own.folder.rglob("*.safetensors")))
    deleted, listed, verified = call(own, ["delete", "2", "--yes"], ["list", "--json"], ["verify", "1"])
    assert deleted.code == 0, deleted.stderr
    assert "tiny version 2 is deleted, and " in deleted.stdout
    assert stages(listed) == {1: "production", 3: None}
    # Version 1 still has all of its artifacts, with the data that version 2 had too.
    assert verified.code == 0, verified.stdout + verified.stderr
    gone = {name for name, place in places.items() if not place.is_dir()}
    assert gone == {"sft_adapter", "training_report", "evaluation_report", "evaluation_page", "promotion_decision"}
    assert not merged.exists()
    assert before - len(list(own.folder.rglob("*.safetensors"))) == 2
    (database,) = own.folder.rglob("zenml.db")
    with closing(sqlite3.connect(database)) as connection:
        uris = {uri for (uri,) in connection.execute("select uri from artifact_version")}
    assert {name for name, place in places.items() if str(place) not in uris} == gone


def test_only_one_of_several_processes_promotes_at_the_same_time(fresh_project):
    done = fresh_project.script("tests.integration.race")
    assert done.code == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    turns: dict[int, list[str]] = {}
    for turn, _, outcome in found["results"]:
        turns.setdefault(turn, []).append(outcome)
    for outcomes in turns.values():
        assert outcomes.count("moved") == 1
        assert all("it was judged with" in outcome for outcome in outcomes if outcome != "moved")
    winners = [version for _, version, outcome in found["results"] if outcome == "moved"]
    assert found["changes"] == found["history"] == winners
    assert found["in_production"] == winners[-1:]
    # A process that is overtaken after it has read production and before it writes its own change.
    outcome, in_production, faster = found["overtaken"]
    assert f"now version {faster} is there" in outcome
    assert in_production == [faster]
    # A process that is killed after its change: the change counts, the next change sets its stage in ZenML, and a
    # rollback undoes it.
    moved, between, repaired, rolled_back = found["killed"]
    assert between == [moved, faster]
    assert repaired == [moved]
    assert rolled_back == [faster]
