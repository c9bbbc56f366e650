"""Compares the estimate of memory and time with real training: python -m benchmarks.estimate [--write]

Each case trains a model with random weights for three steps, in two separate processes. The first returns freed memory
to the system at once. Its peak minus the memory before the model was built is compared with the parts of the estimate.
The second is an ordinary process. Its whole peak is compared with the whole estimate, and the time of its fastest step
with the time that follows from its operations and the measured matmul rate.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from datasets import Dataset, DatasetDict, disable_progress_bars
from peft import get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, PrinterCallback, ProgressCallback, TrainerCallback, set_seed

from benchmarks.machine import machine
from llm_engineering.models.device import choose_device
from llm_engineering.models.fit import lora_config
from llm_engineering.models.revision import pin_revision
from llm_engineering.models.tokenizer import load_tokenizer
from llm_engineering.recipe.compute_blocks import ComputeConfig
from llm_engineering.recipe.model_blocks import LoraConfig, Method, ModelConfig
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.stage_blocks import DPOConfig, SFTConfig
from llm_engineering.recipe.training_blocks import TrackingConfig, TrainingSetup
from llm_engineering.training import estimate
from llm_engineering.training.dpo import dpo_trainer
from llm_engineering.training.sft import sft_trainer
from llm_engineering.training.telemetry.work import peak_resident_bytes
from llm_engineering.training.training_run import TrainingRun

# glibc, malloc.h
_M_MMAP_THRESHOLD = -3
RESULTS = Path(__file__).with_suffix(".json")
STEPS = 3


class Case(NamedTuple):
    """A Llama of `layers` layers, and its training with batches of `rows × length` tokens."""

    name: str
    stage: str = "sft"
    method: Method = "lora"
    hidden: int = 512
    layers: int = 8
    vocabulary: int = 16384
    rows: int = 4
    length: int = 256
    gradient_checkpointing: bool = False
    attention: str = "sdpa"
    dtype: str = "float32"
    accumulation: int = 1


CASES = (
    Case("adapter"),
    Case("adapter, checkpointed", gradient_checkpointing=True),
    Case("adapter, eager attention", attention="eager", length=512, rows=2),
    Case("adapter, long rows", rows=1, length=1024),
    Case("adapter, bfloat16", dtype="bfloat16"),
    Case("full", method="full"),
    Case("full, two batches a step", method="full", accumulation=2, vocabulary=32768),
    Case("full, bfloat16", method="full", dtype="bfloat16"),
    Case("pairs, adapter", stage="dpo", rows=2),
    Case("pairs, adapter, large vocabulary", stage="dpo", rows=1, vocabulary=65536),
    Case("pairs, full", stage="dpo", method="full", rows=1),
)

# For the tests: each case takes seconds.
SMALL = (
    Case("small adapter", layers=4, vocabulary=8192, rows=2),
    Case("small adapter, checkpointed", layers=4, vocabulary=8192, rows=2, gradient_checkpointing=True),
    Case("small full", layers=4, method="full", vocabulary=8192, rows=2),
    Case("small pairs", layers=4, stage="dpo", rows=1),
)


def measure(cases: Sequence[Case], *, whole: bool = True) -> list[dict[str, Any]]:
    """Train each case in forked processes, and compare.

    Args:
        whole: also train in an ordinary process, and compare the whole peak and the time.
    """
    results = []
    for case in cases:
        parts = _measured(case, gives_back=True)
        estimated = parts["estimated_mib"] - parts["overhead_mib"]
        used = parts["peak_mib"] - parts["before_mib"]
        result = {"case": case.name, "used_mib": used, "parts_mib": estimated, "parts_by_used": estimated / used}
        if whole:
            ordinary = _measured(case, gives_back=False)
            names = ("before_mib", "peak_mib", "estimated_mib", "share_of_matmul_rate")
            result |= {name: ordinary[name] for name in names}
            result |= {"estimated_by_peak": ordinary["estimated_mib"] / ordinary["peak_mib"]}
        results.append({name: round(v, 2) if isinstance(v, float) else v for name, v in result.items()})
    return results


def _measured(case: Case, *, gives_back: bool) -> dict[str, Any]:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_train, args=(case, gives_back, sender))
    process.start()
    sender.close()
    try:
        measured: dict[str, Any] = receiver.recv()
    except EOFError:
        raise SystemExit(f"The case `{case.name}` ended without a result.") from None
    finally:
        process.join()
    return measured


def model_config(case: Case) -> LlamaConfig:
    """The config of the case's model."""
    heads = case.hidden // 64
    return LlamaConfig(
        vocab_size=case.vocabulary,
        hidden_size=case.hidden,
        intermediate_size=case.hidden * 8 // 3 // 64 * 64,
        num_hidden_layers=case.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        tie_word_embeddings=True,
    )


