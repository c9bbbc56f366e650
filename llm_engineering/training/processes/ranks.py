"""Coordinates the processes of one training run: ranks, collective operations, the run's lock, and signals that stop all.

The environment variables are those of torchrun and accelerate: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT.
With one process, collective operations return their input.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, Self, TypeVar, cast

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llm_engineering.errors import RequestError
from llm_engineering.recipe.compute_blocks import ComputeConfig

# Environment variable with the id of the process that started this one; unset if a person started it.
LAUNCHER = "LLM_TRAINING_LAUNCHER"
_POLL_S = 1.0
_LIMIT = timedelta(days=1)

T = TypeVar("T")

logger = logging.getLogger(__name__)


def rank() -> int:
    """Number of this process among all processes of the run, from 0."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes of the run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is the process that writes checkpoints, reports and metrics."""
    return rank() == 0


def several_machines() -> bool:
    """Whether some processes of the run are on other machines, with other disks."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size())) < world_size()


def is_first_here() -> bool:
    """Whether this is the first process on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def has_launcher() -> bool:
    """Whether a launcher started this process. The launcher forwards signals, and kills the process if necessary."""
    return LAUNCHER in os.environ or world_size() > 1


def end_with_launcher() -> None:
    """Watch the launcher in a thread, and kill this process when the launcher is gone. Nothing else would kill it."""
    launcher = os.environ.get(LAUNCHER)
    if launcher is None:
        return

    def watch() -> None:
        while os.getppid() == int(launcher):
            time.sleep(_POLL_S)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="launcher").start()


def join(compute: ComputeConfig, device: str) -> None:
    """Join the run's process group if there are several processes. On CUDA, select the GPU of this process.

    Raises:
        RequestError: the number of started processes differs from the recipe's.
    """
    if world_size() != compute.num_processes:
        raise RequestError(
            f"{world_size()} process(es) were started, and compute.num_processes is {compute.num_processes}. "
            f"Use --set compute.num_processes={world_size()}; note that the number of processes changes the result."
        )
    if world_size() == 1:
        return
    if device == "cpu":
        # accelerate would number the CPU as cpu:0, and torch.load cannot restore an optimiser's state to that device.
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    else:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # The collective operations of this module use the CPU, so that no step waits for the GPU. The launcher kills the
    # other processes when one dies, so a short time limit would only end slow work, such as packing a large dataset.
    dist.init_process_group("gloo" if device == "cpu" else "cpu:gloo,cuda:nccl", timeout=_LIMIT)


def leave() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def wait() -> None:
    """Block until all processes have called this."""
    if world_size() > 1:
        dist.barrier()


def gathered(value: T) -> list[T]:
    """Values of all processes, in rank order."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def from_main(value: T) -> T:
    """Value of the main process."""
    if world_size() == 1:
        return value
    values: list[Any] = [value]
    dist.broadcast_object_list(values, src=0)
    return cast(T, values[0])


def total(values: torch.Tensor) -> torch.Tensor:
    """Sum of all processes' tensors, which must have the same shape. The result is float64 on the CPU."""
    return _reduced(values, dist.ReduceOp.SUM)


def maximum(value: int) -> int:
    """Largest number of all processes."""
    return int(_reduced(torch.tensor(value), dist.ReduceOp.MAX).item())


def _reduced(values: torch.Tensor, operation: dist.ReduceOp.RedOpType) -> torch.Tensor:
    reduced = values.double().cpu()
    if world_size() > 1:
        dist.all_reduce(reduced, operation)
    return reduced


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Lock a run's folder for this process. The system releases the lock when the process ends for any reason.

    Raises:
        RequestError: another process has the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(folder / "lock").acquire(blocking=False)
    except Timeout as error:
        raise RequestError(
            f"Another process trains the same run in {folder}. Wait until it ends, or stop it first."
        ) from error
    with lock:
        yield


class Interruption(TrainerCallback):
    """Context manager and callback that turns SIGINT, SIGTERM and SIGHUP into a stop with a checkpoint.

    systemd, `docker stop` and the end of a spot machine send SIGTERM, and a terminal that is closed sends SIGHUP, which
    `nohup` ignores. Python delivers signals only to the main thread, so in another thread this class handles none.
    A second signal ends the process at once, without a checkpoint. With a launcher it is ignored: it may be the first one
    again, which the terminal or systemd sends to all processes and the launcher forwards. The launcher kills them if
    necessary. Processes agree after each step, so that a signal to one of them stops all of them at the same step.

    Attributes:
        received: the first signal that this process received.
        agreed: the signal at which all processes stop; set by `agree`.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.agreed: signal.Signals | None = None
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                    continue
                self._handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._handlers.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if has_launcher():
                return
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        if not is_main():
            return
        # Do not use the logger: the signal may have interrupted it in the middle of a line.
        text = f"{self.received.name}: stopping after this step, with a checkpoint; a second signal stops at once\n"
        # A terminal that was closed can no longer be written to.
        with suppress(OSError):
            # The line of a bar, and `^C`, are cleared first.
            os.write(2, ("\r\x1b[K" if os.isatty(2) else "").encode() + text.encode())

    def agree(self) -> None:
        """Set `agreed` to a signal that any process has received. Every process must call this.

        A signal that arrives during this call may be too late for it. It stays in `received` for the next call.
        """
        number = maximum(self.received or 0)
        self.agreed = signal.Signals(number) if number else None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop. Skip the evaluation of this step: the sender of SIGTERM kills the process after a short time."""
        self.agree()
        if self.agreed is not None and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False
            logger.info("%s: saving step %d of %d", self.agreed.name, state.global_step, state.max_steps)
