"""Runs a training stage as a SkyPilot task: on a machine of a cloud, in Kubernetes, or on a Slurm cluster.

SkyPilot needs other versions of libraries than ZenML, so it is installed in an environment of its own, and its command `sky`
is called here (https://docs.skypilot.co/en/latest/reference/cli.html).
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from datasets import DatasetDict
from pydantic import SecretStr

from llm_engineering.cloud.package import (
    PROJECT_ROOT,
    TRAINED,
    code_archive,
    job_on_machine,
    rename_base,
    take_over,
    training_command,
    unpack_archive,
)
from llm_engineering.cloud.sagemaker.jobs import LAST_LINES, JobNames, job_identity
from llm_engineering.errors import RequestError, WorkError
from llm_engineering.recipe.compute_blocks import SkyPilotConfig
from llm_engineering.recipe.settings import Settings
from llm_engineering.training.processes.job import Job, TrainingResult

logger = logging.getLogger(__name__)

# Folders in the task's working directory.
INPUTS, RESULTS = "inputs", "results"
# The task prints these before the absolute paths of its results and its outputs: on Slurm, `ssh` begins in another folder.
_RESULTS_LINE, _OUTPUTS_LINE = "Results are in ", "Outputs are in "
_ACTIVE = ("INIT", "PENDING", "SETTING_UP", "RUNNING")
_RECONNECT_S = 15
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def check_skypilot(config: SkyPilotConfig) -> None:
    """Check that SkyPilot finds a machine; logs its table of machines and prices.

    Raises:
        RequestError: `sky` is not installed, or it refuses the resources.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "task.yaml")
        file.write_text(yaml.safe_dump({"resources": config.task_resources, "run": "true"}), encoding="utf-8")
        code, lines = _sky("launch", "--dryrun", "--yes", str(file))
    if code:
        raise RequestError(
            "SkyPilot finds no machine for compute.skypilot.resources. Correct them; `sky check` shows which clouds it may use. "
            f"It says: {lines[-1] if lines else f'exit code {code}'}"
        )


def train_with_skypilot(
    job: Job, data: DatasetDict, settings: Settings, recipe: str, record: Callable[[dict[str, Any]], None]
) -> TrainingResult:
    """Train a stage as a SkyPilot task; `launch_training` does the same on this machine.

    The machine's name has a hash of everything that decides the result. If a machine of this name has a task that still runs, this
    function follows it; if the task has ended, it fetches the results; and if the task failed or was stopped, a new one
    continues on the same machine from the newest checkpoint.

    Args:
        job: the work of the stage. Its own `data` is not used. The machine is in `setup.compute.skypilot`.
        recipe: the recipe's name.
        record: called with the task's facts when this function begins to follow it, and again when it has ended.

    Raises:
        RequestError: `sky` is not installed.
        WorkError: the machine cannot be started, or the task failed. The message has the end of the log.
        KeyboardInterrupt: Ctrl-C; the task was stopped.
    """
    names = JobNames.of(recipe, job.stage, job_identity(job, data))
    task = _Task(job, f"{job.stage}-{names.digest}", settings)
    status = task.status()
    try:
        if status is None or status not in (*_ACTIVE, "SUCCEEDED"):
            task.launch(data, recipe)
        else:
            logger.info("Machine %s has a task that does this work (%s): following it", task.machine, status.lower())
        record(task.facts())
        status = task.follow()
    except KeyboardInterrupt:
        if task.number is None:
            logger.warning(
                "Machine %s may have started, and may be paid: run `sky down %s`", task.machine, task.machine
            )
            raise
        _sky("cancel", "--yes", task.machine, str(task.number))
        logger.warning(
            "The task is stopped. The same command continues from its newest checkpoint on machine %s, which is paid until its "
            "autostop, or until `sky down %s`",
            task.machine,
            task.machine,
        )
        raise
    record(task.facts())
    if status != "SUCCEEDED":
        raise task.failure(status)
    result = task.fetch()
    if _sky("down", "--yes", task.machine)[0]:
        logger.warning("Machine %s could not be ended, and may be paid: run `sky down %s`", task.machine, task.machine)
    return result