def train_config(case: Case) -> SFTConfig | DPOConfig:
    """The case's block of a recipe."""
    common: dict[str, Any] = {
        "learning_rate": 1e-5, "num_train_epochs": 1, "max_steps": STEPS, "per_device_train_batch_size": case.rows,
        "gradient_accumulation_steps": case.accumulation, "gradient_checkpointing": case.gradient_checkpointing,
        "eval_steps": 1000, "save_steps": 1000,
    }  # fmt: skip
    if case.stage == "dpo":
        return DPOConfig(**common)
    return SFTConfig(**common, method=case.method, packing=False)


def _train(case: Case, gives_back: bool, sender: Any) -> None:
    if gives_back:
        # glibc returns a block above this size to the system when it is freed.
        ctypes.CDLL("libc.so.6").mallopt(_M_MMAP_THRESHOLD, 128 * 1024)
    compute = ComputeConfig(device="cpu", dtype=case.dtype, attn_implementation=case.attention)
    device = choose_device(compute)
    config = train_config(case)
    model_shape = model_config(case)
    batch = estimate.batch_shape(config, case.length)
    shapes = estimate.shapes(model_shape, case.method, LoraConfig(), device, *batch)
    memory = estimate.peak_memory(shapes, config, device, case.method, *batch)
    rate = estimate.matmul_rate(device)

    set_seed(0)
    model = pin_revision(ModelConfig())
    setup = TrainingSetup(
        model=model, method=case.method, max_length=case.length, compute=compute, tracking=TrackingConfig(), seed=0
    )
    tokenizer = load_tokenizer(model, Settings())
    data = _data(case)
    before = psutil.Process().memory_info().rss
    policy = AutoModelForCausalLM.from_config(
        model_shape, dtype=torch.float32 if case.method == "full" else device.dtype, attn_implementation=case.attention
    )
    if case.method != "full":
        policy = get_peft_model(policy, lora_config(LoraConfig()))
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(llm_output_dir=Path(folder))
        trainer: Any
        if isinstance(config, DPOConfig):
            trainer = dpo_trainer(TrainingRun("dpo", data, config, setup, settings, device, tokenizer), policy, config)
        else:
            run = TrainingRun("sft", data, config, setup, settings, device, tokenizer)
            trainer = sft_trainer(run, policy, config)
        for printer in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(printer)
        trainer.args.save_strategy = "no"
        trainer.args.eval_strategy = "no"
        trainer.rows = data["train"]
        trainer.add_callback(clock)
        trainer.train()
    peak = peak_resident_bytes()
    tokens = batch[0] * batch[1] * case.accumulation
    reached = tokens * estimate.flops_per_token(shapes, config, case.method, case.length) / min(clock.seconds)
    sender.send(
        {
            "before_mib": round(before / 2**20),
            "peak_mib": round(peak / 2**20),
            "estimated_mib": round(memory.total / 2**20),
            "overhead_mib": round(memory.overhead / 2**20),
            "share_of_matmul_rate": reached / rate,
        }
    )


class _Clock(TrainerCallback):
    """Records the seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.started = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.started)


def _data(case: Case) -> DatasetDict:
    """Rows that fill each batch. The prompt of an SFT row is a quarter of it; that of a pair is one token, because DPO computes it once."""
    ids = [2 + i % 250 for i in range(case.length)]
    cut = case.length // 4 if case.stage == "sft" else 1
    row = (
        {"input_ids": ids, "labels": [-100] * cut + ids[cut:]}
        if case.stage == "sft"
        else {"prompt_ids": ids[:cut], "chosen_ids": ids[cut:], "rejected_ids": ids[cut:][::-1]}
    )
    rows = Dataset.from_list([row] * case.rows * case.accumulation * STEPS)
    return DatasetDict(train=rows, validation=rows.select([0]))


def main() -> None:
    """Measure and print the figures; `--write` also writes them to a file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.estimate")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    parser.add_argument("--small", action="store_true", help="only the cases of the tests")
    arguments = parser.parse_args()
    disable_progress_bars()
    results = measure(SMALL, whole=False) if arguments.small else measure(CASES)
    for line in results:
        print(json.dumps(line))
    if arguments.write:
        figures = {
            "machine": machine(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "cases": results,
        }
        RESULTS.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
