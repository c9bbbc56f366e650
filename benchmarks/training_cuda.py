"""Compares training on a GPU with typical scripts: python -m benchmarks.training_cuda [--write]

Each side runs in its own process, one after another, on the same rows, with the same seed and random weights:

- `plain`: benchmarks/plain_trl.py, with padded batches and TRL's other defaults;
- `ours_transformers`: `train_sft` with `compute.backend: transformers`, packed, without gradient checkpointing;
- `ours_transformers_checkpointed`: the same with gradient checkpointing, as in the scripts;
- `raw_unsloth`: benchmarks/raw_unsloth.py, packed;
- `ours_unsloth`: `train_sft` with `compute.backend: unsloth`, packed.

Each side trains for two epochs, and the second epoch is timed. Tokens do not include padding. MFU is the model's
operations for these rows, counted once for all sides, divided by the seconds and the peak of the GPU. Peak memory is the
largest allocation on the GPU. A side that cannot run is listed with the reason.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# This module must not import transformers, because some sides import unsloth first.
from benchmarks.machine import machine, show
from benchmarks.training_settings import LEARNING_RATE, LORA, SEED
from llm_engineering.errors import RequestError, WorkError

# Our sides, and the script that each one is compared with.
PEERS = {
    "ours_transformers": "plain",
    "ours_transformers_checkpointed": "plain",
    "ours_unsloth": "raw_unsloth",
}
SIDES = ("plain", "ours_transformers", "ours_transformers_checkpointed", "raw_unsloth", "ours_unsloth")
METHODS = ("lora", "qlora")
EPOCHS = 2
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "unsloth")


def main() -> int:
    """Run one side, or run all sides and print the ratios; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training_cuda", description="Training on a GPU as ratios to typical scripts."
    )
    parser.add_argument("--shape", choices=("tiny", "llama-3.1-8b"), default="llama-3.1-8b")
    parser.add_argument("--methods", nargs="+", choices=METHODS)
    parser.add_argument("--sides", nargs="+", choices=SIDES)
    parser.add_argument("--cpu", action="store_true", help="test the benchmark without a GPU, with --shape tiny")
    parser.add_argument("--folder", type=Path, help="folder that keeps the model and the rows for later runs")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}/training_cuda_METHOD.json")
    parser.add_argument("--side", choices=tuple(PEERS), help="run one side (internal)")
    arguments = parser.parse_args()
    try:
        if arguments.side is not None:
            logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
            print(json.dumps(_ours(arguments.side, arguments.folder, arguments.methods[0])))
            return 0
        _check(arguments)
        methods = arguments.methods or (METHODS[:1] if arguments.cpu else METHODS)
        sides = arguments.sides or (SIDES[:2] if arguments.cpu else SIDES)
        with tempfile.TemporaryDirectory() as scratch:
            folder = (arguments.folder or Path(scratch)).resolve()
            folder.mkdir(parents=True, exist_ok=True)
            for method in methods:
                result = measure(folder, arguments.shape, method, sides, cpu=arguments.cpu)
                show(result, RESULTS / f"training_cuda_{method}.json" if arguments.write else None)
    except (RequestError, WorkError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _check(arguments: argparse.Namespace) -> None:
    if arguments.cpu and arguments.shape != "tiny":
        raise RequestError(
            "--cpu only tests the benchmark. A real model would take minutes for each step. Use --shape tiny."
        )
    if arguments.write and arguments.shape == "tiny":
        raise RequestError(
            "The figures of --shape tiny say nothing about speed, so they are not written. Leave out --write or --shape."
        )
    if arguments.cpu:
        return
    import torch

    if not torch.cuda.is_available():
        raise RequestError(
            "This benchmark needs a CUDA card, and torch finds none here. To test it without one, use --shape tiny --cpu."
        )


def measure(folder: Path, shape: str, method: str, sides: Sequence[str], *, cpu: bool = False) -> dict[str, Any]:
    """Run some sides with one method, `lora` or `qlora`, and compare them.

    Args:
        folder: has the model and the rows; they are made if they do not exist.

    Raises:
        RequestError: the folder's disk has no space for the model.
    """
    from benchmarks.random_llama import prepare

    made = prepare(shape, folder)
    own = ["-m", "benchmarks.training_cuda", "--folder", str(folder), "--methods", method]
    environment = _environment(folder, cpu)
    results = {}
    for side in sides:
        output = folder / f"{method}-{side}"
        # Otherwise a run that was killed before would be resumed.
        shutil.rmtree(output, ignore_errors=True)
        script = [
            "--model", made["model"], "--rows", str(folder / "rows.jsonl"), "--output", str(output),
            "--max-length", str(made["max_length"]), "--epochs", str(EPOCHS),
            *(["--four-bits"] if method == "qlora" else []),
        ]  # fmt: skip
        commands = {
            "plain": ["-m", "benchmarks.plain_trl", "sft", *script],
            "raw_unsloth": ["-m", "benchmarks.raw_unsloth", *script, "--batch", str(made["packed_rows"])],
        }
        command = commands.get(side, [*own, "--side", side])
        figures, reason = _run(command, folder / f"{method}-{side}.log", environment)
        results[side] = {"did_not_run": reason} if reason is not None else figures
    card = _card(cpu)
    for figures in results.values():
        if "last_epoch_seconds" in figures:
            figures["tokens_per_second"] = made["tokens"] / figures["last_epoch_seconds"]
            if card["peak_flops"] is not None:
                figures["mfu"] = made["flops"] / figures["last_epoch_seconds"] / card["peak_flops"]
    return {
        "method": method,
        **ratios(results),
        "rows": {name: value for name, value in made.items() if name != "model"},
        "sides": results,
        "card": card,
        "machine": machine(),
        "versions": _versions(),
    }


def ratios(sides: dict[str, dict[str, Any]]) -> dict[str, float | None]:
    """Speed and memory of each of our sides over its peer, and its MFU; None if one of the two did not run."""
    result: dict[str, float | None] = {}
    for side, peer in PEERS.items():
        for figure in ("tokens_per_second", "peak_memory_bytes"):
            own, other = (sides.get(name, {}).get(figure) for name in (side, peer))
            result[f"{side}_{figure}_over_{peer}"] = own / other if own and other else None
        result[f"{side}_mfu"] = sides.get(side, {}).get("mfu")
    return result


def _environment(folder: Path, cpu: bool) -> dict[str, str]:
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "UNSLOTH_COMPILE_LOCATION": str(folder / "unsloth"),
        "UNSLOTH_DISABLE_STATISTICS": "1",
        # The trainers would use all GPUs.
        "CUDA_VISIBLE_DEVICES": "" if cpu else os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0],
    }


