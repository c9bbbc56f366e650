"""Weights that are sharded over the processes of a run: the arguments for it, loading, and gathering them to save."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import enable_fsdp_ram_efficient_loading  # type: ignore[import-untyped]
from transformers import Trainer, TrainingArguments

from llm_engineering.models.device import Device
from llm_engineering.recipe.compute_blocks import ComputeConfig
from llm_engineering.recipe.training_blocks import TrainConfig, TrainingSetup


def loads_shards(config: TrainConfig, setup: TrainingSetup) -> bool:
    """Whether no card ever holds the whole model: its weights are sharded, and so are those of a reference.

    If the stage needs whole weights, every process loads the model, as with `ddp`.
    """
    return setup.compute.shards_weights and not config.needs_whole_weights(config.method or setup.method)


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
