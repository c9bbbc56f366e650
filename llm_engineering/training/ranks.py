"""The processes of one training run: which one this is, and what they tell each other.

The environment says it as torchrun and accelerate write it: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT.
With one process every function here hands back what it was given.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from llm_engineering.config import ComputeConfig
from llm_engineering.errors import RequestError

# The number of the process that started this one to train; unset in a process that a person started.
LAUNCHER = "LLM_TRAINING_LAUNCHER"
_LOOK_EVERY_S = 1.0
_LIMIT = timedelta(days=1)

T = TypeVar("T")


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is the process that writes checkpoints, reports and metrics."""
    return rank() == 0


def several_machines() -> bool:
    """Whether processes train on other machines too, which have disks of their own."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size())) < world_size()


def is_first_here() -> bool:
    """Whether this is the first process of its machine."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def has_launcher() -> bool:
    """Whether another process started this one, passes signals on to it, and ends it where that must be at once."""
    return LAUNCHER in os.environ or world_size() > 1


def end_with_launcher() -> None:
    """End this process at once when the one that started it is gone: nobody is left to end it."""
    launcher = os.environ.get(LAUNCHER)
    if launcher is None:
        return

    def look() -> None:
        while os.getppid() == int(launcher):
            time.sleep(_LOOK_EVERY_S)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=look, daemon=True, name="launcher").start()


def join(compute: ComputeConfig, device: str) -> None:
    """Meet the other processes, if there are any; on CUDA take the card of this one.

    Raises:
        RequestError: more or fewer processes were started than the recipe says.
    """
    if world_size() != compute.num_processes:
        raise RequestError(
            f"{world_size()} process(es) were started, and compute.num_processes is {compute.num_processes}. "
            f"Use --set compute.num_processes={world_size()}, which is part of what the run computes."
        )
    if world_size() == 1:
        return
    if device == "cpu":
        # accelerate counts CPUs as cards, and torch.load knows no cpu:0 to put an optimiser's state to.
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    else:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # What is agreed on here is on the CPU, so that no step waits for the card for it. Whoever starts the processes ends
    # them when one has died: a short time limit would end slow work, such as packing a large dataset, and nothing else.
    dist.init_process_group("gloo" if device == "cpu" else "cpu:gloo,cuda:nccl", timeout=_LIMIT)


def leave() -> None:
    """Part from the other processes, when all is done."""
    if dist.is_initialized():
        dist.destroy_process_group()


def wait() -> None:
    """Go on when all processes are here."""
    if world_size() > 1:
        dist.barrier()


def gathered(value: T) -> list[T]:
    """The value of each process, in their order."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def from_main(value: T) -> T:
    """The main process's value, in every process."""
    if world_size() == 1:
        return value
    values: list[Any] = [value]
    dist.broadcast_object_list(values, src=0)
    return cast(T, values[0])


def total(values: torch.Tensor) -> torch.Tensor:
    """The sum of the processes' tensors, which have one shape, in every process; float64, on the CPU."""
    return _reduced(values, dist.ReduceOp.SUM)


def maximum(value: int) -> int:
    """The largest of the processes' numbers, in every process."""
    return int(_reduced(torch.tensor(value), dist.ReduceOp.MAX).item())


def _reduced(values: torch.Tensor, operation: dist.ReduceOp.RedOpType) -> torch.Tensor:
    if world_size() == 1:
        return values.double().cpu()
    shared = values.double().cpu()
    dist.all_reduce(shared, operation)
    return shared
