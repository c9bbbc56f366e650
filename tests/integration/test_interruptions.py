"""Runs that are interrupted or killed, and resumed."""

import json
import signal
import sqlite3
import time
from contextlib import closing
from uuid import UUID


def wait_for_checkpoint(project, process):
    """Wait until a running process has saved the checkpoint of step 8."""
    deadline = time.monotonic() + 300
    while not list(project.folder.glob("outputs/training/*/checkpoints/checkpoint-8")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)


def assert_saved(project, stderr, name):
    """The output of an interrupted run names the signal and the saved step, and the checkpoint is complete."""
    assert f"{name}: stopping after this step" in stderr
    saved = int(stderr.partition("saving step ")[2].split()[0])
    assert "run the same command again to continue" in stderr
    assert "Traceback" not in stderr
    assert list(project.folder.glob(f"outputs/training/*/checkpoints/checkpoint-{saved}/identity.json"))


def stored(project, query):
    """Rows of ZenML's database."""
    (file,) = project.folder.rglob("zenml.db")
    with closing(sqlite3.connect(file)) as database:
        return database.execute(query).fetchall()


def test_interrupted_training_resumes(fresh_project):
    """After SIGINT in the middle of training, `--resume` continues from the checkpoint."""
    many = ["--set", "sft.num_train_epochs=12", "--set", "sft.eval_steps=1000"]
    process = fresh_project.start("run", "sft", "--config", str(fresh_project.recipe), *many)
    wait_for_checkpoint(fresh_project, process)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130
    assert_saved(fresh_project, stderr, "SIGINT")
    # The run has trained no model, so it leaves no version.
    assert stored(fresh_project, "select count(*) from model_version") == [(0,)]

    other = fresh_project.run("sft", *many, "--set", "sft.learning_rate=5e-3", "--resume", "last")
    assert other.code == 2
    assert "sft.learning_rate differ" in other.stderr
    resumed = fresh_project.run("sft", *many, "--resume", "last")
    assert resumed.code == 0, resumed.stderr
    assert "resuming from" in resumed.stderr
    # What the dashboard shows of a run: the verdict, the recipe, the base model, and five measures.
    shown = dict(
        stored(
            fresh_project,
            "select key, value from run_metadata join run_metadata_resource on run_metadata.id = run_metadata_id "
            "where resource_type = 'pipeline_run'",
        )
    )
    assert {"verdict", "recipe", "base_model", "heldout_loss"} <= shown.keys()
    assert len(shown["heldout_loss"]) <= 6
    outcome = json.loads(shown["verdict"]).partition(":")[0]
    assert (f"gate {outcome}",) in stored(fresh_project, "select name from tag")
    complete = fresh_project.run("sft", *many, "--resume", "last")
    assert complete.code == 2
    assert "is complete, so there is nothing to resume" in complete.stderr


def test_killed_run_is_detected_and_resumes(fresh_project):
    """After kill -9 in the middle of training, ZenML still lists the run as running. `make runs` detects it."""
    many = ["--set", "sft.num_train_epochs=6", "--set", "sft.eval_steps=1000"]
    process = fresh_project.start("run", "sft", "--config", str(fresh_project.recipe), *many)
    wait_for_checkpoint(fresh_project, process)
    # Stop the process, so that it stays alive but cannot finish before the next commands look at it.
    process.send_signal(signal.SIGSTOP)
    running = fresh_project.run("sft", *many, "--resume", "last")
    assert running.code == 2
    assert "is still running" in running.stderr
    assert "killed" not in fresh_project.command("runs").stdout
    process.kill()
    process.communicate(timeout=60)
    # As if it had been killed while it wrote its adapter.
    (store,) = {path.parents[2] for path in fresh_project.folder.glob("stores/*/load_instructions/*/*")}
    ((step,),) = stored(fresh_project, "select id from step_run where name = 'train_sft'")
    begun = store / "train_sft" / "sft_adapter" / str(UUID(step)) / "0a1b2c3d"
    begun.mkdir(parents=True)

    listed = fresh_project.command("runs")
    assert "failed (killed)" in listed.stdout
    assert not begun.parent.exists()
    assert "--resume" in listed.stderr
    assert stored(fresh_project, "select count(*) from model_version") == [(0,)]
    again = fresh_project.command("runs")
    assert "failed (killed)" in again.stdout
    assert "was killed" not in again.stderr
    (name,) = [
        word for line in again.stdout.splitlines() if "killed" in line for word in line.split() if "sft-" in word
    ]
    resumed = fresh_project.run("sft", *many, "--resume", name)
    assert resumed.code == 0, resumed.stderr
    assert "resuming from" in resumed.stderr


def test_sigterm_in_a_step_saves_a_checkpoint(fresh_project):
    many = ["--set", "sft.num_train_epochs=200", "--set", "sft.save_steps=8", "--set", "sft.eval_steps=1000"]
    process = fresh_project.start("run", "sft", "--config", str(fresh_project.recipe), *many)
    wait_for_checkpoint(fresh_project, process)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130
    assert_saved(fresh_project, stderr, "SIGTERM")
    assert "failed" in fresh_project.command("runs").stdout
