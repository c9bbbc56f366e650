"""Training in two processes: the same result as in one, no lost checkpoint, and failures that stop both processes."""

import ctypes
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from datasets import DatasetDict, concatenate_datasets
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import Trainer, modeling_utils

from llm_engineering.models.tokenizer import load_tokenizer
from llm_engineering.recipe.compute_blocks import ComputeConfig
from llm_engineering.recipe.model_blocks import LoraConfig, ModelConfig
from llm_engineering.recipe.online_blocks import GRPOConfig, RLOOConfig
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.stage_blocks import DPOConfig, KTOConfig, RewardConfig, SFTConfig
from llm_engineering.recipe.stages import STAGES
from llm_engineering.recipe.training_blocks import TrackingConfig
from llm_engineering.recipe.training_blocks import TrainingSetup as Setup
from llm_engineering.training.processes import ranks, transfer
from llm_engineering.training.telemetry import work
from llm_engineering.training.trainer.checkpoints import PARTIAL
from tests.fakes.machine import why_no_jobs
from tests.integration.conftest import ROOT, TIMED
from tests.integration.preloaded import Forked, fork_server
from tests.tiny_models import formatted, train, write_model

STEPS = {"learning_rate": 1e-2, "num_train_epochs": 2, "logging_steps": 1, "eval_steps": 2, "save_steps": 2,
         "per_device_eval_batch_size": 2}  # fmt: skip
SFT = SFTConfig(**STEPS, per_device_train_batch_size=2, gradient_accumulation_steps=2, packing=False)
PACKED = SFTConfig(**STEPS, per_device_train_batch_size=1, gradient_accumulation_steps=2, packing=True)
DPO = DPOConfig(**STEPS, per_device_train_batch_size=4, gradient_accumulation_steps=1)
BATCH = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
ONLINE = {
    "rewards": [{"use": "stopped"}, {"use": "length", "target": 5}],
    "num_generations": 2,
    "max_completion_length": 8,
}
DROPOUT = SFT.model_copy(update={"lora": LoraConfig(r=4, lora_dropout=0.1), "logging_steps": 3})
TIMEOUT_S = 120
# CLONE_NEWNS of unshare(2).
_NEW_MOUNTS = 0x20000


def poison(step, row):
    """From `step` on, make the loss NaN in the process whose batch has `row`."""
    real = Trainer.compute_loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = real(self, model, inputs, *args, **kwargs)
        ids = inputs["input_ids"][0].tolist()
        has_row = any(ids[i : i + len(row)] == row for i in range(len(ids)))
        return loss * float("nan") if self.model.training and self.state.global_step >= step and has_row else loss

    Trainer.compute_loss = compute_loss


def signal_at(step):
    """Send SIGTERM to this process at the end of a step."""
    real = work.TelemetryCallback.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        real(self, args, state, control, **kwargs)

    work.TelemetryCallback.on_step_end = on_step_end


def no_memory():
    def training_step(self, *args, **kwargs):
        self.model.train()
        raise torch.OutOfMemoryError("CUDA out of memory")

    Trainer.training_step = training_step


def fsdp_on_a_processor():
    """Let accelerate shard here: it knows FSDP only on cards. The first process of a machine alone may read weights of the base."""
    real = AcceleratorState.__init__

    def initialise(self, *args, fsdp_plugin=None, **kwargs):
        real(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = initialise
    if not ranks.is_first_here():
        modeling_utils.safe_open = None


def note_shards(folder):
    """Note the bytes of this process's weights when training begins, and of the whole model."""
    real = work.TelemetryCallback.on_train_begin

    def on_train_begin(self, args, state, control, model, **kwargs):
        weights = list(model.parameters())
        assert all(isinstance(weight, DTensor) for weight in weights)
        own = sum(weight.to_local().nbytes for weight in weights)
        whole = sum(weight.nbytes for weight in weights)
        (folder / f"bytes-{ranks.rank()}.json").write_text(json.dumps([own, whole]))
        real(self, args, state, control, model=model, **kwargs)

    work.TelemetryCallback.on_train_begin = on_train_begin


def sharded(folder, stop=None):
    fsdp_on_a_processor()
    note_shards(folder)
    if stop is not None:
        signal_at(stop)


def hide(folder):
    """Cover a folder with an empty one for this process, as if it were on the disk of another machine."""
    folder.mkdir(exist_ok=True)
    if ctypes.CDLL(None, use_errno=True).unshare(_NEW_MOUNTS):
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "none", str(folder)], check=True)


