"""Where training runs on this machine: in this process, or in processes of its own that this one watches."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

from datasets import DatasetDict

from llm_engineering.compute.device import check_processes, choose_device, needs_own_process
from llm_engineering.errors import INTERRUPTED, RequestError, WorkError
from llm_engineering.settings import Settings
from llm_engineering.training import ranks
from llm_engineering.training.checkpoints import held
from llm_engineering.training.job import RESULT_FILE, Job, Result, read_failures
from llm_engineering.training.processes import Ended, run_processes
from llm_engineering.training.run import TrainingResult


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
