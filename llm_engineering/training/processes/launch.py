"""Starts training on this machine: in this process, or in worker processes that this process watches.

The worker processes of a run end together. This process forwards signals to them, and when one fails, it stops the rest.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from datasets import DatasetDict

from llm_engineering.errors import INTERRUPTED, RequestError, WorkError
from llm_engineering.models.device import check_processes, choose_device, needs_own_process
from llm_engineering.recipe.settings import Settings
from llm_engineering.training.processes import ranks
from llm_engineering.training.processes.job import RESULT_FILE, SUMMARY_FILE, Job, Result, TrainingResult, read_failures
from llm_engineering.training.processes.ranks import Interruption, run_lock

logger = logging.getLogger(__name__)

# Seconds that the other processes have to end after one has failed. Most of them are waiting for the failed process.
GRACE_S = 5.0
_POLL_S = 0.1


class Ended(NamedTuple):
    """How the worker processes ended.

    Attributes:
        codes: exit codes in rank order. If a signal ended a process, its code is minus the signal's number, as in
            subprocess.
        killed: ranks of the processes that a signal ended before this process killed any.
        received: the signal that this process received and forwarded.
    """

    codes: list[int]
    killed: list[int]
    received: signal.Signals | None


def run_processes(command: Sequence[str], environments: Sequence[Mapping[str, str]]) -> Ended:
    """Run a command once in each environment, and wait until all of these processes have ended.

    Logs their output line by line. Forwards SIGINT, SIGTERM and SIGHUP to them as one SIGTERM. When one fails, the others have
    `GRACE_S` seconds to end. No process is left running, even after an exception.

    Raises:
        KeyboardInterrupt: this process received a second signal.
    """
    with Interruption() as interruption, _started(command, environments) as processes:
        lines = _Lines(processes)
        killed: set[int] = set()
        forwarded, kill_at = False, float("inf")
        while any(process.poll() is None for process in processes):
            lines.show(_POLL_S)
            if interruption.received is not None and not forwarded:
                forwarded = True
                for process in processes:
                    process.terminate()
            codes = [process.poll() for process in processes]
            if kill_at == float("inf") and any(code not in (None, 0, INTERRUPTED) for code in codes):
                kill_at = time.monotonic() + GRACE_S
            if time.monotonic() < kill_at:
                killed |= {rank for rank, code in enumerate(codes) if code is not None and code < 0}
            else:
                for process in processes:
                    process.kill()
        while lines.show(0):
            pass
        return Ended([process.wait() for process in processes], sorted(killed), interruption.received)


@contextmanager
def _started(
    command: Sequence[str], environments: Sequence[Mapping[str, str]]
) -> Iterator[list[subprocess.Popen[bytes]]]:
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for environment in environments:
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                # A new session: otherwise the terminal would send Ctrl-C to the worker process too.
                start_new_session=True,
            )
            processes.append(process)
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


class _Lines:
    """Logs the output of several processes line by line, in the calling thread, because ZenML stores that thread's log."""

    def __init__(self, processes: Sequence[subprocess.Popen[bytes]]) -> None:
        self.selector = selectors.DefaultSelector()
        self.unfinished: dict[int, bytes] = {}
        for process in processes:
            assert process.stdout is not None
            self.selector.register(process.stdout, selectors.EVENT_READ)
            self.unfinished[process.stdout.fileno()] = b""

    def show(self, wait_s: float) -> bool:
        """Wait at most `wait_s` seconds for output, and log it; False if there was none."""
        if not self.unfinished:
            time.sleep(wait_s)
            return False
        ready = self.selector.select(wait_s)
        for key, _ in ready:
            read = os.read(key.fd, 2**16)
            *lines, self.unfinished[key.fd] = (self.unfinished[key.fd] + read).split(b"\n")
            if not read:
                self.selector.unregister(key.fileobj)
                last = self.unfinished.pop(key.fd)
                lines += [last] if last else []
            for line in lines:
                logger.info("%s", line.decode(errors="replace").rstrip())
        return bool(ready)


