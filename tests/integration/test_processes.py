"""Training in two processes: the arithmetic of one, the same care for what could be lost, and ends that reach both."""

import json
import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path

import psutil
import pytest
import torch
from datasets import DatasetDict, concatenate_datasets
from llm_engineering.models.tokenizer import load_tokenizer
from llm_engineering.recipe.compute_blocks import ComputeConfig
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.training_blocks import DPOConfig, LoraConfig, ModelConfig, SFTConfig, TrackingConfig
from llm_engineering.recipe.training_blocks import TrainingSetup as Setup
from safetensors.torch import load_file
from transformers import Trainer

from llm_engineering.training import ranks, telemetry
from llm_engineering.training.dpo import train_dpo
from llm_engineering.training.sft import train_sft
from tests.integration.conftest import ROOT
from tests.integration.preloaded import Forked
from tests.integration.test_kills import TIMED
from tests.tiny_models import formatted, write_model

STEPS = {"learning_rate": 1e-2, "num_train_epochs": 2, "logging_steps": 1, "eval_steps": 2, "save_steps": 2}
SFT = SFTConfig(**STEPS, per_device_train_batch_size=2, gradient_accumulation_steps=2, packing=False)
PACKED = SFTConfig(**STEPS, per_device_train_batch_size=1, gradient_accumulation_steps=2, packing=True)
DPO = DPOConfig(**STEPS, per_device_train_batch_size=4, gradient_accumulation_steps=1)
DROPOUT = SFT.model_copy(update={"lora": LoraConfig(r=4, lora_dropout=0.1), "logging_steps": 3})
TIMEOUT_S = 120


def poison(step, row):
    """A loss that is not a number, in the process that has a certain row; from a step on."""
    real = Trainer.compute_loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = real(self, model, inputs, *args, **kwargs)
        ids = inputs["input_ids"][0].tolist()
        holds = any(ids[i : i + len(row)] == row for i in range(len(ids)))
        return loss * float("nan") if self.model.training and self.state.global_step >= step and holds else loss

    Trainer.compute_loss = compute_loss


def signal_at(step):
    """SIGTERM to this process at the end of a step."""
    real = telemetry.TelemetryCallback.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        real(self, args, state, control, **kwargs)

    telemetry.TelemetryCallback.on_step_end = on_step_end


def no_memory():
    def training_step(self, *args, **kwargs):
        self.model.train()
        raise torch.OutOfMemoryError("CUDA out of memory")

    Trainer.training_step = training_step


