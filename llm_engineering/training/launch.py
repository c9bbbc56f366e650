"""Starts training on this machine: in this process, or in several processes that this one watches.

The processes of one run end together: signals are passed on to them, and when one fails, the others are ended.
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
from llm_engineering.training import ranks
from llm_engineering.training.checkpoints import held
from llm_engineering.training.job import RESULT_FILE, Job, Result, TrainingResult, read_failures
from llm_engineering.training.ranks import Interruption

logger = logging.getLogger(__name__)

# When one process has failed, the others are given this long to end: most wait for it in vain.
GRACE_S = 5.0
_LOOK_EVERY_S = 0.1


class Ended(NamedTuple):
    """How processes ended.

    Attributes:
        codes: their exit codes in order; that of a signal is its number below zero, as in subprocess.
        killed: those that a signal ended which did not come from here.
        received: the signal that this process was sent meanwhile, and passed on.
    """

    codes: list[int]
    killed: list[int]
    received: signal.Signals | None


def run_processes(command: Sequence[str], environments: Sequence[Mapping[str, str]]) -> Ended:
    """Run a command once for each environment, to the end of all.

    What they write is logged line by line. SIGINT and SIGTERM reach them as one SIGTERM. When one fails, the others
    have `GRACE_S` to end. Whatever happens here, none of them is left.

    Raises:
        KeyboardInterrupt: a second signal.
    """
    with Interruption() as interruption, _started(command, environments) as processes:
        lines = _Lines(processes)
        killed: set[int] = set()
        passed_on, ends_at = False, float("inf")
        while any(process.poll() is None for process in processes):
            lines.show(_LOOK_EVERY_S)
            if interruption.received is not None and not passed_on:
                passed_on = True
                for process in processes:
                    process.terminate()
            codes = [process.poll() for process in processes]
            if ends_at == float("inf") and any(code not in (None, 0, INTERRUPTED) for code in codes):
                ends_at = time.monotonic() + GRACE_S
            if time.monotonic() < ends_at:
                killed |= {number for number, code in enumerate(codes) if code is not None and code < 0}
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
                # Not the terminal's: what it sends comes from here, once.
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
    """Reads whole lines of several processes and logs them, in the calling thread: ZenML keeps the log of that one."""

    def __init__(self, processes: Sequence[subprocess.Popen[bytes]]) -> None:
        self.selector = selectors.DefaultSelector()
        self.rests: dict[int, bytes] = {}
        for process in processes:
            assert process.stdout is not None
            self.selector.register(process.stdout, selectors.EVENT_READ)
            self.rests[process.stdout.fileno()] = b""

    def show(self, wait_s: float) -> bool:
        """Log what is there, after waiting at most so long for it; False if nothing was."""
        if not self.rests:
            time.sleep(wait_s)
            return False
        ready = self.selector.select(wait_s)
        for key, _ in ready:
            read = os.read(key.fd, 2**16)
            *lines, self.rests[key.fd] = (self.rests[key.fd] + read).split(b"\n")
            if not read:
                self.selector.unregister(key.fileobj)
                last = self.rests.pop(key.fd)
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
    """Train in as many processes as the recipe says; one alone is this one, unless its backend needs its own.

    Args:
        train: what trains the job's stage in one process, `train_sft_job` or `train_dpo_job`; others find it by the
            stage's name.
        job: without `data`, which is given apart.
        data: as `train_sft` and `train_dpo` take it.

    Raises:
        RequestError: this machine cannot run the recipe's processes, or they refused the request.
        WorkError: training failed, or one of the processes was killed; the others were ended.
        KeyboardInterrupt: Ctrl-C or SIGTERM; a checkpoint was saved.
    """
    compute = job.setup.compute
    check_processes(compute, choose_device(compute))
    if compute.num_processes == 1 and not needs_own_process(compute):
        return train(job, data, settings)
    digest = hashlib.sha256(job.model_dump_json(exclude={"data"}).encode()).hexdigest()[:12]
    folder = settings.llm_output_dir.resolve() / "training" / f"{job.stage}-job-{digest}"
    with held(folder):
        _clear(folder)
        try:
            data.save_to_disk(str(folder / "data"))
            file = folder / "job.json"
            file.write_text(
                job.model_copy(update={"data": folder / "data"}).model_dump_json(indent=1), encoding="utf-8"
            )
            _run(file, compute.num_processes, settings)
            result = Result.model_validate_json((folder / RESULT_FILE).read_text(encoding="utf-8"))
        finally:
            _clear(folder)
    summary = json.loads((result.report / "report.json").read_text(encoding="utf-8"))
    return TrainingResult(result.adapter, result.report, summary)


def _run(file: Path, count: int, settings: Settings) -> None:
    """Run a job's processes.

    They are told apart by the environment that torchrun sets. torchrun itself would leave the others up to 30 s when
    one has failed, and `accelerate launch` starts several on a CPU through MPI alone.
    """
    ended = run_processes(
        [sys.executable, "-m", "llm_engineering.training", "--job", str(file)], _environments(count, settings)
    )
    if not any(ended.codes):
        return
    if ended.received is not None or (INTERRUPTED in ended.codes and not ended.killed):
        raise KeyboardInterrupt(f"{ended.received.name if ended.received else 'a signal'} in training")
    raise _failure(ended, file.parent)


def _environments(count: int, settings: Settings) -> list[dict[str, str]]:
    """The environment of each process: this one's, in which secrets reach them, and who they are."""
    common = os.environ | {
        ranks.LAUNCHER: str(os.getpid()),
        "LLM_OUTPUT_DIR": str(settings.llm_output_dir.resolve()),
        "LLM_CACHE_DIR": str(settings.llm_cache_dir.resolve()),
        "TQDM_DISABLE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }
    if count == 1:
        return [common]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    # Each would start a thread for every core.
    common.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def _failure(ended: Ended, folder: Path) -> RequestError | WorkError:
    """The error that ended the processes: of several, the first."""
    count = len(ended.codes)
    if ended.killed:
        number = ended.killed[0]
        name = signal.Signals(-ended.codes[number]).name
        return WorkError(
            f"Training process {number} of {count} was ended by {name}, and the others with it. If nobody did it, the "
            "memory of this machine may have been full. The same command goes on from the newest checkpoint."
        )
    failures = read_failures(folder)
    if not failures:
        return WorkError(
            f"The training processes ended with the exit codes {', '.join(map(str, ended.codes))} and left no reason. "
            "What they wrote stands in the log."
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
    """Empty a job's folder of all but its lock."""
    shutil.rmtree(folder / "data", ignore_errors=True)
    for file in folder.glob("*.json"):
        file.unlink()
