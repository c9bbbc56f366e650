"""What decides the last bits of a training besides its recipe and data: processor, threads and library versions."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path
from typing import Any

import torch


def environment() -> dict[str, Any]:
    """The machine and the software of this process.

    Returns:
        `processor` with the instructions that torch uses, `gpu` (empty on a CPU), `threads` of torch, `python`, `system`, and
        `packages`: the version of every installed package by its name.
    """
    found = {one.name: one.version for one in importlib.metadata.distributions()}
    return {
        "processor": f"{_processor()} ({torch.backends.cpu.get_cpu_capability()})",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": dict(sorted(found.items())),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor())