def launch_training(
    train: Callable[[Job, DatasetDict, Settings], TrainingResult],
    job: Job,
    data: DatasetDict,
    settings: Settings,
) -> TrainingResult:
    """Train in this process, or in as many worker processes as the recipe says.

    Args:
        train: trains the job's stage in this process. Worker processes find the function in the table of stages.
        job: the run. Its field `data` is ignored; the argument `data` is used instead.
        data: formatted splits, as the stage takes them.

    Raises:
        RequestError: this machine cannot run the recipe's processes, or a worker process refused the request.
        WorkError: training failed, or one of the processes was killed.
        KeyboardInterrupt: Ctrl-C, SIGTERM or SIGHUP; a checkpoint was saved.
    """
    compute = job.setup.compute
    check_processes(compute, choose_device(compute))

    # Train in this process
    if compute.num_processes == 1 and not needs_own_process(compute):
        return train(job, data, settings)

    # Train in worker processes
    digest = hashlib.sha256(job.model_dump_json(exclude={"data"}).encode()).hexdigest()[:12]
    folder = settings.llm_output_dir.resolve() / "training" / f"{job.stage}-job-{digest}"
    with run_lock(folder):
        _clear(folder)
        try:
            data.save_to_disk(str(folder / "data"))
            file = folder / "job.json"
            written = job.model_copy(update={"data": folder / "data"})
            file.write_text(written.model_dump_json(indent=1), encoding="utf-8")
            _run_job(file, compute.num_processes, settings)
            result = Result.model_validate_json((folder / RESULT_FILE).read_text(encoding="utf-8"))
        finally:
            _clear(folder)

    # Read the summary
    summary = json.loads((result.report / SUMMARY_FILE).read_text(encoding="utf-8"))
    return TrainingResult(result.adapter, result.report, summary)


def _run_job(file: Path, count: int, settings: Settings) -> None:
    """Run a job's worker processes. They learn their rank from the environment variables that torchrun would set.

    torchrun is not used, because it lets the other processes run for up to 30 s after one has failed. `accelerate
    launch` is not used, because on a CPU it needs MPI to start several processes.
    """
    command = [sys.executable, "-m", "llm_engineering.training", "--job", str(file)]
    ended = run_processes(command, _environments(count, settings))
    if not any(ended.codes):
        return
    if ended.received is not None or (INTERRUPTED in ended.codes and not ended.killed):
        raise KeyboardInterrupt(f"{ended.received.name if ended.received else 'a signal'} in training")
    raise _failure(ended, file.parent)


def _environments(count: int, settings: Settings) -> list[dict[str, str]]:
    """The environment of each worker: this process's environment, which passes on secrets, and the worker's rank."""
    common = os.environ | {
        ranks.LAUNCHER: str(os.getpid()),
        "LLM_OUTPUT_DIR": str(settings.llm_output_dir.resolve()),
        "LLM_CACHE_DIR": str(settings.llm_cache_dir.resolve()),
        "TQDM_DISABLE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }
    if count == 1:
        # Libraries would spread one process over all cards that it sees.
        cards = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
        return [common | {"CUDA_VISIBLE_DEVICES": cards.split(",")[0]}]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    # The default is one thread for each core in every process.
    common.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def _failure(ended: Ended, folder: Path) -> RequestError | WorkError:
    """The error that ended the processes; the first one if several failed."""
    count = len(ended.codes)
    if ended.killed:
        rank = ended.killed[0]
        name = signal.Signals(-ended.codes[rank]).name
        return WorkError(
            f"Training process {rank} of {count} was ended by {name}, and the other processes were stopped. If nobody "
            "killed it, the memory of this machine was probably full. The same command resumes from the newest checkpoint."
        )
    failures = read_failures(folder)
    if not failures:
        return WorkError(
            f"The training processes ended with the exit codes {', '.join(map(str, ended.codes))} and reported no "
            "error. Look for the reason in the log above."
        )
    first = failures[0]
    if first.kind == RequestError.__name__:
        return RequestError(first.message)
    if first.kind == WorkError.__name__:
        return WorkError(first.message)
    return WorkError(
        f"Training process {first.rank} of {count} failed with {first.kind}: {first.message}\n{first.traceback}"
    )


def _clear(folder: Path) -> None:
    """Delete everything in a job's folder except its lock."""
    shutil.rmtree(folder / "data", ignore_errors=True)
    for file in folder.glob("*.json"):
        file.unlink()
