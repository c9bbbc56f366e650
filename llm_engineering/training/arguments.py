"""Makes transformers' TrainingArguments from the recipe, the device and the number of processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch

from llm_engineering.errors import WorkError
from llm_engineering.models.device import Device, choose_optimiser
from llm_engineering.recipe.compute_blocks import ComputeConfig
from llm_engineering.recipe.training_blocks import TrainConfig, TrainingSetup
from llm_engineering.training.processes.sharding import distributed_arguments, loads_shards

Config = TypeVar("Config", bound=TrainConfig)

# Keys of a stage's block that are arguments of transformers by the same name.
_TAKEN_OVER = {
    "learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "per_device_eval_batch_size",
    "gradient_accumulation_steps", "lr_scheduler_type", "weight_decay", "max_grad_norm", "logging_steps",
    "eval_strategy", "eval_steps", "save_strategy", "save_total_limit",
}  # fmt: skip


def effective_batch(config: TrainConfig, compute: ComputeConfig) -> int:
    """Number of rows, or of packed rows, in one step of all processes."""
    return config.per_device_train_batch_size * config.gradient_accumulation_steps * compute.num_processes


def sizes_text(config: TrainConfig, compute: ComputeConfig) -> str:
    """The effective batch and its factors, e.g. `effective batch 8 = 2 per device × 4 accumulated`."""
    factors = f"{config.per_device_train_batch_size} per device × {config.gradient_accumulation_steps} accumulated"
    shared = f" × {compute.num_processes} processes" if compute.num_processes > 1 else ""
    return f"effective batch {effective_batch(config, compute)} = {factors}{shared}"


def halved(config: Config, *, training: bool) -> Config:
    """Halve the batch size of training or of evaluation. More accumulation keeps the effective batch of training.

    Raises:
        WorkError: the batch is already one row.
    """
    size = config.per_device_train_batch_size if training else config.per_device_eval_batch_size
    if size == 1:
        raise WorkError(
            f"Out of memory in {'training' if training else 'evaluation'}, with one row at a time. Lower "
            "formatting.max_length, set gradient_checkpointing, or use a smaller model."
        )
    # The largest divisor of the size that is at most half of it.
    smaller = next(n for n in range(size // 2, 0, -1) if size % n == 0)
    if not training:
        return config.model_copy(update={"per_device_eval_batch_size": smaller})
    accumulated = config.gradient_accumulation_steps * (size // smaller)
    return config.model_copy(
        update={"per_device_train_batch_size": smaller, "gradient_accumulation_steps": accumulated}
    )


def training_arguments(config: TrainConfig, device: Device, setup: TrainingSetup, folder: Path) -> dict[str, Any]:
    """The arguments of transformers.TrainingArguments that all stages share."""
    return {
        **config.model_dump(include=_TAKEN_OVER),
        **distributed_arguments(setup.compute, shards=loads_shards(config, setup)),
        "output_dir": str(folder / "checkpoints"),
        # transformers reads a value below 1 as a share of all steps.
        "warmup_steps": config.warmup_ratio,
        # unsloth has its own gradient checkpointing, which the recipe's key turned on when the model was loaded.
        "gradient_checkpointing": config.gradient_checkpointing and device.backend == "transformers",
        "optim": choose_optimiser(config.optim, device, setup.compute.distributed)[0],
        "load_best_model_at_end": config.load_best,
        "metric_for_best_model": "eval_loss",
        "logging_first_step": True,
        # With save_strategy epoch, transformers ignores save_steps, but still requires a number.
        "save_steps": config.save_steps or 1,
        # TRL's default is bf16, even on CPUs where it is slower.
        "bf16": device.dtype == torch.bfloat16,
        "fp16": device.dtype == torch.float16,
        "use_cpu": device.name == "cpu",
        "dataloader_pin_memory": device.name == "cuda",
        "seed": setup.seed,
        "report_to": "none",
        "disable_tqdm": True,
        **config.library_arguments,
    }


def device_facts(device: Device) -> dict[str, str]:
    """Device, precision, attention and backend as text."""
    return {
        "device": device.name,
        "dtype": str(device.dtype).removeprefix("torch."),
        "attn_implementation": device.attn_implementation,
        "backend": device.backend,
    }