class _Task:
    """The task of a stage on the machine of this name.

    Attributes:
        number: SkyPilot's number of the newest task on the machine; None if there is none.
    """

    def __init__(self, job: Job, machine: str, settings: Settings) -> None:
        config = job.setup.compute.skypilot
        assert config is not None
        self.job, self.machine, self.config, self.settings = job, machine, config, settings
        self.number: int | None = None
        self._last: deque[str] = deque(maxlen=LAST_LINES)
        self._places: dict[str, str] = {}
        folder = Path(job.setup.model.name_or_path).expanduser()
        # A base model in a folder travels with the task.
        self._model = folder if folder.is_dir() else None

    def status(self) -> str | None:
        """The state of the newest task on the machine; None if there is no task or no such machine."""
        tasks = _json("queue", self.machine).get(self.machine) or []
        newest = max(tasks, key=lambda task: task["job_id"], default=None)
        self.number = newest["job_id"] if newest else None
        return newest["status"] if newest else None

    def facts(self) -> dict[str, Any]:
        """Machine, number and state of the task; keys begin with `skypilot_`."""
        found: dict[str, Any] = next(iter(_json("status", self.machine)), {})
        facts = {"machine": self.machine, "task": self.number, "status": self.status()}
        facts |= {"cloud": found.get("cloud"), "region": found.get("region"), "resources": found.get("resources_str")}
        return {f"skypilot_{name}": value for name, value in facts.items()}

    def launch(self, data: DatasetDict, recipe: str) -> None:
        """Start the machine, unless it runs already, and the task."""
        secrets = {name: value for name, value in self._secrets().items() if value is not None}
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            self._pack(folder, data)
            options = [f"--secret={name}" for name in secrets]
            code, lines = _sky(
                "launch", "--yes", "--detach-run", "--cluster", self.machine, "--name", recipe, *options,
                str(folder / "task.yaml"), secrets=secrets,
            )  # fmt: skip
        if code:
            raise WorkError(
                f"Machine {self.machine} for {self.job.stage} did not start. The end of SkyPilot's output:\n"
                + "\n".join(lines)
            )
        self.status()

    def _secrets(self) -> dict[str, SecretStr | None]:
        settings = self.settings
        return {
            "COMET_API_KEY": settings.comet_api_key,
            "HF_TOKEN": settings.hf_token,
            "WANDB_API_KEY": settings.wandb_api_key,
        }

    def _pack(self, folder: Path, data: DatasetDict) -> None:
        """Write the task and its working directory: the project's code, and below INPUTS what the training reads."""
        project = folder / "project"
        with tarfile.open(fileobj=io.BytesIO(code_archive(PROJECT_ROOT))) as archive:
            archive.extractall(project, filter="data")
        # SkyPilot leaves out what .gitignore names, unless there is this file.
        (project / ".skyignore").touch()
        data.save_to_disk(project / INPUTS / "data")
        folders = {"start": self.job.start, "reward_model": self.job.reward_model, "model": self._model}
        for name, source in folders.items():
            if source is not None:
                shutil.copytree(source, project / INPUTS / name)
        job = job_on_machine(self.job, INPUTS, f"{INPUTS}/model" if self._model else None)
        (project / INPUTS / "job.json").write_text(job.model_dump_json(indent=1), encoding="utf-8")
        command = training_command(self.job.setup.compute.num_processes, 1, f"{INPUTS}/job.json", RESULTS)
        task = {
            "resources": self.config.task_resources,
            "file_mounts": self.config.file_mounts,
            "workdir": str(project),
            "envs": {"LLM_OUTPUT_DIR": self.config.output_dir, "PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1"},
            "setup": self.config.setup,
            "run": "\n".join([
                "set -e",
                f".venv/bin/{' '.join(command)}",
                f'echo "{_RESULTS_LINE}$PWD/{RESULTS}"',
                f'echo "{_OUTPUTS_LINE}$(realpath "$LLM_OUTPUT_DIR")"',
            ]),
        }  # fmt: skip
        (folder / "task.yaml").write_text(yaml.safe_dump(task, sort_keys=False), encoding="utf-8")

    def follow(self) -> str:
        """Log the lines of the task until it ends; returns its state, or `LOST` if the machine is gone."""
        while True:
            _sky("logs", "--tail", "0", self.machine, str(self.number), read=self._read)
            status = self.status()
            if status not in _ACTIVE:
                return status or "LOST"
            # The connection was lost.
            time.sleep(_RECONNECT_S)

    def _read(self, line: str) -> None:
        self._last.append(line)
        for start in (_RESULTS_LINE, _OUTPUTS_LINE):
            _, found, place = line.partition(start)
            if found:
                self._places[start] = place

    def failure(self, status: str) -> WorkError:
        """Why the task did not complete, with the end of its log."""
        if status == "LOST":
            return WorkError(
                f"Machine {self.machine} is gone, for example because a spot machine was taken away. Run the same command again: it "
                "starts another one, which continues from the newest checkpoint if compute.skypilot.output_dir is in a bucket."
            )
        return WorkError(
            f"The task of {self.job.stage} on machine {self.machine} ended as {status.lower()}. The end of its log:\n"
            + "\n".join(self._last)
            + f"\nThe machine is paid until its autostop, or until `sky down {self.machine}`."
        )

    def fetch(self) -> TrainingResult:
        """Download adapter and report."""
        if len(self._places) < 2:
            raise WorkError(
                f"The log of machine {self.machine} does not say where the results are. Run the same command again: it reads the log "
                "again."
            )
        output_dir = self.settings.llm_output_dir.resolve()
        output_dir.mkdir(parents=True, exist_ok=True)
        archive = f"tar -cf - -C {shlex.quote(self._places[_RESULTS_LINE])} ."
        command = ["ssh", "-o", "LogLevel=ERROR", self.machine, archive]
        with tempfile.NamedTemporaryFile(dir=output_dir, prefix=f"{self.machine}.partial-") as packed:
            code = subprocess.run(command, stdout=packed, check=False).returncode
            if code:
                raise WorkError(
                    f"The results on machine {self.machine} cannot be fetched: ssh ended with exit code {code}. Check `ssh "
                    f"{self.machine}`, and run the same command again: it fetches them."
                )
            place = output_dir / "training" / self.machine
            folder = unpack_archive(Path(packed.name), place, TRAINED, f"machine {self.machine}")
        take_over(folder, self._places[_OUTPUTS_LINE], output_dir)
        adapter, report = folder / "adapter", folder / "report" / "report.json"
        if self._model is not None:
            rename_base(adapter / "adapter_config.json", self.job.setup.model.name_or_path)
        summary = json.loads(report.read_text(encoding="utf-8"))
        return TrainingResult(adapter, report.parent, summary)


