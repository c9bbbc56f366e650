"""A sweep of six trials on the tiny model, killed and resumed, and two versions compared."""

import json
import re
import signal
import sqlite3
import time
from contextlib import closing

import optuna
import pytest

from tests.integration.conftest import make_project

# Trials of two epochs, of 9 steps each. One trial in the middle of the range, with four of the six pruned against.
SWEEP = """
sweep:
  ranges:
    sft.learning_rate: {low: 1e-4, high: 1e-1, log: true}
    sft.lora.r: {choices: [4, 8, 16]}
  trials: 6
  repeats: 2
  prune_after: 3
"""
# The names, states and steps of all runs, and how often each artifact was made.
READ = """
import json
import tools.cli
tools.cli.prepare_zenml()
from zenml.client import Client
runs = Client().list_pipeline_runs(size=100, sort_by="asc:created", hydrate=True).items
print(json.dumps([
    {"name": run.name, "pipeline": run.pipeline.name, "status": str(run.status), "tags": [tag.name for tag in run.tags],
     "steps": {name: str(step.status) for name, step in run.steps.items()}}
    for run in runs
]))
"""


@pytest.fixture(scope="module")
def swept(tiny_model, unused, tmp_path_factory):
    """A project with a sweep that was killed in the middle of its third trial, and then resumed."""
    project = make_project(tmp_path_factory.mktemp("swept"), tiny_model, unused)
    with project.recipe.open("a") as file:
        file.write(SWEEP)
    project.env["OMP_NUM_THREADS"] = "1"
    process = project.start("sweep", "--config", str(project.recipe))
    wait_for(lambda: running(project) == 2, process)
    process.kill()
    process.communicate(timeout=60)
    project.at_kill = trials(project)
    project.resumed = project.command("sweep", "--config", str(project.recipe), "--json")
    assert project.resumed.code == 0, project.resumed.stderr
    return project


def wait_for(condition, process):
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)


def trials(project):
    """The trials so far. The file is opened with optuna only when the command has made its tables."""
    files = list(project.folder.glob("outputs/sweeps/*/trials.db"))
    if not files:
        return []
    with closing(sqlite3.connect(files[0])) as database:
        if not database.execute("select 1 from sqlite_master where name = 'alembic_version'").fetchall():
            return []
        names = database.execute("select study_name from studies").fetchall()
    return optuna.load_study(study_name=names[0][0], storage=f"sqlite:///{files[0]}").trials if names else []


def running(project):
    """The number of the trial that has evaluated and not ended; None if there is none."""
    states = [trial for trial in trials(project) if trial.state.name == "RUNNING" and trial.intermediate_values]
    return states[0].number if states else None


def runs_of(project):
    script = project.folder / "read.py"
    script.write_text(READ)
    done = project.script(str(script))
    assert done.code == 0, done.stderr
    return done.json


def report_of(project):
    (file,) = project.folder.glob("outputs/sweeps/*/report.json")
    return json.loads(file.read_text())


def test_a_killed_sweep_keeps_its_trials_and_repeats_the_running_one(swept):
    report = report_of(swept)
    assert sum(report["counts"].values()) == len(report["trials"]) == 6
    assert [trial.state.name for trial in swept.at_kill] == ["COMPLETE", "COMPLETE", "RUNNING"]
    after = trials(swept)
    # The finished trials were not run again, and the killed one was, with its values.
    assert [(t.params, t.value) for t in after[:2]] == [(t.params, t.value) for t in swept.at_kill[:2]]
    assert [trial.number for trial in after if trial.state.name == "FAIL"] == [2]
    assert after[3].params == swept.at_kill[2].params
    assert "Trial 3 was interrupted, and goes on with the same values" in swept.resumed.stderr
    # The first trial has the recipe's own values, and no two others are alike.
    assert after[0].params == {"sft.learning_rate": 1e-2, "sft.lora.r": report["own"]["values"]["sft.lora.r"]}
    values = [tuple(trial["values"].values()) for trial in report["trials"]]
    assert len(set(values)) == 6
    runs = [run for run in runs_of(swept) if run["pipeline"] == "sweep_trial"]
    assert all(run["tags"] == [f"sweep {report['sweep']}"] for run in runs)
    named = [run["name"].removeprefix(f"{report['sweep']}-") for run in runs]
    assert [re.sub(r"-\d{4}_.*", "", name) for name in named if "seed" not in name] == [
        f"trial-{n}" for n in range(1, 8)
    ]


def test_only_the_winner_is_evaluated_and_its_training_comes_from_the_cache(swept):
    report = report_of(swept)
    runs = runs_of(swept)
    judged = [run for run in runs if run["pipeline"] != "sweep_trial"]
    assert [run["pipeline"] for run in judged] == ["sft"]
    assert judged[0]["steps"]["train_sft"] == "cached"
    assert all(not name.startswith("evaluate") for run in runs if run is not judged[0] for name in run["steps"])
    # Only the first trial makes the data.
    first, *others = [run for run in runs if run["pipeline"] == "sweep_trial"]
    assert first["steps"]["load_instructions"] == "completed"
    assert {run["steps"]["load_instructions"] for run in others} == {"cached"}
    complete = [trial for trial in report["trials"] if trial["state"] == "complete"]
    assert report["winner"]["loss"] == min(trial["loss"] for trial in complete)
    # The loss of the winner is the last one of the training report that its run shows.
    assert complete[0]["curve"][-1] == [1.0, complete[0]["loss"]]
    assert len(report["repeats"]) == 2
    assert report["winner"]["loss"] not in report["repeats"]
    assert report["evaluation"]["newest"] == "sft"
    listed = swept.command("models", "list", "--config", str(swept.recipe), "--json").json["versions"]
    assert len(listed) == 1

    page = (swept.folder / "outputs" / "sweeps" / report["sweep"] / "report.html").read_text()
    for words in ("Of 6 trials", "would by chance be about", "on the test split", "--set sft.lora.r="):
        assert words in page
    assert swept.resumed.json["winner"] == report["winner"]


