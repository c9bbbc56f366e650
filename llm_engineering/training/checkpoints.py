"""Finds the newest checkpoint that is complete; one that a kill left half-written is named and passed over."""

from __future__ import annotations

import json
import logging
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

logger = logging.getLogger(__name__)

_TORCH_FILES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")


def newest_complete(folder: Path) -> Path | None:
    """The `checkpoint-N` with the largest N that can be resumed from, or None."""
    numbered = [(int(p.name.partition("-")[2]), p) for p in folder.glob("checkpoint-*") if p.name[11:].isdigit()]
    for _, checkpoint in sorted(numbered, reverse=True):
        problem = _problem(checkpoint)
        if not problem:
            return checkpoint
        logger.warning("%s is passed over: %s", checkpoint, problem)
    return None


def _problem(checkpoint: Path) -> str:
    try:
        with safe_open(str(checkpoint / "adapter_model.safetensors"), framework="pt") as weights:
            weights.keys()
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, SafetensorError) as error:
        return str(error)
    if "global_step" not in state:
        return "trainer_state.json has no global_step"
    for name in _TORCH_FILES:
        path = checkpoint / name
        # torch.save writes a zip whose directory comes last: one that opens was written to its end.
        if not path.is_file() or not zipfile.is_zipfile(path):
            return f"{name} is missing or half-written"
    return ""