def _json(command: str, machine: str) -> Any:
    """The answer of a command that prints JSON, about a machine that may not exist."""
    found = subprocess.run(
        [_executable(), command, machine, "--output", "json"], capture_output=True, text=True, check=False
    )
    start = min((at for sign in "[{" if (at := found.stdout.find(sign)) >= 0), default=None)
    if start is None:
        raise WorkError(f"`sky {command} {machine}` fails: {(found.stderr or found.stdout).strip()}")
    return json.loads(found.stdout[start:])


def _sky(
    *arguments: str, read: Callable[[str], None] | None = None, secrets: dict[str, SecretStr] | None = None
) -> tuple[int, list[str]]:
    """Run a command of SkyPilot and log its lines; returns its exit code and its last lines.

    Args:
        read: is given each line.
        secrets: variables of the command's environment, so that no other process sees them.
    """
    hidden = {name: secret.get_secret_value() for name, secret in (secrets or {}).items()}
    last: deque[str] = deque(maxlen=LAST_LINES)
    with subprocess.Popen(
        [_executable(), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, **hidden},
    ) as process:
        assert process.stdout is not None
        for text in process.stdout:
            line = _COLOURS.sub("", text).rstrip()
            logger.info("%s", line)
            last.append(line)
            if read is not None:
                read(line)
    return process.returncode, list(last)


def _executable() -> str:
    found = shutil.which("sky")
    if found is None:
        raise RequestError(
            "compute.target skypilot needs SkyPilot's command `sky`. Install it in an environment of its own, for example with "
            "`pipx install 'skypilot[aws]'`, and run `sky check`."
        )
    return found
