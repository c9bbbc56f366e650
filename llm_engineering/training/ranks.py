"""The processes of one training run: which one this is, how they agree, and how a signal stops all of them.

The environment variables are those of torchrun and accelerate: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT.
With one process, every function here returns what it was given.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from datetime import timedelta
from types import FrameType
from typing import Any, Self, TypeVar, cast

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llm_engineering.errors import RequestError
from llm_engineering.recipe.compute_blocks import ComputeConfig

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


logger = logging.getLogger(__name__)


class Interruption(TrainerCallback):
    """Takes the two signals while it is entered, and gives them back.

    SIGTERM is what systemd, a container's stop and the end of a spot machine send. Python hands signals to the main
    thread alone: in another one nothing is taken. A second signal ends at once, without a checkpoint; not in a process
    that has a launcher, which passes on what the terminal or systemd may have sent to all of them before, and ends them
    itself. Several processes agree at the end of every step: a signal to one of them stops all, at the same step.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._former[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._former.clear()

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if has_launcher():
                return
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        if not is_main():
            return
        # Not by the logger, which may be in the middle of a line: a handler must not enter it again.
        os.write(2, f"{self.received.name}: ending after this step, with a checkpoint; again ends now\n".encode())

    def agree(self) -> None:
        """What one process has received, all have received; every process must call it."""
        number = maximum(self.received or 0)
        self.received = signal.Signals(number) if number else None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop. An evaluation that is due is left out: who sends SIGTERM does not wait long."""
        self.agree()
        if self.received is not None and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False
            logger.info("%s: saving step %d of %d", self.received.name, state.global_step, state.max_steps)
