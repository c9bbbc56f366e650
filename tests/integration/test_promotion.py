"""Promotion, rollback, lineage and verification on the runs of a small model, and processes that race for production."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.conftest import ROOT, Project, make_project

# A run whose production has changed since it began: it is told that nothing was in production.
STALE = """
import sys
import tools.cli
from tools import launch, summary
from tools.preflight import preflight
from llm_engineering.recipes import load_recipe
from pipelines import chain
tools.cli.prepare_zenml()
recipe, inputs = preflight(load_recipe(sys.argv[1]))
run = launch._start(chain.sft, recipe, inputs, True)
summary.print_table(summary.collect([run], 0.0), sys.stdout)
"""


@pytest.fixture(scope="module")
def own(tiny_model, tmp_path_factory) -> Project:
    """A project with three versions: the first in production, the others of the same run again.

    The second was judged with nothing in production, the third against the first, which it equals.
    """
    project = make_project(tmp_path_factory.mktemp("promotion"), tiny_model)
    project.runs = [project.run("sft"), project.run("sft")]
    project.promoted = call(project, "promote", "1", "--note", "the first that there is")
    project.runs.append(project.run("sft"))
    return project


def call(project, tool, *arguments):
    return project.command(f"tools.{tool}", *arguments, "--config", str(project.recipe))


def stages(project) -> dict[int, str | None]:
    listed = call(project, "models", "--json")
    assert listed.code == 0, listed.stderr
    return {version["version"]: version["stage"] for version in listed.json["versions"]}


def test_a_pass_goes_to_staging_and_an_equal_model_fails(own):
    first, second, third = own.runs
    assert [run.code for run in own.runs] == [0, 0, 0], first.stderr + second.stderr + third.stderr
    assert "Every rule passed: to staging." in first.stderr
    assert "In production is version 1" in third.stderr
    assert "Not promoted, version 1 stays in production." in third.stderr
    assert "heldout_loss better than incumbent by more than 0: 0.0000" in third.stderr
    # The evaluation saw another incumbent, everything before it came from the cache.
    ran = [line for line in third.stderr.splitlines() if "│ sft: " in line and "completed" in line]
    assert [line.split()[2] for line in ran] == ["evaluate_sft", "promote"]
    metrics = third.json["metrics"]
    assert metrics["heldout_loss_incumbent"] == pytest.approx(metrics["heldout_loss_sft"])


def test_models_lists_what_happened(own):
    assert own.promoted.code == 0, own.promoted.stderr
    listed = call(own, "models", "--json").json["versions"]
    assert [(v["version"], v["gate"], v["model"]) for v in listed] == [
        (3, "failed", "sft"),
        (2, "passed", "sft"),
        (1, "passed", "sft"),
    ]
    assert listed[2]["stage"] == "production"
    assert listed[2]["changed"]["note"] == "the first that there is"
    assert "@" in listed[2]["changed"]["changed_by"]
    assert listed[2]["measures"]["heldout_loss"] == pytest.approx(own.runs[0].json["metrics"]["heldout_loss_sft"])
    table = call(own, "models").stdout
    assert "heldout_loss" in table
    assert "instruction v1" in table


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["promote", "9"], "There is no version 9 of tiny. There are 3, 2, 1."),
        (["promote", ""], "No version is named"),
        (["promote", "1"], "version 1 is in production already"),
        (["promote", "2"], "it was judged with nothing in production, and by now version 1 is there"),
        (["promote", "3"], "has not passed its gate. Not promoted, version 1 stays in production."),
        (["promote", "3", "--force"], "--force needs a NOTE"),
        (["rollback"], "no former production version of tiny to go back to: version 1 is the first"),
        (["verify", "9"], "There is no version 9 of tiny"),
    ],
)
def test_what_is_refused(own, arguments, words):
    refused = call(own, *arguments)
    assert refused.code == 2, refused.stderr
    assert words in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_run_that_production_changed_under_ends_as_stale(own):
    before = stages(own)
    script = own.folder / "stale.py"
    script.write_text(STALE)
    env = {**own.env, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(script), str(own.recipe)], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Every rule passed, but it was judged with nothing in production" in " ".join(done.stdout.split())
    after = stages(own)
    assert after.pop(max(after)) is None
    assert after == before


def test_force_and_rollback(own):
    forced = call(own, "promote", "3", "--force", "--note", "asked for by the owner")
    assert forced.code == 0, forced.stderr
    assert stages(own)[1] == "archived"
    assert stages(own)[3] == "production"
    back = call(own, "rollback", "--note", "a mistake")
    assert back.code == 0, back.stderr
    assert "version 1 is in production again" in back.stdout
    assert (stages(own)[1], stages(own)[3]) == ("production", "archived")
    assert call(own, "rollback").code == 2
    changes = call(own, "lineage", "1", "--json").json["changes"]
    assert [(change["action"], change["note"]) for change in changes[1:]] == [
        ("promote", "the first that there is"),
        ("rollback", "a mistake"),
    ]


def test_lineage_leads_back_to_the_documents(own):
    found = call(own, "lineage", "1", "--json").json
    names = {artifact["name"]: artifact for artifact in found["artifacts"]}
    assert names["sft_adapter"]["from"] == ["formatted_sft v1"]
    assert names["formatted_sft"]["from"] == ["instruction_dataset v1"]
    assert names["instruction_dataset"]["from"] == ["instruction_candidates v1"]
    assert all(len(artifact["sha256"]) == 64 for artifact in found["artifacts"])
    assert list(found["sources"]["instruction_candidates"]) == [str(own.folder / "instructions.jsonl")]
    assert found["base_revision"].startswith("folder-")
    assert found["recipe_hash"]
    # What `sha256sum -c` would say.
    uri = Path(names["sft_adapter"]["uri"])
    check = subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=uri, capture_output=True, check=False)
    assert check.returncode == 0, check.stderr


def test_verify_names_what_was_changed_lost_or_added(own):
    untouched = call(own, "verify", "1")
    assert untouched.code == 0, untouched.stdout + untouched.stderr
    assert "are as they were recorded" in untouched.stdout

    places = {
        artifact["name"]: Path(artifact["uri"]) for artifact in call(own, "lineage", "1", "--json").json["artifacts"]
    }
    adapter = places["sft_adapter"] / "files" / "adapter_model.safetensors"
    report = places["evaluation_report"] / "files" / "report.html"
    instructions = own.folder / "instructions.jsonl"
    former = {file: file.read_bytes() for file in (adapter, report, instructions)}
    adapter.write_bytes(former[adapter][:-1] + bytes([former[adapter][-1] ^ 1]))
    report.unlink()
    added = places["training_report"] / "files" / "added.txt"
    added.write_text("new")
    instructions.write_bytes(former[instructions] + b"\n")
    try:
        found = call(own, "verify", "1", "--json")
        assert found.code == 1
        assert {(f["where"], Path(f["file"]).name, f["what"]) for f in found.json["found"]} == {
            ("sft_adapter v1", "adapter_model.safetensors", "changed"),
            ("evaluation_report v1", "report.html", "lost"),
            ("training_report v1", "added.txt", "added"),
            ("sources of instruction_candidates v1", "instructions.jsonl", "changed"),
        }
        (places["sft_adapter"] / "SHA256SUMS").unlink()
        said = call(own, "verify", "1")
        assert said.code == 1
        assert "SHA256SUMS" in said.stdout
    finally:
        for file, content in former.items():
            file.write_bytes(content)
        added.unlink()


def test_of_processes_that_promote_at_once_one_does(fresh_project):
    done = fresh_project.command("tests.integration.race")
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
