"""Which checkpoints stay, and which are removed."""

import json
import os

from safetensors.torch import save_file
from torch import save, zeros
from transformers.trainer_utils import rotate_checkpoints

from llm_engineering.training.trainer.checkpoints import FINISHED, newest_complete, publish, remove_finished


def checkpoint(folder, step):
    """Publish a checkpoint in a folder, as the trainer does."""
    partial = folder / ".partial" / f"checkpoint-{step}"
    partial.mkdir(parents=True)
    save_file({"a": zeros(2)}, partial / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        save({}, partial / name)
    (partial / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    publish(partial, folder / partial.name, {})
    rotate_checkpoints(output_dir=str(folder), save_total_limit=2)


def names(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def test_the_newest_checkpoint_stays_if_the_clock_was_set_back(tmp_path):
    for step in (2, 4):
        checkpoint(tmp_path, step)
        os.utime(tmp_path / f"checkpoint-{step}", (4e9 + step, 4e9 + step))
    checkpoint(tmp_path, 6)
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-6"]
    assert newest_complete(tmp_path, {}).name == "checkpoint-6"


def test_a_damaged_later_checkpoint_does_not_push_out_a_whole_one(tmp_path):
    for step in (2, 9):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-9" / "optimizer.pt").write_bytes(b"")
    assert newest_complete(tmp_path, {}).name == "checkpoint-2"
    checkpoint(tmp_path, 4)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4"]


def test_only_checkpoints_of_trainings_that_have_ended_are_removed(tmp_path):
    for name in ("ended", "running"):
        (tmp_path / name / "checkpoints" / "checkpoint-2").mkdir(parents=True)
    (tmp_path / "ended" / FINISHED).touch()
    remove_finished(tmp_path)
    assert not (tmp_path / "ended" / "checkpoints").exists()
    assert not (tmp_path / "ended" / FINISHED).exists()
    assert (tmp_path / "running" / "checkpoints" / "checkpoint-2").exists()