def stage_of(config):
    return next(name for name, stage in STAGES.items() if stage.block is type(config))


def one_rank(place, port, folder, stage, config, data, start, sabotage, way, apart, resume_from=None):
    """Train as one process of a run, and write the outcome to `outcome-RANK.json` in `folder`.

    Args:
        way: keys of `compute` that the recipe refuses on a processor.
        apart: whether each of two processes is on a machine of its own, which does not see the other's output folder.
    """
    rank, count = place
    torch.set_num_threads(1)
    if count > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if apart:
        os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        hide(folder / f"machine-{1 - rank}")
        transfer._CHUNK_BYTES = 10_000
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
    setup = setup.model_copy(update={"compute": compute.model_copy(update=way)})
    rows = DatasetDict.load_from_disk(str(data / stage))
    settings = Settings(llm_output_dir=folder / f"machine-{rank}" if apart else folder)
    ranks.join(compute, "cpu")
    outcome = {"end": "done"}
    try:
        if rank in sabotage:
            function, arguments = sabotage[rank]
            function(*arguments)
        result = (
            train(rows, config, setup, settings, resume_from=resume_from)
            if start is None
            else train(rows, config, setup, settings, start=start, resume_from=resume_from)
        )
        outcome |= {"summary": result.summary, "adapter": str(result.adapter)}
        ranks.leave()
    except BaseException as error:
        outcome["end"] = f"{type(error).__name__}: {error}"
    (folder / f"outcome-{rank}.json").write_text(json.dumps(outcome))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A model, and 16 rows or pairs for training and five for validation, which two processes cannot share evenly."""
    folder = tmp_path_factory.mktemp("data")
    write_model(folder / "model", "llama")
    tokenizer = load_tokenizer(ModelConfig(name_or_path=str(folder / "model")), Settings(), "alpaca")
    for stage in ("sft", "dpo", "reward", "kto", "grpo", "rloo"):
        (folder / f"{stage}-rows").mkdir()
        rows = formatted(STAGES[stage].rows, 17, tokenizer, folder / f"{stage}-rows")
        validation = concatenate_datasets([rows["validation"], rows["train"].select([16])])
        DatasetDict(train=rows["train"].select(range(16)), validation=validation).save_to_disk(folder / stage)
    return folder


@pytest.fixture(scope="module")
def run(data):
    """A function that trains a stage in forked processes and returns their outcomes.

    The fork server has imported everything.
    """
    context = fork_server()

    def start(folder, config, count=2, start=None, sabotage=None, distributed="ddp", apart=False, resume_from=None):
        folder.mkdir(exist_ok=True)
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        stage = stage_of(config)
        arguments = (
            port,
            folder,
            stage,
            config,
            data,
            start,
            sabotage or {},
            {"distributed": distributed},
            apart,
            resume_from,
        )
        processes = [context.Process(target=one_rank, args=((rank, count), *arguments)) for rank in range(count)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(TIMEOUT_S)
            assert process.exitcode == 0
        return [json.loads((folder / f"outcome-{rank}.json").read_text()) for rank in range(count)]

    return start


@pytest.fixture(scope="module")
def alone(run, tmp_path_factory):
    """A function that trains a config in one process, once for each config; returns the outcome. DPO starts from SFT."""
    outcomes = []

    def train(config):
        for known, outcome in outcomes:
            if known == config:
                return outcome
        start = None if isinstance(config, SFTConfig) else Path(train(SFT)["adapter"])
        (outcome,) = run(tmp_path_factory.mktemp("one"), config, count=1, start=start)
        assert outcome["end"] == "done", outcome
        outcomes.append((config, outcome))
        return outcome

    return train


@pytest.fixture(scope="module")
def sft_adapter(alone):
    return Path(alone(SFT)["adapter"])


def history(outcome, *names):
    return [entry[name] for name in names for entry in outcome["summary"]["history"] if name in entry]


def smaller(config):
    """Halve the accumulation or the batch, so that two processes have the same effective batch."""
    if config.gradient_accumulation_steps > 1:
        return config.model_copy(update={"gradient_accumulation_steps": config.gradient_accumulation_steps // 2})
    return config.model_copy(update={"per_device_train_batch_size": config.per_device_train_batch_size // 2})


@pytest.mark.parametrize("config", [SFT, PACKED, DPO], ids=["sft", "packed", "dpo"])
def test_two_processes_train_like_one(config, run, alone, sft_adapter, tmp_path):
    start = None if isinstance(config, SFTConfig) else sft_adapter
    one = alone(config)
    two = run(tmp_path / "two", smaller(config), start=start)
    assert [outcome["end"] for outcome in two] == ["done", "done"]
    for names in (("loss",), ("grad_norm",), ("learning_rate",), ("eval_loss",), ("num_tokens",)):
        assert history(two[0], *names) == pytest.approx(history(one, *names), abs=1e-5), names
    if config.__class__ is DPOConfig:
        margins = history(one, "rewards/margins", "eval_rewards/margins")
        assert history(two[0], "rewards/margins", "eval_rewards/margins") == pytest.approx(margins, abs=1e-5)
    assert len(history(one, "loss")) >= 4
    weights = [load_file(Path(outcome["adapter"]) / "adapter_model.safetensors") for outcome in (one, two[0])]
    assert all(torch.allclose(weights[0][name], weights[1][name], atol=1e-4) for name in weights[0])
    sizes = {outcome["summary"]["effective_batch"] for outcome in (one, *two)}
    assert len(sizes) == 1
    assert two[0]["summary"]["num_processes"] == 2


# KTO compares the answers of a batch, and completions are drawn in each process, so two processes do not compute what one does.
@pytest.mark.parametrize(
    "config",
    [
        RewardConfig(**STEPS | BATCH),
        KTOConfig(**STEPS | BATCH),
        GRPOConfig(**STEPS | BATCH | ONLINE),
        RLOOConfig(**STEPS | BATCH | ONLINE),
    ],
    ids=["reward", "kto", "grpo", "rloo"],
)
def test_two_processes_train_one_adapter(config, run, sft_adapter, tmp_path):
    two = run(tmp_path / "two", smaller(config), start=sft_adapter)
    assert [outcome["end"] for outcome in two] == ["done", "done"]
    assert history(two[0], "loss") == history(two[1], "loss")
    assert all(math.isfinite(loss) for loss in history(two[0], "loss"))
    assert two[0]["summary"]["num_processes"] == 2
    trained, before = (
        load_file(folder / "adapter_model.safetensors") for folder in (Path(two[0]["adapter"]), sft_adapter)
    )
    assert any(not torch.equal(trained[name], before[name]) for name in before)


FULL = SFT.model_copy(update={"method": "full", "learning_rate": 1e-3})
DEEPSPEED = {"zero-2": PACKED, "zero-3": FULL}


@pytest.mark.parametrize("config", [PACKED, FULL, DPO], ids=["packed", "full", "dpo"])
def test_shards_of_weights_that_one_process_has_read_train_like_one_process(config, run, alone, sft_adapter, tmp_path):
    start = sft_adapter if config is DPO else None
    one = alone(config)
    folder = tmp_path / "two"
    sabotage = dict.fromkeys((0, 1), (sharded, (folder,)))
    two = run(folder, smaller(config), start=start, sabotage=sabotage, distributed="fsdp2")
    assert [outcome["end"] for outcome in two] == ["done", "done"]
    for name in ("loss", "grad_norm", "eval_loss"):
        assert history(two[0], name) == pytest.approx(history(one, name), abs=1e-4), name
    file = "model.safetensors" if config is FULL else "adapter_model.safetensors"
    weights = [load_file(Path(outcome["adapter"]) / file) for outcome in (one, two[0])]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.allclose(weights[0][name], weights[1][name], atol=1e-4) for name in weights[0])
    for rank in (0, 1):
        own, whole = json.loads((folder / f"bytes-{rank}.json").read_text())
        assert own == pytest.approx(whole / 2, rel=0.05)


@pytest.mark.parametrize(
    ("config", "distributed"),
    [(SFT, "fsdp2"), (FULL, "fsdp2"), (DPO, "fsdp2"), (SFT, "ddp")],
    ids=["lora", "full", "dpo", "ddp"],
)
def test_a_checkpoint_of_two_processes_is_resumed_in_one_two_and_four(
    config, distributed, run, alone, sft_adapter, tmp_path
):
    """The losses go on as in a run of one process that was not interrupted. They differ only by the order of sums."""
    start = sft_adapter if config is DPO else None

    def trained(count, settings, stop=None, distributed=distributed, **options):
        folder, sabotage = tmp_path / f"{count}-{stop}-{distributed}", {}
        if distributed == "fsdp2" and count > 1:
            sabotage = dict.fromkeys(range(count), (sharded, (folder, stop)))
        elif stop:
            sabotage = {1: (signal_at, (stop,))}
        return run(folder, settings, count, start, sabotage, distributed if count > 1 else "ddp", **options)

    two = smaller(config)
    assert [outcome["end"] for outcome in trained(2, two, stop=3)] == ["KeyboardInterrupt: SIGTERM in step 3"] * 2
    (checkpoint,) = tmp_path.glob("2-3-*/training/*/checkpoints/checkpoint-3")
    goes_on = [(1, config, "ddp"), (2, two, "ddp"), (4, smaller(two), distributed)]
    for count, settings, way in [*goes_on, *([(2, two, "fsdp2")] if distributed == "fsdp2" else [])]:
        resumed = trained(count, settings, distributed=way, resume_from=checkpoint)
        assert [outcome["end"] for outcome in resumed] == ["done"] * count
        assert resumed[0]["summary"]["resumed_from"] == "checkpoint-3"
        for name in ("loss", "grad_norm", "learning_rate", "eval_loss", "num_tokens"):
            assert history(resumed[0], name) == pytest.approx(history(alone(config), name), abs=1e-4), (count, name)
    if distributed == "ddp":
        (more, *_) = trained(2, config, resume_from=checkpoint)
        assert "it was made with another sft.rows of a step" in more["end"]
        (shards, *_) = trained(2, two, distributed="fsdp2", resume_from=checkpoint)
        assert "cannot be resumed with fsdp2, because it was made without" in shards["end"]


def test_signal_to_one_process_stops_both_and_the_resumed_run_ends_like_an_uninterrupted_one(run, tmp_path):
    whole = run(tmp_path / "whole", DROPOUT)
    stopped = run(tmp_path / "cut", DROPOUT, sabotage={1: (signal_at, (3,))})
    assert [outcome["end"] for outcome in stopped] == ["KeyboardInterrupt: SIGTERM in step 3"] * 2
    (folder,) = (tmp_path / "cut" / "training").glob("sft-*/checkpoints")
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"checkpoint-2", "checkpoint-3"}
    states = [folder / "checkpoint-3" / f"rng_state_{rank}.pth" for rank in (0, 1)]
    assert all(state.is_file() for state in states)
    resumed = run(tmp_path / "cut", DROPOUT)
    assert [outcome["summary"]["resumed_from"] for outcome in resumed] == ["checkpoint-3"] * 2
    adapters = [
        (Path(outcome["adapter"]) / "adapter_model.safetensors").read_bytes() for outcome in (whole[0], resumed[0])
    ]
    assert adapters[0] == adapters[1]
    untimed = [
        [{k: v for k, v in e.items() if k not in TIMED} for e in outcome["summary"]["history"]]
        for outcome in (whole[0], resumed[0])
    ]
    assert untimed[0] == untimed[1]


@pytest.mark.skipif(why_no_jobs() is not None, reason=str(why_no_jobs()))
@pytest.mark.parametrize("distributed", ["ddp", "fsdp2"])
def test_machines_without_a_shared_disk_resume_from_the_checkpoint_of_the_first(distributed, run, tmp_path):
    def trained(folder, stop=None):
        sabotage = {1: (signal_at, (stop,))} if stop else {}
        if distributed == "fsdp2":
            sabotage = dict.fromkeys((0, 1), (sharded, (folder, stop)))
        outcomes = run(folder, DROPOUT, sabotage=sabotage, distributed=distributed, apart=True)
        return [outcome["end"] for outcome in outcomes], outcomes[0].get("summary", {})

    _, whole = trained(tmp_path / "whole")
    assert trained(tmp_path / "cut", stop=1)[0] == ["KeyboardInterrupt: SIGTERM in step 1"] * 2
    # What a killed process has written there.
    (training,) = (tmp_path / "cut" / "machine-0" / "training").iterdir()
    left = tmp_path / "cut" / "machine-1" / "training" / training.name / "checkpoints" / PARTIAL / "checkpoint-2"
    left.mkdir(parents=True)
    (left / "rng_state_0.pth").write_bytes(b"torn")
    assert trained(tmp_path / "cut", stop=3)[0] == ["KeyboardInterrupt: SIGTERM in step 3"] * 2
    assert (training / "checkpoints" / "checkpoint-2" / "rng_state_0.pth").read_bytes() != b"torn"
    first, second = ({path.name for path in (tmp_path / "cut").glob(f"machine-{i}/**/*.*")} for i in (0, 1))
    assert {"rng_state_0.pth", "rng_state_1.pth", "trainer_state.json"} <= first
    assert second == set()
    ends, resumed = trained(tmp_path / "cut")
    assert (ends, resumed["resumed_from"]) == (["done", "done"], "checkpoint-3")
    untimed = [[{k: v for k, v in e.items() if k not in TIMED} for e in run["history"]] for run in (whole, resumed)]
    assert untimed[0] == untimed[1]
    assert not list((tmp_path / "cut").glob("machine-1/**/*.*"))


@pytest.fixture(scope="module")
def deepspeed_runs(data, tmp_path_factory):
    """The outcomes of both machines by folder, from a process whose accelerate has found DeepSpeed when it was imported."""
    folder = tmp_path_factory.mktemp("deepspeed")
    env = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT}/.venv/deepspeed", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.integration.deepspeed_runs", str(data), str(folder)]
    subprocess.run(command, env=os.environ | env, cwd=ROOT, check=True, capture_output=True, timeout=3 * TIMEOUT_S)
    return lambda name: [json.loads((folder / name / f"outcome-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.skipif(why_no_jobs() is not None, reason=str(why_no_jobs()))
@pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed compiles its communication with g++")
@pytest.mark.parametrize("way", DEEPSPEED)
def test_interrupted_machines_with_deepspeed_train_like_one_process(way, deepspeed_runs, alone):
    """The real DeepSpeed shares optimiser state, gradients and weights. Each machine has only its own shard on its disk."""
    assert [outcome["end"] for outcome in deepspeed_runs(f"{way}-cut")] == ["KeyboardInterrupt: SIGTERM in step 3"] * 2
    resumed = deepspeed_runs(f"{way}-resumed")
    assert [outcome["end"] for outcome in resumed] == ["done", "done"]
    assert resumed[0]["summary"]["resumed_from"] == "checkpoint-3"
    one = alone(DEEPSPEED[way])
    for name in ("loss", "learning_rate", "eval_loss", "num_tokens"):
        assert history(resumed[0], name) == pytest.approx(history(one, name), abs=1e-4), name


@pytest.mark.skipif(why_no_jobs() is not None, reason=str(why_no_jobs()))
def test_what_machines_without_a_shared_disk_cannot_do_ends_all_of_them(run, tmp_path):
    def ends(folder, config=SFT, distributed="ddp", **options):
        return [end["end"] for end in run(folder, config, distributed=distributed, apart=True, **options)]

    best = ends(tmp_path / "best", SFT.model_copy(update={"load_best": True}), "fsdp2")
    assert best[0] == best[1]
    assert "sft.load_best reads the best checkpoint on every machine" in best[0]
    named = ends(tmp_path / "named", resume_from=tmp_path / "none")
    assert named[0] == named[1]
    assert "is not a complete checkpoint" in named[0]


def test_nan_loss_in_one_process_stops_both_and_names_the_row(run, data, tmp_path):
    rows = DatasetDict.load_from_disk(str(data / "sft"))["train"]
    row = rows[5]["input_ids"]
    sabotage = dict.fromkeys((0, 1), (poison, (1, row)))
    ends = [outcome["end"] for outcome in run(tmp_path / "nan", SFT, sabotage=sabotage)]
    assert ends[0] == ends[1]
    assert ends[0].startswith("WorkError: Training stopped in step ")
    assert "the loss is nan" in ends[0]
    # Only the rows of one process's batch are named.
    assert f"5 (id {rows[5]['id']})" in ends[0]
    assert ends[0].count("(id ") == 2


def test_full_memory_in_one_process_names_the_sizes_to_set(run, tmp_path):
    ends = [outcome["end"] for outcome in run(tmp_path / "oom", SFT, sabotage={1: (no_memory, ())})]
    assert ends[1].startswith("WorkError: Out of memory in process 1 of 2 with effective batch 8 = 2 per device × 2 ")
    assert "use effective batch 8 = 1 per device × 4 accumulated × 2 processes in the recipe's sft" in ends[1]
    assert ends[0] != "done"


@pytest.fixture(scope="module")
def command(data, child_python, tmp_path_factory):
    """A function that starts a run on the command line. The run is too long to finish during the test."""
    folder = tmp_path_factory.mktemp("command")
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"extends: {ROOT}/configs/python_reference.yaml\nname: tiny\nmodel: {{name_or_path: {data}/model}}\n"
        "formatting: {chat_template: alpaca}\n"
        "sft: {max_steps: 100000, save_steps: 10, eval_steps: 100000, logging_steps: 5, packing: false}\n"
        "compute: {device: cpu, dtype: float32, num_processes: 2}\ntracking: {comet: 'off'}\n"
    )
    env = {**os.environ, "LLM_OUTPUT_DIR": str(folder / "outputs"), "OMP_NUM_THREADS": "1"}
    arguments = ["llm_engineering.training", "sft", "--recipe", str(recipe), "--data", str(data / "sft"), "--output",
                 str(folder / "out")]  # fmt: skip

    def start(*launcher, more=()):
        program = [*launcher, "-m", *arguments, *more] if launcher else [*arguments, *more]
        return Forked(program[0], program[1:], env | child_python, ROOT, own_session=True)

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
    """Wait until a run has saved another checkpoint, and return its processes in rank order."""
    before = numbers(folder)
    wait_until(lambda: process.poll() is not None or numbers(folder) - before)
    assert process.poll() is None, process.stderr.read()
    children = psutil.Process(process.pid).children()
    found = {child.environ()["RANK"]: child for child in children if "RANK" in child.environ()}
    assert sorted(found) == ["0", "1"]
    return [found["0"], found["1"]]


def test_command_line_stops_all_its_processes(command):
    folder = command.folder
    process = command()
    children = trained(process, folder)
    # A terminal does the same after Ctrl-C.
    os.killpg(process.pid, signal.SIGINT)
    errors = process.communicate(timeout=TIMEOUT_S)[1]
    assert process.returncode == 130, errors
    assert "effective batch 4 = 1 per device × 2 accumulated × 2 processes" in errors
    shown = re.findall(r"sft steps: (\d+) of 100000", errors)
    assert shown, errors
    assert len(set(shown)) == len(shown)
    assert "Interrupted. A checkpoint is saved" in errors
    psutil.wait_procs(children, timeout=10)
    assert not any(child.is_running() for child in children)
    last = max(numbers(folder))

    process = command()
    children = trained(process, folder)
    children[1].kill()
    errors = process.communicate(timeout=TIMEOUT_S)[1]
    assert process.returncode == 1, errors
    assert f"resuming from {folder}/outputs/training/sft-" in errors
    assert f"checkpoint-{last}" in errors
    assert "Error: Training process 1 of 2 was ended by SIGKILL, and the other processes were stopped." in errors
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
