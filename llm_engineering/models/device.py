"""Chooses the device, precision, attention and backend for this machine, each with its reason."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from llm_engineering.errors import RequestError
from llm_engineering.recipe.compute_blocks import ComputeConfig
from llm_engineering.recipe.model_blocks import Method, beyond_unsloth

Backend = Literal["transformers", "unsloth"]
# Packages that some values of `optim` need and that are not installed with the project. A key is how such values begin.
_OPTIMISER_PACKAGES = {
    "galore": "galore-torch", "lomo": "lomo-optim", "adalomo": "lomo-optim", "grokadamw": "grokadamw",
    "schedule_free": "schedulefree", "apollo": "apollo-torch", "stable_adamw": "torch-optimi",
    "adamw_torch_4bit": "torchao", "adamw_torch_8bit": "torchao", "adamw_torch_xla": "torch-xla",
    "adamw_torch_npu": "torch-npu", "adamw_anyprecision": "torchdistx",
}  # fmt: skip


class Device(NamedTuple):
    """Where and how a model runs.

    Attributes:
        name: the torch device, `cpu` or `cuda`.
        reasons: one line for each choice, for the log and the training report.
        backend: the library that loads the model for training. Evaluation and generation always use transformers.
    """

    name: str
    dtype: torch.dtype
    attn_implementation: str
    reasons: list[str]
    backend: Backend = "transformers"

    def autocast(self) -> torch.autocast:
        """Autocast as in training. A full fine-tune has float32 weights, for which flash attention has no kernels."""
        return torch.autocast(self.name, self.dtype, enabled=self.dtype != torch.float32)


def choose_device(compute: ComputeConfig) -> Device:
    """Resolve each `auto` of the recipe for this machine.

    Raises:
        RequestError: this machine lacks a device, precision or attention that the recipe asks for.
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
        raise RequestError("compute.dtype is bfloat16, but this CUDA card cannot compute in bf16. Use float16 or auto.")

    attention: str = compute.attn_implementation
    has_flash = name == "cuda" and _is_installed("flash_attn")
    if attention == "auto":
        attention = "flash_attention_2" if has_flash and dtype != "float32" else "sdpa"
        why = "flash_attn is installed" if attention != "sdpa" else "part of torch, needs no other package"
        reasons.append(f"attention {attention}: {why}")
    elif attention == "flash_attention_2" and not has_flash:
        raise RequestError(
            "compute.attn_implementation is flash_attention_2, which needs CUDA and the package flash_attn. Use sdpa."
        )
    elif attention == "flash_attention_2" and dtype == "float32":
        raise RequestError("flash_attention_2 has no float32 kernels: use compute.dtype bfloat16, or attention sdpa.")
    return Device(name, getattr(torch, dtype), attention, reasons)


def check_training(stage: str, method: str, optim: str, device: Device) -> None:
    """Check the method and the optimiser of a stage, `sft` or `dpo`.

    Raises:
        RequestError: this machine lacks CUDA or bitsandbytes, and one of the two needs them.
    """
    for key, value in (("sft.method", method), (f"{stage}.optim", optim)):
        if (value == "qlora" or _is_of_bitsandbytes(value)) and (device.name != "cuda" or not _has_bitsandbytes()):
            instead = "sft.method lora" if value == "qlora" else f"{stage}.optim auto"
            raise RequestError(
                f"{key} is {value}, which needs CUDA and the package bitsandbytes (pip install 'llm-engineering[gpu]'). "
                f"Use {instead}, or a machine that has both."
            )

    package = next((name for start, name in _OPTIMISER_PACKAGES.items() if optim.startswith(start)), None)
    if package is not None and not _has_package(package):
        raise RequestError(
            f"{stage}.optim is {optim}, which needs the package {package}. Install it with `.venv/bin/pip install {package}`, "
            f"or use {stage}.optim auto."
        )


def check_vllm(key: str, instead: str, device: Device) -> None:
    """Check that this process can generate with vLLM, as a key of the recipe says.

    Args:
        instead: the value of the key with which transformers generates.

    Raises:
        RequestError: CUDA or the package vllm is missing.
    """
    installed = _is_installed("vllm")
    if device.name != "cuda" or not installed:
        why = "torch finds no CUDA card here" if installed else "the package vllm is not installed"
        raise RequestError(
            f"{key} needs CUDA and the package vllm, and {why}. Use --set {key}={instead}, which generates with transformers."
        )


def check_processes(compute: ComputeConfig, device: Device) -> None:
    """Check that this machine can run the training processes of the recipe.

    Raises:
        RequestError: CUDA or the package deepspeed is missing, or there are fewer cards than processes.
    """
    if compute.distributed != "ddp" and device.name != "cuda":
        raise RequestError(
            f"compute.distributed is {compute.distributed}, which needs CUDA, and torch finds no CUDA card here. "
            "Use --set compute.distributed=ddp."
        )
    if compute.distributed == "deepspeed" and not _is_installed("deepspeed"):
        raise RequestError(
            "compute.distributed is deepspeed, and the package deepspeed is not installed. Install it (pip install -c "
            "requirements.lock -e '.[deepspeed]'; for SageMaker make image ARGS=--deepspeed), or use --set "
            "compute.distributed=fsdp2, which comes with torch."
        )
    # With several machines, torchrun sets how many of the processes run on this one.
    processes, cards = int(os.environ.get("LOCAL_WORLD_SIZE", compute.num_processes)), torch.cuda.device_count()
    if device.name == "cuda" and processes > cards:
        raise RequestError(
            f"compute.num_processes is {processes}, and this machine has {cards} CUDA card(s): each process needs its "
            f"own card. Use --set compute.num_processes={cards}."
        )