def _run(command: list[str], log: Path, environment: dict[str, str]) -> tuple[dict[str, Any], str | None]:
    """Run a side with its errors in the log.

    Returns:
        Its figures, and None; or no figures, and the reason why it failed.
    """
    print("running", *command[1:], file=sys.stderr, flush=True)
    with log.open("w", encoding="utf-8") as errors:
        done = subprocess.run(
            [sys.executable, *command], stdout=subprocess.PIPE, stderr=errors, text=True, check=False, env=environment
        )
    figures: dict[str, Any] = {}
    reason = None
    if done.returncode == 0:
        # Libraries may print more lines after the figures.
        figures = json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))
    else:
        reason = _reason(done.returncode, log.read_text(encoding="utf-8", errors="replace"))
    print(reason or figures, file=sys.stderr, flush=True)
    return figures, reason


def _reason(code: int, log: str) -> str:
    """The last error in a process's log, or how the process ended."""
    if code < 0:
        return f"ended by {signal.Signals(-code).name}; if nobody killed it, the machine's memory was probably full"
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return (errors or lines or [f"exit code {code} and no output"])[-1]


def _ours(side: str, folder: Path, method: str) -> dict[str, Any]:
    from llm_engineering.models.device import choose_backend, choose_device, import_backend
    from llm_engineering.recipe.compute_blocks import ComputeConfig
    from llm_engineering.recipe.model_blocks import LoraConfig, ModelConfig
    from llm_engineering.recipe.settings import Settings
    from llm_engineering.recipe.stage_blocks import SFTConfig
    from llm_engineering.recipe.training_blocks import TrackingConfig, TrainingSetup

    compute = ComputeConfig.model_validate({"backend": side.split("_")[1]})
    checkpointing = side != "ours_transformers"
    import_backend(choose_backend(choose_device(compute), compute, method), folder)  # type: ignore[arg-type]

    from datasets import Dataset, DatasetDict
    from transformers import trainer

    from benchmarks.last_epoch import LastEpoch
    from benchmarks.random_llama import FACTS
    from llm_engineering.models.revision import pin_revision
    from tests.tiny_models import train

    made = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    setup = TrainingSetup(
        model=pin_revision(ModelConfig(name_or_path=made["model"])),
        method=method,
        max_length=made["max_length"],
        compute=compute,
        tracking=TrackingConfig(comet="off"),
        seed=SEED,
    )
    # As many tokens in a step as the plain script. Without checkpointing, one packed row at a time.
    batch = made["packed_rows"] if checkpointing else 1
    config = SFTConfig(
        method=method,
        lora=LoraConfig(**LORA),
        learning_rate=LEARNING_RATE["sft"],
        num_train_epochs=EPOCHS,
        # The defaults of transformers, as in the scripts.
        lr_scheduler_type="linear",
        warmup_ratio=0.0,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=made["packed_rows"] // batch,
        gradient_checkpointing=checkpointing,
        eval_steps=10_000,
        save_steps=10_000,
    )
    rows = Dataset.load_from_disk(folder / "formatted")
    splits = DatasetDict(train=rows, validation=rows.select(range(1)))
    clock = LastEpoch()
    # train_sft makes its own trainer, which takes no callbacks from outside.
    callbacks: list[Any] = trainer.DEFAULT_CALLBACKS
    callbacks.append(clock)
    summary = train(splits, config, setup, Settings(llm_output_dir=folder / f"{method}-{side}")).summary
    names = ("steps", "per_device_train_batch_size", "peak_memory_bytes", "device", "device_reasons")
    telemetry = {name: summary[name] for name in ("tokens_per_second", "mfu", "padding_share") if name in summary}
    return {
        "seconds": summary["seconds"]["total"],
        **clock.figures(),
        **{name: summary[name] for name in names},
        # Over both epochs, as in the report of each run.
        "telemetry": telemetry,
    }


def _card(cpu: bool) -> dict[str, Any]:
    import torch

    from llm_engineering.training.telemetry.flops import peak_flops

    if cpu:
        return {"name": None, "peak_flops": None}
    device = torch.device("cuda")
    facts = torch.cuda.get_device_properties(device)
    return {
        "name": facts.name,
        "memory_gib": round(facts.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "peak_flops": peak_flops(device, torch.bfloat16),
    }


def _versions() -> dict[str, str | None]:
    """Versions of the packages; None for those that are not installed."""
    installed = {str(package.name).lower(): package.version for package in importlib.metadata.distributions()}
    return {name: installed.get(name) for name in PACKAGES}


if __name__ == "__main__":
    sys.exit(main())
