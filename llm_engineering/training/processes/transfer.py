"""Sends the files of a checkpoint between machines that share no disk. The main process's machine has the whole checkpoint.

Every process of the run must call these functions.
"""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path

import torch
import torch.distributed as dist

from llm_engineering.training.processes import ranks

_CHUNK_BYTES = 64 * 2**20


def fetch(folder: Path, copy: Path) -> Path:
    """Copy a folder of the main process to the machines that lack it.

    Args:
        folder: the folder. The same on all machines.
        copy: a folder of this machine.

    Returns:
        `folder` where this machine has it, else `copy`.
    """
    files = ranks.from_main(_sizes(folder))
    place = folder if _sizes(folder) == files else copy
    takers = [taker for taker, lacks in enumerate(ranks.gathered(place == copy and ranks.is_first_here())) if lacks]
    for taker in takers:
        if ranks.rank() == taker:
            shutil.rmtree(copy, ignore_errors=True)
        for name, size in files.items():
            _send(folder / name, copy / name, size, 0, taker)
    ranks.wait()
    return place


def collect(folder: Path) -> None:
    """Move what the other machines have written to a folder into the same folder of the main process.

    Of machines that share a disk, the first one sends its files. Those that share the main process's disk send nothing.
    """
    token = ranks.from_main(uuid.uuid4().hex)
    mark = folder / f"{token}-{ranks.rank()}"
    if ranks.is_first_here():
        folder.mkdir(parents=True, exist_ok=True)
        mark.touch()
    ranks.wait()
    seen = [int(found.name.rpartition("-")[2]) for found in folder.glob(f"{token}-*")]
    ranks.wait()
    mark.unlink(missing_ok=True)
    ranks.wait()
    gives = not ranks.is_main() and min(seen) == ranks.rank()
    for giver, files in enumerate(ranks.gathered(_sizes(folder) if gives else {})):
        for name, size in files.items():
            _send(folder / name, folder / name, size, giver, 0)
            if ranks.rank() == giver:
                (folder / name).unlink()


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file by its path in the folder."""
    return {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}


def _send(source: Path, target: Path, size: int, giver: int, taker: int) -> None:
    """Copy a file of one process to another. The other processes do nothing."""
    if ranks.rank() == giver:
        with source.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                dist.send(torch.frombuffer(bytearray(chunk), dtype=torch.uint8), dst=taker)
    elif ranks.rank() == taker:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as file:
            for start in range(0, size, _CHUNK_BYTES):
                received = torch.empty(min(_CHUNK_BYTES, size - start), dtype=torch.uint8)
                dist.recv(received, src=giver)
                file.write(received.numpy().tobytes())