def test_a_complete_sweep_trains_nothing_again_and_takes_more_trials(swept):
    before = runs_of(swept)
    again = swept.command("sweep", "--config", str(swept.recipe), "--json")
    assert again.code == 0, again.stderr
    new = runs_of(swept)[len(before) :]
    assert [run["pipeline"] for run in new] == ["sft"]
    more = swept.command("sweep", "--config", str(swept.recipe), "--json", "--set", "sweep.trials=7")
    assert more.code == 0, more.stderr
    assert sum(more.json["counts"].values()) == 7
    # The command of the winner has no need of the sweep's own keys.
    assert "sweep.trials" not in " ".join(report_of(swept)["command"])


def test_two_processes_share_a_sweep(fresh_project, child_python):
    fresh_project.env |= child_python | {"OMP_NUM_THREADS": "1"}
    block = "sweep={ranges: {sft.learning_rate: {low: 1e-4, high: 1e-1}}, trials: 4, repeats: 2, prune_after: null}"
    done = fresh_project.command(
        "sweep", "--config", str(fresh_project.recipe), "--set", block, "--jobs", "2", "--json"
    )
    assert done.code == 0, done.stderr
    assert done.json["counts"] == {"complete": 4, "stopped": 0, "failed": 0}
    found = trials(fresh_project)
    assert len({trial.params["sft.learning_rate"] for trial in found}) == 4
    assert len({trial.user_attrs["process"]["pid"] for trial in found}) == 2


def test_ctrl_c_ends_a_sweep_with_a_checkpoint(fresh_project):
    block = "sweep={ranges: {sft.learning_rate: {low: 1e-4, high: 1e-1}}, trials: 2, repeats: 2}"
    sets = ["--set", block, "--set", "sft.num_train_epochs=12"]
    process = fresh_project.start("sweep", "--config", str(fresh_project.recipe), *sets)
    wait_for(lambda: list(fresh_project.folder.glob("outputs/training/*/checkpoints/checkpoint-8")), process)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert [trial.state.name for trial in trials(fresh_project)] == ["RUNNING"]


@pytest.mark.parametrize(
    ("ranges", "words"),
    [
        ("sft.learning_rat: {low: 1, high: 2}", "`sweep.ranges.sft.learning_rat` has the value 1: unknown key `sft.learning_rat`"),
        ("sft.learning_rate: {low: -1e-3, high: 1e-3}", "`sweep.ranges.sft.learning_rate` has the value -0.001: `sft.learning_rate` is"),
        ("sft.warmup_ratio: {low: 0.1, high: 1.5}", "`sweep.ranges.sft.warmup_ratio` has the value 1.5"),
        ("sft.lora.target_modules: {choices: [all-linear, nosuch]}", "`sweep.ranges.sft.lora.target_modules` has the value nosuch"),
        ("dpo.beta: {low: 0.1, high: 0.2}", "sweep.ranges.dpo.beta changes what the validation loss of dpo measures"),
        ("sft.learning_rate: {low: 2, high: 1}", "`sweep.ranges.sft.learning_rate`: low (2) must be below high (1)"),
        ("seed: {choices: [1, 2]}", "sweep.ranges.seed does not change the trained model"),
    ],
)  # fmt: skip
def test_a_wrong_range_is_refused_before_anything_runs(fresh_project, ranges, words):
    done = fresh_project.command(
        "sweep", "--config", str(fresh_project.recipe), "--set", f"sweep={{ranges: {{{ranges}}}}}"
    )
    assert done.code == 2, done.stderr
    assert words in " ".join(done.stderr.split())
    assert not (fresh_project.folder / "outputs" / "sweeps").exists()


def test_a_trial_with_other_validation_rows_fails_and_the_sweep_goes_on(fresh_project):
    # With this seed, the second trial has the other length, which cuts the rows.
    block = "sweep={ranges: {formatting.max_length: {choices: [192, 56]}}, trials: 2, repeats: 2, seed: 3}"
    done = fresh_project.command(
        "sweep",
        "--config",
        str(fresh_project.recipe),
        "--set",
        block,
        "--set",
        "formatting.over_long=truncate",
        "--json",
    )
    assert done.code == 0, done.stderr
    assert done.json["counts"] == {"complete": 1, "stopped": 0, "failed": 1}
    (failed,) = [trial for trial in report_of(fresh_project)["trials"] if trial["state"] == "failed"]
    assert failed["values"] == {"formatting.max_length": 56}
    assert "validation rows of this trial are not those of the first one" in failed["reason"]
