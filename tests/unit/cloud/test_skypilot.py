"""Training stages as SkyPilot tasks, with a stand-in for the command `sky`. Training in the task is real."""

import os
import shutil
import sys
import time
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from llm_engineering.cloud import skypilot
from llm_engineering.cloud.skypilot import check_skypilot, train_with_skypilot
from llm_engineering.errors import RequestError, WorkError
from llm_engineering.recipe.compute_blocks import ComputeConfig, SkyPilotConfig
from llm_engineering.recipe.stage_blocks import SFTConfig
from tests.fakes import sky
from tests.tiny_models import formatted, job_of, train, training_setup


@pytest.fixture
def make_venv(job_python):
    """Commands that make a `.venv` whose `python` has already imported the libraries."""
    return f"mkdir -p .venv/bin && ln -sfn {job_python.partition(':')[0]}/python .venv/bin/"


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Puts the stand-in into the path; returns a function for the commands that were called."""
    root, folder = tmp_path / "sky", tmp_path / "bin"
    root.mkdir()
    folder.mkdir()
    for name in ("sky", "ssh"):
        place = folder / name
        place.write_text(f"#!{sys.executable}\n" + Path(sky.__file__).read_text(encoding="utf-8"))
        place.chmod(0o755)
    monkeypatch.setenv("FAKE_SKY", str(root))
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return lambda: (root / "commands").read_text().splitlines() if (root / "commands").is_file() else []


@pytest.fixture
def data(tokenizer, tmp_path):
    return formatted("instruction", 12, tokenizer, tmp_path)


def stage(tiny_model, setup, **fields):
    """A job of six steps on the machine of the stand-in, and the same work on this machine."""
    config = SFTConfig(
        method="lora",
        learning_rate=1e-3,
        num_train_epochs=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=1,
        max_steps=6,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        packing=False,
    )
    here = ComputeConfig(device="cpu", dtype="float32", attn_implementation="sdpa")
    there = here.model_copy(update={"target": "skypilot", "skypilot": SkyPilotConfig(setup=setup, **fields)})
    return job_of(config, training_setup(tiny_model, there)), config, training_setup(tiny_model, here)


def test_a_running_task_is_followed_and_its_adapter_is_that_of_a_training_here(
    commands, make_venv, tiny_model, data, settings, tmp_path
):
    job, config, setup = stage(tiny_model, make_venv, file_mounts={"/outputs": {"name": "bucket"}})
    settings.hf_token = SecretStr("hf_secret_value")

    def leave(facts):
        raise RuntimeError

    with pytest.raises(RuntimeError):
        train_with_skypilot(job, data, settings, "acme", leave)
    facts = []
    result = train_with_skypilot(job, data, settings, "acme", facts.append)
    here = train(data, config, setup, settings)
    weights = "adapter_model.safetensors"
    assert (result.adapter / weights).read_bytes() == (here.adapter / weights).read_bytes()
    # Each names the base model as the recipe does.
    assert (result.adapter / "adapter_config.json").read_bytes() == (here.adapter / "adapter_config.json").read_bytes()
    assert [fact["skypilot_status"] for fact in facts] == ["RUNNING", "SUCCEEDED"]
    assert facts[1]["skypilot_cloud"] == "Fake"
    called = commands()
    assert sum(command.startswith("launch") for command in called) == 1
    assert called[-1].startswith("down --yes sft-")
    assert list((tmp_path / "sky").iterdir()) == [tmp_path / "sky" / "commands"]
    # A secret is named, and its value is in the environment of the command alone.
    assert any("--secret=HF_TOKEN" in command for command in called)
    assert not any("hf_secret_value" in command for command in called)
    assert not list(settings.llm_output_dir.glob("*partial*"))


def test_an_interrupted_task_continues_from_its_checkpoint(commands, make_venv, tiny_model, data, settings, tmp_path):
    job, config, setup = stage(tiny_model, make_venv)

    def interrupt(facts):
        (machine,) = (tmp_path / "sky").glob("sft-*")
        while not list(machine.rglob("checkpoints/checkpoint-2/identity.json")):
            time.sleep(0.05)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_with_skypilot(job, data, settings, "acme", interrupt)
    assert any(command.startswith("cancel --yes sft-") for command in commands())
    result = train_with_skypilot(job, data, settings, "acme", lambda facts: None)
    assert result.summary["resumed_from"]
    here = train(data, config, setup, settings)
    weights = "adapter_model.safetensors"
    assert (result.adapter / weights).read_bytes() == (here.adapter / weights).read_bytes()


def test_ctrl_c_while_the_machine_starts_names_what_may_be_paid(
    commands, tiny_model, data, settings, monkeypatch, caplog
):
    job, _, _ = stage(tiny_model, setup="true")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(skypilot._Task, "launch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train_with_skypilot(job, data, settings, "acme", lambda facts: None)
    assert "may have started, and may be paid: run `sky down sft-" in caplog.text
    assert not any(command.startswith("cancel") for command in commands())


def test_the_end_of_the_log_of_a_failed_task_is_shown(commands, tiny_model, data, settings):
    job, _, _ = stage(tiny_model, setup="echo no such package; false")
    with pytest.raises(WorkError, match=r"(?s)ended as failed.*no such package.*sky down sft-"):
        train_with_skypilot(job, data, settings, "acme", lambda facts: None)


def test_a_lost_machine_is_named(commands, make_venv, tiny_model, data, settings, tmp_path):
    job, _, _ = stage(tiny_model, make_venv)

    def lose(facts):
        for machine in (tmp_path / "sky").glob("sft-*"):
            sky.cancel([machine.name, "1"])
            shutil.rmtree(machine)

    with pytest.raises(WorkError, match=r"is gone, .* if compute.skypilot.output_dir is in a bucket"):
        train_with_skypilot(job, data, settings, "acme", lose)


def test_resources_are_checked_before_any_work(commands, monkeypatch):
    check_skypilot(SkyPilotConfig(resources={"infra": "slurm"}))
    with pytest.raises(
        RequestError, match="SkyPilot finds no machine .* It says: ValueError: Cluster nowhere not found"
    ):
        check_skypilot(SkyPilotConfig(resources={"infra": "nowhere"}))
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(RequestError, match="pipx install"):
        check_skypilot(SkyPilotConfig())


def test_the_block_and_the_target_belong_together():
    with pytest.raises(ValidationError, match="needs the block skypilot"):
        ComputeConfig(target="skypilot")
    with pytest.raises(ValidationError, match="block skypilot has no effect with target local"):
        ComputeConfig(skypilot=SkyPilotConfig())
    cards = ComputeConfig(target="skypilot", skypilot=SkyPilotConfig(resources={"accelerators": "L40S"}))
    assert (cards.in_job.device, cards.in_job.target, cards.in_job.skypilot) == ("cuda", "local", None)


def test_a_machine_is_taken_down_when_it_is_idle_unless_the_recipe_says_otherwise():
    assert SkyPilotConfig().task_resources["autostop"] == {"idle_minutes": 15, "down": True}
    assert SkyPilotConfig(resources={"autostop": False}).task_resources["autostop"] is False
