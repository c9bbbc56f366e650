"""Stages killed with SIGKILL, between steps and while saving: the resumed run ends like an uninterrupted one."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from llm_engineering.recipe.model_blocks import LoraConfig
from llm_engineering.recipe.online_blocks import GRPOConfig, RLOOConfig
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.stage_blocks import CPTConfig, DPOConfig, KTOConfig, RewardConfig, SFTConfig
from tests.integration.conftest import ROOT, TIMED
from tests.integration.preloaded import Forked, fork_server
from tests.tiny_models import train, training_setup

STEPS = 24
# With dropout, accumulation, and a log entry every third step, which is not the step of a save.
CONFIG = SFTConfig(
    learning_rate=1e-2, num_train_epochs=4, per_device_train_batch_size=1, gradient_accumulation_steps=2,
    save_steps=2, eval_steps=5, logging_steps=3, packing=False, lora=LoraConfig(r=4, lora_dropout=0.1),
)  # fmt: skip


# All weights, with embeddings that have a learning rate of their own. Twelve rows of 12 to 23 tokens fill about six rows.
CPT = CPTConfig.model_validate({
    **CONFIG.model_dump(exclude={"lora", "method"}), "method": "full", "embedding_learning_rate": 1e-3, "packing": True,
    "gradient_accumulation_steps": 1,
})  # fmt: skip

COMMON = CONFIG.model_dump(exclude={"method", "lora", "packing", "train_sampling_strategy"})
# Completions are generated every four steps, and saved every three: a checkpoint lies inside the use of its completions.
# Without an `e` is a third of the completions.
ONLINE = {
    **COMMON,
    "rewards": [{"use": "format", "pattern": "[^e]*"}], "num_generations": 2, "max_completion_length": 4,
    "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "steps_per_generation": 2, "num_iterations": 2,
    "num_train_epochs": 2, "save_steps": 3, "beta": 0.1,
}  # fmt: skip
CONFIGS = {
    "cpt": CPT,
    "sft": CONFIG,
    "dpo": DPOConfig.model_validate(COMMON),
    "kto": KTOConfig.model_validate({**COMMON, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}),
    # Dropout stays on, so that the resumed run needs its random state.
    "reward": RewardConfig.model_validate({**COMMON, "disable_dropout": False}),
    "grpo": GRPOConfig.model_validate(ONLINE),
    "rloo": RLOOConfig.model_validate(ONLINE),
}


def train_and_die(
    model: Path, outputs: Path, kill_at: int | None, in_save: bool, sft: Path | None, stage: str = "sft"
) -> None:
    """Train a stage in this process, and copy the last checkpoint of a finished run. Some start from the adapter `sft`.

    Kills this process after the step `kill_at`, or with `in_save` while it saves that step.
    """
    from datasets import Dataset, DatasetDict

    from llm_engineering.training.telemetry import work

    torch.set_num_threads(1)
    step_end = work.TelemetryCallback.on_step_end
    saved = torch.save

    def on_step_end(self, args, state, control, **kwargs):
        step_end(self, args, state, control, **kwargs)
        if state.global_step == kill_at and not in_save:
            os.kill(os.getpid(), signal.SIGKILL)
        last["step"] = state.global_step

    def on_train_end(self, args, state, control, **kwargs):
        newest = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        shutil.copytree(newest, outputs / "last", dirs_exist_ok=True)

    def save(value, file, *args, **kwargs):
        saved(value, file, *args, **kwargs)
        if in_save and last["step"] == kill_at and Path(file).name == "optimizer.pt":
            Path(file).write_bytes(Path(file).read_bytes()[:1000])
            os.kill(os.getpid(), signal.SIGKILL)

    last = {"step": 0}
    work.TelemetryCallback.on_step_end = on_step_end
    work.TelemetryCallback.on_train_end = on_train_end
    torch.save = save
    rows = [
        {"id": f"r{i}", "input_ids": [1, *range(20 + i, 30 + 2 * i), 0], "labels": [-100] * 4 + [*range(23 + i, 30 + 2 * i), 0]}
        for i in range(16)
    ]  # fmt: skip
    if stage == "kto":
        rows = [
            {
                "id": f"r{i}",
                "prompt_ids": [1, 20 + i // 2],
                "completion_ids": [*range(30, 33 + i), 0],
                "label": i % 2 == 0,
            }
            for i in range(16)
        ]
    elif stage in ("grpo", "rloo"):
        message = {"role": "user", "content": "?"}
        rows = [
            {"id": f"r{i}", "prompt_ids": [1, *range(20, 24 + i)], "answers": [], "prompt": [message]}
            for i in range(16)
        ]
    elif stage in ("dpo", "reward"):
        rows = [
            {
                "id": f"r{i}",
                "prompt_ids": [1, 20 + i],
                "chosen_ids": [*range(30, 33 + i), 0],
                "rejected_ids": [40 + i, 0],
            }
            for i in range(16)
        ]
    if stage == "cpt":
        rows = [row | {"labels": row["input_ids"]} for row in rows]
    data = DatasetDict(train=Dataset.from_list(rows[:12]), validation=Dataset.from_list(rows[12:]))
    setup = training_setup(model, max_length=64)
    settings = Settings(llm_output_dir=outputs)
    result = train(data, CONFIGS[stage], setup, settings, start=sft)
    (outputs / "summary.json").write_text(json.dumps(result.summary))
    shutil.copytree(result.adapter, outputs / "adapter", dirs_exist_ok=True)


@pytest.fixture(scope="module")
def run(small_llama):
    """A function that runs `train_and_die` in a forked process and returns its exit code.

    The fork server has imported everything and computed nothing.
    """
    context = fork_server()

    def start(
        outputs: Path, kill_at: int | None = None, in_save: bool = False, sft: Path | None = None, stage: str = "sft"
    ) -> int | None:
        process = context.Process(target=train_and_die, args=(small_llama, outputs, kill_at, in_save, sft, stage))
        process.start()
        process.join(120)
        return process.exitcode

    return start


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory) -> Path:
    outputs = tmp_path_factory.mktemp("whole")
    assert run(outputs) == 0
    return outputs


def history(outputs: Path) -> list[dict[str, float]]:
    entries = json.loads((outputs / "summary.json").read_text())["history"]
    return [{name: value for name, value in entry.items() if name not in TIMED} for entry in entries]


def assert_equal(outputs: Path, whole: Path) -> None:
    (weights,) = (whole / "adapter").glob("*.safetensors")
    assert (outputs / "adapter" / weights.name).read_bytes() == weights.read_bytes()
    mine, other = (torch.load(o / "last" / "optimizer.pt") for o in (outputs, whole))
    assert mine["param_groups"] == other["param_groups"]
    for key, moments in other["state"].items():
        for moment, value in moments.items():
            assert torch.equal(mine["state"][key][moment], value)
    assert history(outputs) == history(whole)


def test_five_kills_change_nothing(run, whole, tmp_path):
    for step in sorted(random.Random(20).sample(range(1, STEPS), 5)):
        assert run(tmp_path, kill_at=step) == -signal.SIGKILL
    assert run(tmp_path) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["resumed_from"] is not None
    assert summary["steps"] == STEPS
    assert_equal(tmp_path, whole)


@pytest.mark.parametrize("stage", ["dpo", "kto", "reward"])
def test_a_killed_stage_after_sft_ends_like_an_uninterrupted_one(stage, run, whole, tmp_path):
    start, untouched, killed = whole / "adapter", tmp_path / "untouched", tmp_path / "killed"
    untouched.mkdir()
    assert run(untouched, sft=start, stage=stage) == 0
    for step in (5, 15):
        assert run(killed, kill_at=step, sft=start, stage=stage) == -signal.SIGKILL
    assert run(killed, sft=start, stage=stage) == 0
    assert json.loads((killed / "summary.json").read_text())["resumed_from"] == "checkpoint-14"
    assert_equal(killed, untouched)


def test_killed_cpt_ends_like_an_uninterrupted_one(run, tmp_path):
    untouched, killed = tmp_path / "untouched", tmp_path / "killed"
    untouched.mkdir()
    assert run(untouched, stage="cpt") == 0
    steps = json.loads((untouched / "summary.json").read_text())["steps"]
    assert steps >= 12
    for step in sorted(random.Random(20).sample(range(2, steps), 2)):
        assert run(killed, kill_at=step, stage="cpt") == -signal.SIGKILL
    assert run(killed, stage="cpt") == 0
    summary = json.loads((killed / "summary.json").read_text())
    assert summary["resumed_from"] is not None
    assert summary["steps"] == steps
    assert_equal(killed, untouched)


@pytest.mark.parametrize(("stage", "kills"), [("grpo", (7, 17)), ("rloo", (11,))])
def test_killed_reinforcement_ends_like_an_uninterrupted_one(run, whole, tmp_path, stage, kills):
    start, untouched, killed = whole / "adapter", tmp_path / "untouched", tmp_path / "killed"
    untouched.mkdir()
    assert run(untouched, sft=start, stage=stage) == 0
    rewards = [entry["reward"] for entry in history(untouched) if "reward" in entry]
    assert len(set(rewards)) > 1
    for step in kills:
        assert run(killed, kill_at=step, sft=start, stage=stage) == -signal.SIGKILL
    assert run(killed, sft=start, stage=stage) == 0
    newest = (kills[-1] - 1) // 3 * 3
    summary, other = (json.loads((folder / "summary.json").read_text()) for folder in (killed, untouched))
    assert summary["resumed_from"] == f"checkpoint-{newest}"
    # The completions of the next steps were stored.
    assert newest % 4
    assert summary["completions"] == other["completions"]
    assert_equal(killed, untouched)


def test_kill_while_saving_leaves_no_incomplete_checkpoint(run, whole, tmp_path):
    assert run(tmp_path, kill_at=8, in_save=True) == -signal.SIGKILL
    (folder,) = (tmp_path / "training").glob("*/checkpoints")
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-6"}
    assert (folder / ".partial" / "checkpoint-8" / "optimizer.pt").stat().st_size == 1000
    assert run(tmp_path) == 0
    assert json.loads((tmp_path / "summary.json").read_text())["resumed_from"] == "checkpoint-6"
    assert_equal(tmp_path, whole)


def test_command_line_resumes_after_sigterm(tiny_model, tmp_path):
    from datasets import Dataset, DatasetDict

    row = {"id": "r", "input_ids": [1, 20, 21, 2], "labels": [-100, 20, 21, 2]}
    DatasetDict(train=Dataset.from_list([row] * 8), validation=Dataset.from_list([row])).save_to_disk(tmp_path / "data")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"extends: {ROOT}/configs/python_reference.yaml\nname: tiny\nmodel: {{name_or_path: {tiny_model}}}\n"
        "sft: {max_steps: 40, save_steps: 10, eval_steps: 1000, gradient_accumulation_steps: 1}\n"
        "compute: {device: cpu, dtype: float32}\ntracking: {comet: 'off'}\n"
    )
    env = {**os.environ, "LLM_OUTPUT_DIR": str(tmp_path / "outputs"), "OMP_NUM_THREADS": "1"}

    def start(*arguments: str) -> Forked:
        places = ["--recipe", str(recipe), "--data", str(tmp_path / "data"), "--output", str(tmp_path / "out")]
        return Forked("llm_engineering.training", ["sft", *places, *arguments], env, ROOT)

    process = start()
    deadline = time.monotonic() + 120
    while not (found := list(tmp_path.glob("outputs/training/*/checkpoints/checkpoint-10"))):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert "Interrupted. A checkpoint is saved" in process.communicate(timeout=60)[1]
    assert process.returncode == 130
    steps = [int(path.name.partition("-")[2]) for path in found[0].parent.glob("checkpoint-*")]
    newest = found[0].parent / f"checkpoint-{max(steps)}"

    other = start("--set", "seed=8", "--resume-from", str(newest))
    assert "made with another seed. Use" in other.communicate(timeout=60)[1]
    assert other.returncode == 2
    same = start("--resume-from", str(newest))
    assert f"resuming from {newest}" in same.communicate(timeout=60)[1]
    assert same.returncode == 0
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