def choose_backend(
    device: Device,
    compute: ComputeConfig,
    method: Method,
    *,
    adapter_keys: Sequence[str] = (),
    new_tokens: Sequence[str] = (),
) -> Device:
    """Add the backend and its reason to the device. Does not import unsloth.

    Args:
        adapter_keys: keys of the adapter that unsloth does not have.
        new_tokens: the tokens that are added to the model.

    Raises:
        RequestError: the recipe asks for unsloth, and this machine or another key of the recipe rules it out.
    """
    if compute.backend == "transformers":
        return device
    problem = _unsloth_problem(compute, device, method, adapter_keys, new_tokens)
    if problem and compute.backend == "unsloth":
        raise RequestError(
            f"compute.backend is unsloth, but {problem}. Change that, or use --set compute.backend=transformers."
        )
    if problem:
        return device._replace(
            reasons=[*device.reasons, f"backend transformers: unsloth is not used, because {problem}"]
        )
    why = "backend unsloth: it is installed, and its kernels train adapters faster and in less memory"
    return device._replace(backend="unsloth", reasons=[*device.reasons, why])


def keys_beyond_unsloth(trained: Path) -> list[str]:
    """The keys of a trained adapter that unsloth does not have; none for a full model."""
    config = trained / "adapter_config.json"
    return beyond_unsloth(json.loads(config.read_text(encoding="utf-8"))) if config.is_file() else []


def import_backend(device: Device, cache_dir: Path) -> None:
    """Import unsloth if it is the backend. It patches transformers, PEFT and TRL, so it must be imported before them.

    Args:
        cache_dir: where unsloth writes its generated trainers. Its own default is the working directory.
    """
    if device.backend != "unsloth":
        return
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(cache_dir / "unsloth"))
    # Otherwise unsloth downloads a file, so that its authors can count the downloads.
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    importlib.import_module("unsloth")


def needs_own_process(compute: ComputeConfig) -> bool:
    """Whether training may use unsloth, and so needs a new process in which transformers is not imported yet.

    Other keys of the recipe may still rule unsloth out: `choose_backend` decides in that process.
    """
    if compute.backend == "auto":
        return torch.cuda.is_available() and compute.device != "cpu" and _is_installed("unsloth")
    return compute.backend == "unsloth"


def _unsloth_problem(
    compute: ComputeConfig, device: Device, method: Method, adapter_keys: Sequence[str], new_tokens: Sequence[str]
) -> str:
    """Why unsloth cannot train this here, as the end of a sentence; empty if it can."""
    if device.name != "cuda":
        return "it needs a CUDA card" + ("" if torch.cuda.is_available() else ", and torch finds none")
    if not _is_installed("unsloth"):
        return "it is not installed (pip install 'llm-engineering[gpu]')"
    if compute.num_processes > 1:
        return "it trains in one process"
    if adapter_keys:
        return f"it has no sft.lora.{adapter_keys[0]}"
    if new_tokens:
        return f"it does not train the new token {new_tokens[0]}"
    if method == "full" and compute.backend == "auto":
        return "its kernels speed up adapters, and sft.method is full"
    if device.dtype == torch.float32:
        return "its kernels compute in 16 bits, and compute.dtype is float32"
    if compute.attn_implementation != "auto":
        return f"it chooses the attention itself, and compute.attn_implementation is {compute.attn_implementation}"
    return ""


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def choose_optimiser(optim: str, device: Device, distributed: str = "ddp") -> tuple[str, str]:
    """The optimiser's name in transformers, and the reason for it.

    8-bit AdamW (Dettmers et al. 2021, arXiv:2110.02861) keeps its state in a quarter of the memory. The state is not
    sharded, so `auto` chooses torch's AdamW where `distributed` is not ddp.
    """
    if optim not in ("auto", "adamw_torch", "adamw_8bit"):
        return optim, "the recipe names it"
    if optim == "auto" and distributed != "ddp":
        return "adamw_torch", "torch's AdamW, whose state can be sharded"
    if optim == "adamw_8bit" or (optim == "auto" and device.name == "cuda" and _has_bitsandbytes()):
        return "adamw_8bit", "bitsandbytes is installed, and its state takes a quarter of the memory"
    if device.name == "cuda":
        return "adamw_torch_fused", "torch's AdamW, as one fused kernel"
    return "adamw_torch", "torch's AdamW"


def _has_package(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _is_of_bitsandbytes(optim: str) -> bool:
    return optim != "adamw_torch_8bit" and any(part in optim for part in ("8bit", "bnb", "paged", "lion", "ademamix"))


def _has_bitsandbytes() -> bool:
    return _is_installed("bitsandbytes")


def _best_dtype(device: str) -> tuple[str, str]:
    if device == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bfloat16", "the card computes in bf16, which needs no loss scaling"
        return "float16", "the card cannot compute in bf16"
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return "bfloat16", "this CPU has bf16 instructions"
    return "float32", "this CPU has no bf16 instructions, and emulating them is two to three times slower"