def one_rank(place, port, folder, stage, config, data, start, sabotage):
    """One process of a run; what comes of it stands in `folder` by its number."""
    rank, count = place
    torch.set_num_threads(1)
    if count > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    compute = ComputeConfig(device="cpu", dtype="float32", attn_implementation="sdpa", num_processes=count)
    model = ModelConfig(name_or_path=str(data / "model"), revision="test")
    setup = Setup(
        model=model,
        max_length=256,
        chat_template="alpaca",
        compute=compute,
        tracking=TrackingConfig(comet="off"),
        seed=7,
    )
    rows = DatasetDict.load_from_disk(str(data / stage))
    settings = Settings(llm_output_dir=folder)
    ranks.join(compute, "cpu")
    told = {"end": "done"}
    try:
        if rank in sabotage:
            function, arguments = sabotage[rank]
            function(*arguments)
        result = (
            train_sft(rows, config, setup, settings)
            if stage == "sft"
            else train_dpo(rows, start, config, setup, settings)
        )
        told |= {"summary": result.summary, "adapter": str(result.adapter)}
        ranks.leave()
    except BaseException as error:
        told["end"] = f"{type(error).__name__}: {error}"
    (folder / f"told-{rank}.json").write_text(json.dumps(told))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A model, and 16 rows or pairs to train on; five to validate with, so that two processes have one left over."""
    folder = tmp_path_factory.mktemp("data")
    write_model(folder / "model", "llama")
    tokenizer = load_tokenizer(ModelConfig(name_or_path=str(folder / "model")), Settings(), "alpaca")
    for stage, kind in (("sft", "instruction"), ("dpo", "preference")):
        rows = formatted(kind, 17, tokenizer, folder)
        validation = concatenate_datasets([rows["validation"], rows["train"].select([16])])
        DatasetDict(train=rows["train"].select(range(16)), validation=validation).save_to_disk(folder / stage)
    return folder


@pytest.fixture(scope="module")
def run(data):
    """Runs a stage in processes that are forked from one that has all imported; what each of them told."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["llm_engineering.training.launch", "tests.integration.test_processes"])

    def start(folder, config, count=2, start=None, sabotage=None):
        folder.mkdir(exist_ok=True)
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        stage = "sft" if isinstance(config, SFTConfig) else "dpo"
        arguments = (port, folder, stage, config, data, start, sabotage or {})
        processes = [context.Process(target=one_rank, args=((rank, count), *arguments)) for rank in range(count)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(TIMEOUT_S)
            assert process.exitcode == 0
        return [json.loads((folder / f"told-{rank}.json").read_text()) for rank in range(count)]

    return start


@pytest.fixture(scope="module")
def sft_adapter(run, tmp_path_factory):
    (told,) = run(tmp_path_factory.mktemp("adapter"), SFT, count=1)
    assert told["end"] == "done", told
    return Path(told["adapter"])


def history(told, *names):
    return [entry[name] for name in names for entry in told["summary"]["history"] if name in entry]


def smaller(config):
    """The same step in two processes: half the accumulation, or half the batch."""
    if config.gradient_accumulation_steps > 1:
        return config.model_copy(update={"gradient_accumulation_steps": config.gradient_accumulation_steps // 2})
    return config.model_copy(update={"per_device_train_batch_size": config.per_device_train_batch_size // 2})


@pytest.mark.parametrize("config", [SFT, PACKED, DPO], ids=["sft", "packed", "dpo"])
def test_two_processes_train_like_one(config, run, sft_adapter, tmp_path):
    start = sft_adapter if config is DPO else None
    config = config.model_copy(update={"per_device_eval_batch_size": 2})
    (one,) = run(tmp_path / "one", config, count=1, start=start)
    two = run(tmp_path / "two", smaller(config), start=start)
    assert [told["end"] for told in two] == ["done", "done"]
    for names in (("loss",), ("grad_norm",), ("learning_rate",), ("eval_loss",), ("num_tokens",)):
        assert history(two[0], *names) == pytest.approx(history(one, *names), abs=1e-5), names
    if config.__class__ is DPOConfig:
        margins = history(one, "rewards/margins", "eval_rewards/margins")
        assert history(two[0], "rewards/margins", "eval_rewards/margins") == pytest.approx(margins, abs=1e-5)
    assert len(history(one, "loss")) >= 4
    weights = [load_file(Path(told["adapter"]) / "adapter_model.safetensors") for told in (one, two[0])]
    assert all(torch.allclose(weights[0][name], weights[1][name], atol=1e-4) for name in weights[0])
    sizes = {told["summary"]["effective_batch"] for told in (one, *two)}
    assert len(sizes) == 1
    assert two[0]["summary"]["num_processes"] == 2


def test_signal_to_one_process_stops_both_and_the_run_goes_on_as_if_untouched(run, tmp_path):
    whole = run(tmp_path / "whole", DROPOUT)
    stopped = run(tmp_path / "cut", DROPOUT, sabotage={1: (signal_at, (3,))})
    assert [told["end"] for told in stopped] == ["KeyboardInterrupt: SIGTERM in step 3"] * 2
    (folder,) = (tmp_path / "cut" / "training").glob("sft-*/checkpoints")
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"checkpoint-2", "checkpoint-3"}
    states = [folder / "checkpoint-3" / f"rng_state_{rank}.pth" for rank in (0, 1)]
    assert all(state.is_file() for state in states)
    resumed = run(tmp_path / "cut", DROPOUT)
    assert [told["summary"]["resumed_from"] for told in resumed] == ["checkpoint-3"] * 2
    adapters = [(Path(told["adapter"]) / "adapter_model.safetensors").read_bytes() for told in (whole[0], resumed[0])]
    assert adapters[0] == adapters[1]
    untimed = [
        [{k: v for k, v in e.items() if k not in TIMED} for e in told["summary"]["history"]]
        for told in (whole[0], resumed[0])
    ]
    assert untimed[0] == untimed[1]


def test_loss_of_one_process_that_is_no_number_ends_both_with_its_row(run, data, tmp_path):
    rows = DatasetDict.load_from_disk(str(data / "sft"))["train"]
    row = rows[5]["input_ids"]
    sabotage = dict.fromkeys((0, 1), (poison, (1, row)))
    ends = [told["end"] for told in run(tmp_path / "nan", SFT, sabotage=sabotage)]
    assert ends[0] == ends[1]
    assert ends[0].startswith("WorkError: Training stopped in step ")
    assert "the loss is nan" in ends[0]
    # The rows of one batch of one process.
    assert f"5 (id {rows[5]['id']})" in ends[0]
    assert ends[0].count("(id ") == 2


def test_full_memory_of_one_process_is_told_with_what_to_set(run, tmp_path):
    ends = [told["end"] for told in run(tmp_path / "oom", SFT, sabotage={1: (no_memory, ())})]
    assert ends[1].startswith("WorkError: Out of memory in process 1 of 2 with effective batch 8 = 2 per device × 2 ")
    assert "use effective batch 8 = 1 per device × 4 accumulated × 2 processes in the recipe's sft" in ends[1]
    assert ends[0] != "done"


@pytest.fixture(scope="module")
def command(data, tmp_path_factory):
    """The command line of a run that is too long to end by itself, and its environment."""
    folder = tmp_path_factory.mktemp("command")
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"extends: {ROOT}/configs/local.yaml\nname: tiny\nmodel: {{name_or_path: {data}/model}}\n"
        "formatting: {chat_template: alpaca}\n"
        "sft: {max_steps: 100000, save_steps: 10, eval_steps: 100000, logging_steps: 5, packing: false}\n"
        "compute: {device: cpu, dtype: float32, num_processes: 2}\ntracking: {comet: 'off'}\n"
    )
    env = {**os.environ, "LLM_OUTPUT_DIR": str(folder / "outputs"), "OMP_NUM_THREADS": "1"}
    arguments = ["llm_engineering.training", "sft", "--recipe", str(recipe), "--data", str(data / "sft"), "--output",
                 str(folder / "out")]  # fmt: skip

    def start(*launcher, more=()):
        program = [*launcher, "-m", *arguments, *more] if launcher else [*arguments, *more]
        return Forked(program[0], program[1:], env, ROOT, own_session=True)

    start.folder = folder
    return start


def numbers(folder):
    return {int(path.name.partition("-")[2]) for path in folder.glob("outputs/training/sft-*/checkpoints/checkpoint-*")}


def wait_until(condition):
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def trained(process, folder):
    """Wait until a run has saved anew; its processes, by their number."""
    before = numbers(folder)
    wait_until(lambda: process.poll() is not None or numbers(folder) - before)
    assert process.poll() is None, process.stderr.read()
    children = psutil.Process(process.pid).children()
    found = {child.environ()["RANK"]: child for child in children if "RANK" in child.environ()}
    assert sorted(found) == ["0", "1"]
    return [found["0"], found["1"]]


def test_command_line_ends_all_its_processes(command):
    folder = command.folder
    process = command()
    children = trained(process, folder)
    # What a terminal does with Ctrl-C.
    os.killpg(process.pid, signal.SIGINT)
    errors = process.communicate(timeout=TIMEOUT_S)[1]
    assert process.returncode == 130, errors
    assert "effective batch 4 = 1 per device × 2 accumulated × 2 processes" in errors
    assert errors.count("sft steps: 5 of 100000") == 1
    assert "Interrupted. A checkpoint is saved" in errors
    psutil.wait_procs(children, timeout=10)
    assert not any(child.is_running() for child in children)
    last = max(numbers(folder))

    process = command()
    children = trained(process, folder)
    children[1].kill()
    errors = process.communicate(timeout=TIMEOUT_S)[1]
    assert process.returncode == 1, errors
    assert f"going on from {folder}/outputs/training/sft-" in errors
    assert f"checkpoint-{last}" in errors
    assert "Error: Training process 1 of 2 was ended by SIGKILL, and the others with it." in errors
    assert not any(child.is_running() for child in children)


def test_torchrun_starts_the_same_run(command):
    process = command(
        "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        more=("--set", "sft.max_steps=2", "--set", "seed=8"),
    )  # fmt: skip
    errors = process.communicate(timeout=TIMEOUT_S)[1]
    assert process.returncode == 0, errors
    report = json.loads((command.folder / "out" / "report" / "report.json").read_text())
    assert (report["steps"], report["effective_batch"]) == (2, 4)
    assert (command.folder / "out" / "adapter" / "adapter_model.safetensors").is_file()
