"""Writes checkpoints so that each one is complete or does not exist, and finds the one to resume from."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_engineering.errors import RequestError, WorkError
from llm_engineering.recipe.loading import differences

logger = logging.getLogger(__name__)

# In a checkpoint of FSDP, the optimiser's whole state, by the names of the weights.
SHARDED_STATE = "optimizer.bin"
IDENTITY_FILE = "identity.json"
# A checkpoint is written under this name, and renamed when it is complete.
PARTIAL = ".partial"
# A file in the folder of a training that has ended, as long as its checkpoints are there.
FINISHED = "finished"


def publish(partial: Path, final: Path, identity: Mapping[str, Any]) -> None:
    """Write a checkpoint's files to the disk, not only to the system's buffers, and then give it its final name.

    `identity.json` in the checkpoint lists the run's identity and the size of each file.
    """
    files = [path for path in sorted(partial.rglob("*")) if path.is_file()]
    sizes = {str(path.relative_to(partial)): path.stat().st_size for path in files}
    described = partial / IDENTITY_FILE
    described.write_text(json.dumps({"identity": identity, "files": sizes}, indent=1), encoding="utf-8")
    for path in (*files, described, *(p for p in partial.rglob("*") if p.is_dir()), partial):
        _sync(path)
    # Checkpoints of this step and of later ones exist only if resume skipped them as damaged, or started at an earlier one.
    for other in final.parent.glob("checkpoint-*"):
        if step_of(other) >= step_of(final):
            shutil.rmtree(other)
    partial.rename(final)
    _sync(final.parent)


def newest_complete(folder: Path, identity: Mapping[str, Any]) -> Path | None:
    """Find the complete `checkpoint-N` with the largest N, or None. Logs a warning for each incomplete one.

    Raises:
        RequestError: the checkpoint has another identity.
    """
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=step_of, reverse=True):
        problem = _problem(checkpoint)
        if not problem:
            _check_identity(checkpoint, identity)
            return checkpoint
        logger.warning("Skipping %s: %s", checkpoint, problem)
    return None


def check_resumable(checkpoint: Path, identity: Mapping[str, Any]) -> None:
    """Check a checkpoint that the user named.

    Raises:
        RequestError: it is incomplete, or belongs to another recipe, dataset or model. Another number of processes is
            accepted if each step has as many rows as before.
    """
    problem = _problem(checkpoint)
    if problem:
        raise RequestError(f"{checkpoint} is not a complete checkpoint: {problem}. Name another checkpoint folder.")
    _check_identity(checkpoint, identity, by_rows=True)
    compute = identity["compute"]
    if (
        compute["distributed"] == "fsdp2"
        and compute["num_processes"] > 1
        and not (checkpoint / SHARDED_STATE).is_file()
    ):
        raise RequestError(
            f"{checkpoint} cannot be resumed with fsdp2, because it was made without. Set compute.distributed=ddp."
        )


def check_space(folder: Path, needed: int) -> None:
    """Raise a WorkError if the disk of `folder` has fewer than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise WorkError(
            f"The next checkpoint needs {needed / 2**20:.0f} MiB, and the disk of {folder} has {free / 2**20:.0f} MiB "
            "free. It was not written, and the earlier checkpoints are complete. Free some space, and run the same "
            "command again: it resumes from the newest checkpoint."
        )


def remove_finished(trainings: Path) -> None:
    """Remove the checkpoints of trainings that have ended. The folder has one folder for each training."""
    for finished in trainings.glob(f"*/{FINISHED}"):
        shutil.rmtree(finished.with_name("checkpoints"), ignore_errors=True)
        # Another run that has ended at the same time may have removed it.
        finished.unlink(missing_ok=True)


def size(checkpoint: Path) -> int:
    """Bytes of all files of a checkpoint."""
    return sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())


def step_of(checkpoint: Path) -> int:
    """The step of a folder `checkpoint-N`; -1 if its name has another form."""
    number = checkpoint.name.partition("-")[2]
    return int(number) if number.isdigit() else -1


def _check_identity(checkpoint: Path, identity: Mapping[str, Any], by_rows: bool = False) -> None:
    stored = json.loads((checkpoint / IDENTITY_FILE).read_text(encoding="utf-8"))["identity"]
    # Compare the identity as it was stored: JSON turns tuples into lists.
    now = json.loads(json.dumps(identity))
    different = differences(_by_rows(stored), _by_rows(now)) if by_rows else differences(stored, now)
    if different:
        raise RequestError(
            f"{checkpoint} cannot be resumed: it was made with another {', '.join(different)}. Use the same recipe, "
            "dataset and model as for the checkpoint, or start without this checkpoint."
        )


def _by_rows(identity: dict[str, Any]) -> dict[str, Any]:
    """An identity with the rows of a step in place of what shares them among processes.

    The checkpoints of DeepSpeed, and of stages that draw completions, belong to their number of processes.
    """
    compute = identity["compute"]
    blocks = {name: block for name, block in identity.items() if isinstance(block, dict)}
    stage, block = next((name, block) for name, block in blocks.items() if "gradient_accumulation_steps" in block)
    if compute["distributed"] == "deepspeed" or "num_generations" in block:
        return identity
    rows = block["per_device_train_batch_size"] * block["gradient_accumulation_steps"] * compute.get("num_processes", 1)
    shared = {"num_processes", "distributed", "per_device_train_batch_size", "gradient_accumulation_steps"}
    return {
        **identity,
        "compute": {key: value for key, value in compute.items() if key not in shared},
        stage: {key: value for key, value in block.items() if key not in shared} | {"rows of a step": rows},
    }


def _problem(checkpoint: Path) -> str:
    """Why a folder is not a complete checkpoint; empty if it is one."""
    try:
        sizes = json.loads((checkpoint / IDENTITY_FILE).read_text(encoding="utf-8"))["files"].items()
    except OSError:
        return f"it has no {IDENTITY_FILE}, so another program made it"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"its {IDENTITY_FILE} has another format"
    for name, size in sizes:
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != size:
            return f"{name} is missing or incomplete"
    return ""


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
