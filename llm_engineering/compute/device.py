"""Chooses device, precision and attention for this machine, and says why."""

from __future__ import annotations

import importlib.util
import os
from typing import NamedTuple

import torch

from llm_engineering.config import ComputeConfig
from llm_engineering.errors import RequestError


class Device(NamedTuple):
    """Where and how a model runs; `reasons` are sentences for the log."""

    name: str
    dtype: torch.dtype
    attn_implementation: str
    reasons: list[str]


def choose_device(compute: ComputeConfig) -> Device:
    """Resolve `auto` for this machine.

    Raises:
        RequestError: the recipe asks for something that this machine does not have.
    """
    reasons = []
    name: str = compute.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        why = torch.cuda.get_device_name() if name == "cuda" else "torch finds no CUDA card"
        reasons.append(f"device {name}: {why}")
    elif name == "cuda" and not torch.cuda.is_available():
        raise RequestError("compute.device is cuda, but torch finds no CUDA card here. Use --set compute.device=cpu.")

    dtype: str = compute.dtype
    if dtype == "auto":
        dtype, why = _best_dtype(name)
        reasons.append(f"dtype {dtype}: {why}")
    elif dtype == "float16" and name == "cpu":
        raise RequestError("compute.dtype float16 does not train on a CPU. Use bfloat16, float32 or auto.")
    elif dtype == "bfloat16" and name == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise RequestError("compute.dtype is bfloat16, but this CUDA card has no bf16 arithmetic. Use float16 or auto.")

    attention: str = compute.attn_implementation
    has_flash = name == "cuda" and importlib.util.find_spec("flash_attn") is not None
    if attention == "auto":
        attention = "flash_attention_2" if has_flash and dtype != "float32" else "sdpa"
        why = "flash_attn is installed" if attention != "sdpa" else "torch's own, no extra package needed"
        reasons.append(f"attention {attention}: {why}")
    elif attention == "flash_attention_2" and not has_flash:
        raise RequestError(
            "compute.attn_implementation is flash_attention_2, which needs CUDA and the package flash_attn. Use sdpa."
        )
    elif attention == "flash_attention_2" and dtype == "float32":
        raise RequestError("flash_attention_2 has no float32 kernels: use compute.dtype bfloat16, or attention sdpa.")
    return Device(name, getattr(torch, dtype), attention, reasons)


def check_training(stage: str, method: str, optim: str, device: Device) -> None:
    """Raise a RequestError if this machine cannot train the stage (`sft` or `dpo`) with this method and optimiser."""
    for key, value in (("sft.method", method), (f"{stage}.optim", optim)):
        if value in ("qlora", "adamw_8bit") and (device.name != "cuda" or not _has_bitsandbytes()):
            instead = "sft.method lora" if value == "qlora" else f"{stage}.optim auto"
            raise RequestError(
                f"{key} is {value}, which needs CUDA and the package bitsandbytes (pip install 'llm-engineering[gpu]'). "
                f"Use {instead}, or a machine that has both."
            )


def check_processes(compute: ComputeConfig, device: Device) -> None:
    """Raise a RequestError if this machine cannot run the recipe's processes."""
    if compute.distributed != "ddp" and device.name != "cuda":
        raise RequestError(
            f"compute.distributed is {compute.distributed}, which needs CUDA, and torch finds no CUDA card here. "
            "Use --set compute.distributed=ddp."
        )
    if compute.distributed == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        raise RequestError(
            "compute.distributed is deepspeed, and the package deepspeed is not installed. Install it "
            "(pip install deepspeed), or use --set compute.distributed=fsdp2, which comes with torch."
        )
    # Over several machines each starts its share, and says how many that are.
    here = int(os.environ.get("LOCAL_WORLD_SIZE", compute.num_processes))
    if device.name == "cuda" and here > torch.cuda.device_count():
        raise RequestError(
            f"compute.num_processes is {here}, and this machine has {torch.cuda.device_count()} CUDA card(s): each "
            f"process needs its own. Use --set compute.num_processes={torch.cuda.device_count()}."
        )


def choose_optimiser(optim: str, device: Device, distributed: str = "ddp") -> tuple[str, str]:
    """The optimiser's name as transformers knows it, and why it is the one.

    8-bit AdamW (Dettmers et al. 2021, arXiv:2110.02861) keeps its state in a quarter of the memory; it is not sharded.
    """
    if optim == "auto" and distributed != "ddp":
        return "adamw_torch", "torch's own, whose state can be sharded"
    if optim == "adamw_8bit" or (optim == "auto" and device.name == "cuda" and _has_bitsandbytes()):
        return "adamw_8bit", "bitsandbytes is installed, and its state takes a quarter of the memory"
    if device.name == "cuda":
        return "adamw_torch_fused", "torch's own, as one kernel"
    return "adamw_torch", "torch's own"


def _has_bitsandbytes() -> bool:
    return importlib.util.find_spec("bitsandbytes") is not None


def _best_dtype(device: str) -> tuple[str, str]:
    if device == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bfloat16", "the card has bf16 arithmetic, and bf16 needs no loss scaling"
        return "float16", "the card has no bf16 arithmetic"
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return "bfloat16", "this CPU has bf16 instructions"
    return "float32", "this CPU has no bf16 instructions, emulating them is two to three times slower"
