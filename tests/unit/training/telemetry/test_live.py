"""The file that shows a run while it trains: written at every log entry, also by runs that resume, fail or are killed."""

import json
import subprocess
import sys

import pytest

from llm_engineering.recipe.stage_blocks import SFTConfig
from llm_engineering.training.telemetry import work
from llm_engineering.training.telemetry.live import LIVE_FILE, LiveHistory, read_live
from tests.tiny_models import train
from tools.servers.watch import runs, watch_page

CONFIG = SFTConfig(learning_rate=1e-2, num_train_epochs=2, gradient_accumulation_steps=1, save_steps=2, eval_steps=2,
                   logging_steps=1, per_device_train_batch_size=2, packing=False)  # fmt: skip


def test_a_run_is_seen_while_it_trains_and_after_it_was_interrupted(rows, setup, settings, monkeypatch):
    folder = settings.llm_output_dir / "training"
    assert "No run trains on this machine." in watch_page(runs(folder))
    seen, step_end = [], work.TelemetryCallback.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        step_end(self, args, state, control, **kwargs)
        (run,) = runs(folder)
        seen.append((state.global_step, run.is_training, max((e["step"] for e in run.history), default=0)))
        if state.global_step == 5:
            page = watch_page([run])
            assert "sft: step 4 of 8, about" in page
            assert page.count("<svg") == 3
            assert '<meta http-equiv="refresh" content="5">' in page
            raise KeyboardInterrupt

    monkeypatch.setattr(work.TelemetryCallback, "on_step_end", on_step_end)
    with pytest.raises(KeyboardInterrupt):
        train(rows, CONFIG, setup, settings)
    # A step is logged after its end.
    assert seen == [(step, True, step - 1) for step in range(1, 6)]

    # The run resumes from its checkpoint: the entries after it are replaced, and no step is there twice.
    monkeypatch.setattr(work.TelemetryCallback, "on_step_end", step_end)
    result = train(rows, CONFIG, setup, settings)
    assert result.summary["resumed_from"] == "checkpoint-4"
    (run,) = runs(folder)
    steps = [entry["step"] for entry in run.history if "loss" in entry]
    assert steps == list(range(1, 9))
    known = [{key: value for key, value in entry.items() if key != "time"} for entry in run.history]
    assert known == result.summary["history"]
    assert not run.is_training
    page = watch_page([run])
    assert "No run trains on this machine." in page
    assert f"The last run was {run.folder.name}: step 8 of 8." in page


def test_a_killed_run_is_not_shown_as_training(tmp_path):
    code = f"""
import os
from pathlib import Path
from llm_engineering.training.telemetry.live import LiveHistory
live = LiveHistory(Path({str(tmp_path)!r}), "sft", 9, [])
live.add({{"step": 1, "loss": 2.0}})
os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    run = read_live(tmp_path / LIVE_FILE)
    assert (run.max_steps, run.is_training, [entry["loss"] for entry in run.history]) == (9, False, [2.0])


def test_a_line_that_is_not_complete_is_left_out(tmp_path):
    live = LiveHistory(tmp_path, "sft", 9, [])
    live.add({"step": 1, "loss": 2.0})
    with live.path.open("a") as file:
        file.write('{"step": 2, "lo')
    run = read_live(live.path)
    assert (len(run.history), run.is_training) == (1, True)
    live.path.write_text("")
    assert read_live(live.path) is None


def test_the_remaining_time_is_that_of_the_last_steps(tmp_path):
    live = LiveHistory(tmp_path, "sft", 100, [{"step": 10, "loss": 1.0}])
    # The first steps were slow, and the run resumed without the times of the steps before.
    entries = [
        {"step": 10 + number, "loss": 1.0, "time": 2.0 * number if number > 10 else -900.0} for number in range(1, 31)
    ]
    with live.path.open("a") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in entries)
    assert read_live(live.path).seconds_left == pytest.approx(2.0 * (100 - 40))


def test_a_folder_that_cannot_be_written_does_not_end_the_training(tmp_path, caplog):
    LiveHistory(tmp_path / "missing", "sft", 9, []).add({"step": 1})
    assert "training continues" in caplog.text
