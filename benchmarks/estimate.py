"""How near the estimate of memory and time comes: python -m benchmarks.estimate [--write]

Each case is a model with random weights that is really trained for three steps, in processes of its own. One gives freed
memory back at once: its peak, less what was resident before the model, is compared with the parts of the estimate.
Another is as any run is: its whole peak is compared with the whole estimate, and the time of its fastest step with what
its floating-point operations and a matrix product on the same machine say.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from datasets import Dataset, DatasetDict, disable_progress_bars
from llm_engineering.models.device import choose_device
from llm_engineering.models.loading import pin_revision
from llm_engineering.models.tokenizer import load_tokenizer
from llm_engineering.recipe.compute_blocks import ComputeConfig
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.training_blocks import DPOConfig, ModelConfig, SFTConfig, TrackingConfig, TrainingSetup
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, PrinterCallback, ProgressCallback, TrainerCallback, set_seed

from benchmarks.machine import machine
from llm_engineering.training import estimate
from llm_engineering.training.dpo import dpo_trainer
from llm_engineering.training.policy import lora_config
from llm_engineering.training.sft import sft_trainer

# glibc, malloc.h
_M_MMAP_THRESHOLD = -3
RESULTS = Path(__file__).with_suffix(".json")
STEPS = 3


class Case(NamedTuple):
    """A model of `layers` Llama layers, and how it is trained: `rows` of `length` tokens a batch."""

    name: str
    stage: str = "sft"
    method: str = "lora"
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

# Seconds each: for the tests.
SMALL = (
    Case("small adapter", layers=4, vocabulary=8192, rows=2),
    Case("small adapter, checkpointed", layers=4, vocabulary=8192, rows=2, gradient_checkpointing=True),
    Case("small full", layers=4, method="full", vocabulary=8192, rows=2),
    Case("small pairs", layers=4, stage="dpo", rows=1),
)


def measure(cases: Sequence[Case], *, whole: bool = True) -> list[dict[str, Any]]:
    """Train each case in processes that are forked from this one, and compare.

    Args:
        whole: also in a process that keeps freed memory as any does; without it there is no time either.
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
    """The case's model."""
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
    """The case's part of a recipe."""
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
        # What glibc takes from the system for larger blocks goes back when they are freed.
        ctypes.CDLL("libc.so.6").mallopt(_M_MMAP_THRESHOLD, 128 * 1024)
    compute = ComputeConfig(device="cpu", dtype=case.dtype, attn_implementation=case.attention)
    device = choose_device(compute)
    config = train_config(case)
    own = model_config(case)
    sft = config if isinstance(config, SFTConfig) else SFTConfig.model_validate(
        config.model_dump(include=set(SFTConfig.model_fields)) | {"method": case.method}
    )  # fmt: skip
    batch = estimate.batch_shape(config, case.length)
    shapes = estimate.shapes(own, sft, device, *batch)
    memory = estimate.peak_memory(shapes, config, device, sft.method, *batch)
    rate = estimate.matmul_rate(device)

    set_seed(0)
    model = pin_revision(ModelConfig())
    setup = TrainingSetup(
        model=model, method=sft.method, max_length=case.length, compute=compute, tracking=TrackingConfig(), seed=0
    )
    tokenizer = load_tokenizer(model, Settings())
    data = _data(case)
    before = psutil.Process().memory_info().rss
    policy = AutoModelForCausalLM.from_config(
        own, dtype=torch.float32 if case.method == "full" else device.dtype, attn_implementation=case.attention
    )
    if case.method != "full":
        policy = get_peft_model(policy, lora_config(sft.lora))
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(config, DPOConfig):
            reference = None if isinstance(policy, PeftModel) else copy.deepcopy(policy).requires_grad_(False)
            trainer: Any = dpo_trainer(
                policy, tokenizer, data, config, setup, device, Path(folder), reference=reference
            )
        else:
            trainer = sft_trainer(policy, tokenizer, data, config, setup, device, Path(folder))
        for printer in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(printer)
        trainer.args.save_strategy = "no"
        trainer.args.eval_strategy = "no"
        trainer.rows = data["train"]
        trainer.add_callback(clock)
        trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    tokens = batch[0] * batch[1] * case.accumulation
    reached = tokens * estimate.flops_per_token(shapes, config, sft.method, case.length) / min(clock.seconds)
    sender.send(
        {
            "before_mib": round(before / 2**20),
            "peak_mib": round(peak),
            "estimated_mib": round(memory.total / 2**20),
            "overhead_mib": round(memory.overhead / 2**20),
            "share_of_matmul_rate": reached / rate,
        }
    )


class _Clock(TrainerCallback):
    """Seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.started = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.started)


def _data(case: Case) -> DatasetDict:
    """Rows that fill the batch; of pairs, the prompt is a quarter of each row."""
    ids = [2 + i % 250 for i in range(case.length)]
    cut = case.length // 4
    row = (
        {"input_ids": ids, "labels": [-100] * cut + ids[cut:]}
        if case.stage == "sft"
        else {"prompt_ids": ids[:cut], "chosen_ids": ids[cut:], "rejected_ids": ids[cut:][::-1]}
    )
    rows = Dataset.from_list([row] * case.rows * case.accumulation * STEPS)
    return DatasetDict(train=rows, validation=rows.select([0]))


def main() -> None:
    """Measure, print, and with `--write` keep the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.estimate")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    parser.add_argument("--small", action="store_true", help="the cases of the tests")
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
