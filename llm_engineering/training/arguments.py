"""Makes transformers' TrainingArguments from the recipe, the device and the number of processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import enable_fsdp_ram_efficient_loading  # type: ignore[import-untyped]
from transformers import Trainer, TrainingArguments

from llm_engineering.errors import WorkError
from llm_engineering.models.device import Device, choose_optimiser
from llm_engineering.recipe.compute_blocks import ComputeConfig
from llm_engineering.recipe.training_blocks import DPOConfig, TrainConfig, TrainingSetup

Config = TypeVar("Config", bound=TrainConfig)


def loads_shards(config: TrainConfig, setup: TrainingSetup) -> bool:
    """Whether no card ever holds the whole model: its weights are sharded, and so are those of DPO's reference.

    TRL takes whole weights for the reference of a full fine-tune, and for log-probabilities that are precomputed. Every
    process then loads the model, as with `ddp`.
    """
    whole_reference = isinstance(config, DPOConfig) and (
        config.precompute_ref_log_probs or (config.method or setup.method) == "full"
    )
    return setup.compute.shards_weights and not whole_reference


def distributed_arguments(compute: ComputeConfig, *, shards: bool = False) -> dict[str, Any]:
    """The part of transformers.TrainingArguments for several processes; empty for one.

    Args:
        shards: whether FSDP2 sends the shards from the main process (`loads_shards`).
    """
    if compute.num_processes == 1:
        return {}
    if compute.distributed == "fsdp2":
        fsdp = {"version": 2, "state_dict_type": "FULL_STATE_DICT", "cpu_ram_efficient_loading": shards}
        return {"fsdp": True, "fsdp_config": fsdp}
    if compute.distributed == "deepspeed":
        zero: dict[str, Any] = {"stage": compute.zero_stage}
        if compute.zero_stage == 3:
            zero["stage3_gather_16bit_weights_on_model_save"] = True
        sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        precision = {name: {"enabled": "auto"} for name in ("bf16", "fp16")}
        automatic = dict.fromkeys((*sizes, "gradient_clipping"), "auto")
        return {"deepspeed": {"zero_optimization": zero, **automatic, **precision}}
    # Every step uses every trained weight. To search for unused weights, torch would walk over the graph in each step.
    return {"ddp_find_unused_parameters": False}


@contextmanager
def sharded_loading(config: TrainConfig, setup: TrainingSetup, device: Device) -> Iterator[None]:
    """While this is open, `load_model` loads a model that no card holds whole, if `loads_shards`.

    FSDP2: the main process reads the weights into its memory, and the trainer sends each process its shard. ZeRO-3: each
    layer is sharded over the cards as it is read. transformers learns this from its arguments, which must be alive.
    """
    if not loads_shards(config, setup):
        yield
        return
    if setup.compute.distributed == "fsdp2":
        enable_fsdp_ram_efficient_loading()
    arguments = TrainingArguments(
        **distributed_arguments(setup.compute, shards=True),
        per_device_train_batch_size=config.per_device_train_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        max_grad_norm=config.max_grad_norm,
        bf16=device.dtype == torch.bfloat16,
        fp16=device.dtype == torch.float16,
        use_cpu=device.name == "cpu",
        report_to="none",
    )
    yield
    # ZeRO-3 ends with the arguments, so the model can be loaded whole again.
    del arguments


def whole_weights(trainer: Trainer, compute: ComputeConfig) -> dict[str, torch.Tensor] | None:
    """Gather the weights to save if each process holds a shard of them, else None. All processes must call it."""
    if compute.distributed == "ddp":
        return None
    weights: dict[str, torch.Tensor] = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return weights


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
        **distributed_arguments(setup.compute, shards=loads_shards(config, setup)),
        "output_dir": str(folder / "checkpoints"),
        "learning_rate": config.learning_rate,
        "num_train_epochs": config.num_train_epochs,
        "max_steps": config.max_steps,
        "per_device_train_batch_size": config.per_device_train_batch_size,
        "per_device_eval_batch_size": config.per_device_eval_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "lr_scheduler_type": config.lr_scheduler_type,
        # transformers reads a value below 1 as a share of all steps.
        "warmup_steps": config.warmup_ratio,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        # unsloth has its own gradient checkpointing, which the recipe's key turned on when the model was loaded.
        "gradient_checkpointing": config.gradient_checkpointing and device.backend == "transformers",
        "optim": choose_optimiser(config.optim, device, setup.compute.distributed)[0],
        "load_best_model_at_end": config.load_best,
        "metric_for_best_model": "eval_loss",
        "logging_steps": config.logging_steps,
        "logging_first_step": True,
        "eval_strategy": config.eval_strategy,
        "eval_steps": config.eval_steps,
        "save_strategy": config.save_strategy,
        # With save_strategy epoch, transformers ignores save_steps, but still requires a number.
        "save_steps": config.save_steps or 1,
        "save_total_limit": config.save_total_limit,
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
