"""Checkpoints that are whole or not there: published at once, found again by what they were made from."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from llm_engineering.errors import RequestError, WorkError
from llm_engineering.recipe.loading import differences

logger = logging.getLogger(__name__)

IDENTITY_FILE = "identity.json"
# A checkpoint is written under this name and renamed when it is complete.
PARTIAL = ".partial"


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep a run's folder to this process; the system lets it go when the process ends, however it ends.

    Raises:
        RequestError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RequestError(
                f"Another process trains this very run in {folder}. Wait for it to end, or end it first."
            ) from error
        yield


def publish(partial: Path, final: Path, identity: Mapping[str, Any]) -> None:
    """Give a complete checkpoint its name, after all of it is on the disk and not in the system's buffers alone.

    Beside its files stands what it was made from, and how long each file is.
    """
    files = [path for path in sorted(partial.rglob("*")) if path.is_file()]
    sizes = {str(path.relative_to(partial)): path.stat().st_size for path in files}
    described = partial / IDENTITY_FILE
    described.write_text(json.dumps({"identity": identity, "files": sizes}, indent=1), encoding="utf-8")
    for path in (*files, described, *(p for p in partial.rglob("*") if p.is_dir()), partial):
        _sync(path)
    # One of this number is there only where it was passed over as damaged, or the run began at an earlier one.
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    _sync(final.parent)


def newest_complete(folder: Path, identity: Mapping[str, Any]) -> Path | None:
    """The `checkpoint-N` with the largest N that is whole, or None; those that are not are named and passed over.

    Raises:
        RequestError: it was made from something else than `identity` says.
    """
    numbered = [(int(p.name.partition("-")[2]), p) for p in folder.glob("checkpoint-*") if p.name[11:].isdigit()]
    for _, checkpoint in sorted(numbered, reverse=True):
        problem = _problem(checkpoint)
        if not problem:
            _check_identity(checkpoint, identity)
            return checkpoint
        logger.warning("%s is passed over: %s", checkpoint, problem)
    return None


def given_checkpoint(checkpoint: Path, identity: Mapping[str, Any]) -> Path:
    """The checkpoint that a person named, checked.

    Raises:
        RequestError: it is not whole, or was made from another recipe, dataset or model.
    """
    problem = _problem(checkpoint)
    if problem:
        raise RequestError(f"{checkpoint} is no checkpoint to resume from: {problem}. Name another checkpoint folder.")
    _check_identity(checkpoint, identity)
    return checkpoint


def check_space(folder: Path, needed: int) -> None:
    """Raise a WorkError where the disk of `folder` has fewer than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise WorkError(
            f"The next checkpoint needs {needed / 2**20:.0f} MiB, and the disk of {folder} has {free / 2**20:.0f} MiB "
            "free. Nothing of it was written, and the checkpoints before it are whole: free some space, and the same "
            "command goes on from the newest."
        )


def size(checkpoint: Path) -> int:
    """Bytes of all files of a checkpoint."""
    return sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())


def _check_identity(checkpoint: Path, identity: Mapping[str, Any]) -> None:
    then = json.loads((checkpoint / IDENTITY_FILE).read_text(encoding="utf-8"))["identity"]
    # Through JSON, as what was stored: a tuple there is a list here.
    different = differences(then, json.loads(json.dumps(identity)))
    if different:
        raise RequestError(
            f"{checkpoint} cannot be resumed: it was made with another {', '.join(different)}. Use the recipe, "
            "dataset and model that it was made with, or start anew without it."
        )


def _problem(checkpoint: Path) -> str:
    try:
        described = json.loads((checkpoint / IDENTITY_FILE).read_text(encoding="utf-8"))
        sizes, identity = described["files"], described["identity"]
        needed = _torch_files(identity)
    except OSError:
        return f"it has no {IDENTITY_FILE}, so that it was not made here"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{IDENTITY_FILE} is not what is written here"
    for name in (*sizes, *needed):
        path = checkpoint / name
        if name not in sizes or not path.is_file() or path.stat().st_size != sizes[name]:
            return f"{name} is missing or half-written"
    if not any(name.endswith(".safetensors") for name in sizes):
        return "it has no weights"
    try:
        for name in sizes:
            if name.endswith(".safetensors"):
                with safe_open(str(checkpoint / name), framework="pt") as weights:
                    weights.keys()
            # torch.save writes a zip.
            elif name.endswith((".pt", ".pth")) and not zipfile.is_zipfile(checkpoint / name):
                return f"{name} is damaged"
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, SafetensorError) as error:
        return str(error)
    if "global_step" not in state:
        return "trainer_state.json has no global_step"
    return ""


def _torch_files(identity: Mapping[str, Any]) -> list[str]:
    """What a checkpoint holds besides weights: the state of each process's generators; shards have names of their own."""
    compute = identity.get("compute", {})
    processes = compute.get("num_processes", 1)
    states = [f"rng_state_{rank}.pth" for rank in range(processes)] if processes > 1 else ["rng_state.pth"]
    return ["scheduler.pt", *states, *(["optimizer.pt"] if compute.get("distributed", "ddp") == "ddp" else [])]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
