"""What every benchmark's figures have in common: the machine that they were taken on, and where they go."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path


def machine() -> dict[str, object]:
    """Processor, cores that may be used, memory in GB and Python's version."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "python": platform.python_version(),
    }


def show(figures: Mapping[str, object], kept: Path | None) -> None:
    """Print the figures as JSON, and keep them in a file if one is given."""
    text = json.dumps(figures, indent=2)
    print(text)
    if kept is not None:
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(text + "\n", encoding="utf-8")
