"""The SageMaker jobs of a training stage: their identity and names, starting one, and following it to its end."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import signal
import sys
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from types import FrameType
from typing import Any, Self

from botocore.exceptions import BotoCoreError, ClientError
from datasets import DatasetDict

from llm_engineering.cloud.package import PROJECT_ROOT, code_hash, folder_hash
from llm_engineering.cloud.sagemaker.failures import is_temporary
from llm_engineering.cloud.sagemaker.request import Machine
from llm_engineering.training.processes.job import Job
from llm_engineering.training.training_run import dataset_digests

logger = logging.getLogger(__name__)

# Tags of a job. FETCHED holds the time at which its results were downloaded.
STAGE = "llm-engineering:stage"
IDENTITY = "llm-engineering:identity"
RECIPE = "llm-engineering:recipe"
FETCHED = "llm-engineering:fetched"

GROUP = "/aws/sagemaker/TrainingJobs"
# Number of log lines that the message of a failed job shows.
LAST_LINES = 50
_NAME_CHARACTERS = 63
# Seconds between two requests. The wait is short after a new log line or state, and grows until the next one.
_FIRST_WAIT_S = 1.0
_LONGEST_WAIT_S = 15.0
_FACTOR = 1.4
# Secondary states of a job that waits for its machines, at its start or after an interruption.
_PENDING = ("Starting", "Pending", "LaunchingMLInstances", "Interrupted", "Restarting")
# CloudWatch shows a line some seconds after it was written.
_LAST_LINES_S = 1.0


def job_identity(job: Job, data: DatasetDict) -> dict[str, Any]:
    """Everything that decides what a job computes: recipe, model, data, the models that it reads, and the code.

    The machines and the trackers are left out, because they do not change the result.
    """
    setup = job.setup.model_copy(update={"compute": job.setup.compute.in_job})
    return {
        **setup.model_dump(mode="json", exclude={"tracking": True, "compute": {"target", "sagemaker", "skypilot"}}),
        job.stage: job.config,
        "dataset": dataset_digests(data),
        "start": folder_hash(job.start) if job.start else None,
        **({"reward_model": folder_hash(job.reward_model)} if job.reward_model else {}),
        "code": code_hash(PROJECT_ROOT, "docker/training.lock"),
    }


@dataclass(frozen=True)
class JobNames:
    """Names of the jobs of one recipe, stage and identity: `<recipe>-<stage>-<digest>-<number>`."""

    recipe: str
    stage: str
    digest: str

    @classmethod
    def of(cls, recipe: str, stage: str, identity: Mapping[str, Any]) -> JobNames:
        """Hash the identity, see `job_identity`, into 12 hex digits."""
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
        return cls(recipe, stage, digest)

    @property
    def part(self) -> str:
        """The part of the name that is the same for all jobs of this identity, even if the recipe has another name."""
        return f"-{self.stage}-{self.digest}-"

    def name(self, number: int) -> str:
        """A name that SageMaker accepts: at most 63 letters, digits and single hyphens."""
        ending = f"{self.part}{number:04d}"
        recipe = re.sub(r"[^A-Za-z0-9]+", "-", self.recipe).strip("-")[: _NAME_CHARACTERS - len(ending)]
        return f"{recipe.rstrip('-')}{ending}"

    def number(self, name: str) -> int:
        """The number at the end of a job's name."""
        return int(name.rpartition("-")[2])

    def newest(self, client: Any) -> dict[str, Any] | None:
        """DescribeTrainingJob's answer for the job with the highest number; None if there is no job."""
        pages = client.get_paginator("list_training_jobs").paginate(NameContains=self.part)
        names = [summary["TrainingJobName"] for page in pages for summary in page["TrainingJobSummaries"]]
        ours = [name for name in names if re.search(rf"{re.escape(self.part)}\d+$", name)]
        return describe(client, max(ours, key=self.number)) if ours else None

    def running_others(self, client: Any) -> list[str]:
        """The running jobs of the same recipe and stage whose identity is another one."""
        start = self.name(1).removesuffix(f"{self.part}0001") + f"-{self.stage}-"
        pages = client.get_paginator("list_training_jobs").paginate(NameContains=start, StatusEquals="InProgress")
        names = [summary["TrainingJobName"] for page in pages for summary in page["TrainingJobSummaries"]]
        return [name for name in names if re.fullmatch(rf"{start}[0-9a-f]{{12}}-\d+", name) and self.part not in name]


def describe(client: Any, name: str) -> dict[str, Any]:
    """DescribeTrainingJob's answer."""
    description: dict[str, Any] = client.describe_training_job(TrainingJobName=name)
    return description


def exists(client: Any, name: str) -> bool:
    """Whether the account has a job of this name."""
    try:
        describe(client, name)
    except ClientError as error:
        if "not found" in error.response["Error"]["Message"]:
            return False
        raise
    return True


def tags_of(client: Any, description: Mapping[str, Any]) -> dict[str, str]:
    """The tags of a described job."""
    pages = client.get_paginator("list_tags").paginate(ResourceArn=description["TrainingJobArn"])
    return {tag["Key"]: tag["Value"] for page in pages for tag in page["Tags"]}


def is_running(description: Mapping[str, Any]) -> bool:
    """Whether a job has not ended yet."""
    return description["TrainingJobStatus"] not in ("Completed", "Failed", "Stopped")


def pending_s(description: Mapping[str, Any]) -> float:
    """Seconds for which a job has been waiting for its machines; 0 if it has them."""
    since = None
    for state in reversed(description.get("SecondaryStatusTransitions", [])):
        if state["Status"] not in _PENDING:
            break
        since = state["StartTime"]
    return (datetime.now(UTC) - since).total_seconds() if since is not None else 0.0


def create_first(client: Any, requests: Mapping[Machine, dict[str, Any]]) -> tuple[dict[str, Any], bool]:
    """Create a job with the first request whose machine the account's quota allows.

    Args:
        requests: at least one request, by machine, in the order in which they are tried.

    Returns:
        The job, and whether it is new: another process may have created a job of this name in the meantime.

    Raises:
        ClientError: AWS refuses. If every quota is too small, the error for the last machine.
    """
    last = list(requests)[-1]
    for machine, request in requests.items():
        try:
            client.create_training_job(**request)
        except client.exceptions.ResourceLimitExceeded as error:
            if machine == last:
                raise
            logger.warning("The quota for %s is too small. %s", machine, error.response["Error"]["Message"])
        except client.exceptions.ResourceInUse:
            return describe(client, request["TrainingJobName"]), False
        else:
            return describe(client, request["TrainingJobName"]), True
    raise AssertionError("there is at least one request")


class JobLog:
    """The states of a job, and its log in CloudWatch, which has one stream for each machine and new ones after a restart.

    Args:
        from_end: begin with the last `LAST_LINES` lines of each stream that exists at the first call of `read`.

    Attributes:
        last: the last `LAST_LINES` lines that were read.
    """

    def __init__(self, client: Any, job: str, from_end: bool = False) -> None:
        self.client = client
        self.job = job
        self.from_end = from_end
        self.last: deque[str] = deque(maxlen=LAST_LINES)
        self._tokens: dict[str, str | None] = {}
        self._unread: list[str] = []
        self._states: list[tuple[str, str]] = []

    def states(self, description: Mapping[str, Any]) -> list[tuple[str, str]]:
        """The states since the last call, with their messages, and former states whose message has changed.

        SageMaker reports missing capacity as another message of the state `Starting`.
        """
        transitions = description.get("SecondaryStatusTransitions", [])
        states = [(state["Status"], state.get("StatusMessage", "").rstrip(".")) for state in transitions]
        new = [state for i, state in enumerate(states) if state not in self._states[i : i + 1]]
        self._states = states
        return new

    def read(self) -> list[str]:
        """The lines since the last call, stream by stream; with several machines, each line has its machine's name.

        If a request fails, the next call also returns the lines that were read before it.
        """
        for stream in self._streams():
            self._tokens.setdefault(stream, None)
        machines = {_machine(stream) for stream in self._tokens}
        for stream in sorted(self._tokens):
            self._read_stream(stream, f"{_machine(stream)}: " if len(machines) > 1 else "")
        self.from_end = False
        lines, self._unread = self._unread, []
        self.last.extend(lines)
        return lines

    def _streams(self) -> list[str]:
        pages = self.client.get_paginator("describe_log_streams").paginate(
            logGroupName=GROUP, logStreamNamePrefix=f"{self.job}/"
        )
        try:
            return [stream["logStreamName"] for page in pages for stream in page["logStreams"]]
        except ClientError as error:
            # The first job of an account that writes a line creates the group.
            if error.response["Error"]["Code"] == "ResourceNotFoundException":
                return []
            raise

    def _read_stream(self, stream: str, start: str) -> None:
        while True:
            token = self._tokens[stream]
            is_end = self.from_end and token is None
            page = self.client.get_log_events(
                logGroupName=GROUP,
                logStreamName=stream,
                startFromHead=not is_end,
                **({"nextToken": token} if token else {}),
                **({"limit": LAST_LINES} if is_end else {}),
            )
            self._unread += [start + event["message"].rstrip() for event in page["events"]]
            self._tokens[stream] = page["nextForwardToken"]
            # At the end of a stream, CloudWatch returns the token of the request.
            if page["nextForwardToken"] == token:
                return


def _machine(stream: str) -> str:
    """`algo-1` for `job/algo-1-1700000000`."""
    return "-".join(stream.rpartition("/")[2].split("-")[:2])


class Signals:
    """Context manager that records SIGINT and SIGTERM, so that they cannot interrupt an upload or a wait.

    Attributes:
        received: the last signal that has not been handled yet.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._asking = False
        self._event = threading.Event()
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        # Python allows signal handlers only in the main thread.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._former[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self._asking:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        self._event.set()

    def wait(self, seconds: float) -> None:
        """Wait until the time is over or a signal arrives."""
        self._event.wait(seconds)

    def answered(self) -> None:
        """Forget the received signal."""
        self.received = None
        self._event.clear()

    def stop_is_meant(self, job: str) -> bool:
        """Whether the received signal stops the job; otherwise the job keeps running without this process.

        After Ctrl-C on a terminal, the user is asked; a second Ctrl-C or the end of the input means stop. SIGTERM, and
        Ctrl-C without a terminal, stop the job without a question.
        """
        if self.received == signal.SIGTERM or not (sys.stdin.isatty() and sys.stderr.isatty()):
            return True
        print(f"\nStop job {job}, or detach and leave it running? [S/d] ", end="", file=sys.stderr, flush=True)
        self._asking = True
        try:
            answer = sys.stdin.readline()
        except KeyboardInterrupt:
            answer = ""
            print(file=sys.stderr)
        finally:
            self._asking = False
        return not answer.strip().lower().startswith("d")


def follow(client: Any, log: JobLog, name: str, signals: Signals, max_pending_s: float | None = None) -> dict[str, Any]:
    """Log the states and the log lines of a job until it ends; returns DescribeTrainingJob's last answer.

    If the connection is lost, the requests are repeated until AWS answers.

    Args:
        max_pending_s: return also when the job has waited for its machines for this time; the job then still runs.

    Raises:
        KeyboardInterrupt: a signal stopped the job, or detached this process from it.
        ClientError, BotoCoreError: AWS refuses a request.
    """
    wait, stopping, lost = _FIRST_WAIT_S, False, False
    while True:
        try:
            description = describe(client, name)
            if not is_running(description):
                signals.wait(_LAST_LINES_S)
            lines = log.read()
        except (BotoCoreError, ClientError) as error:
            if not is_temporary(error):
                raise
            if not lost:
                logger.warning("AWS cannot be reached (%s). Job %s keeps running; trying again", error, name)
            lost = True
        else:
            lost = False
            states = log.states(description)
            for status, message in states:
                logger.info("%s: %s. %s", name, status, message)
            for line in lines:
                logger.info("%s", line)
            if lines or states:
                wait = _FIRST_WAIT_S
            if not is_running(description):
                if stopping and description["TrainingJobStatus"] == "Stopped":
                    raise KeyboardInterrupt(f"job {name} was stopped")
                return description
            if max_pending_s is not None and not stopping and pending_s(description) > max_pending_s:
                return description
        if signals.received is not None:
            if stopping:
                logger.warning("Job %s is being stopped; its checkpoint is kept", name)
                raise KeyboardInterrupt(f"job {name} is being stopped")
            if not signals.stop_is_meant(name):
                logger.info(
                    "Job %s keeps running. To follow it again, run the same command, or add --attach %s", name, name
                )
                raise KeyboardInterrupt(f"detached from job {name}")
            stopping = True
            signals.answered()
            logger.warning(
                "Stopping job %s: it saves a checkpoint within two minutes. Ctrl-C again leaves at once", name
            )
            stop(client, name)
        signals.wait(wait)
        wait = min(wait * _FACTOR, _LONGEST_WAIT_S)


def stop(client: Any, name: str) -> None:
    """Ask SageMaker to stop a job."""
    try:
        client.stop_training_job(TrainingJobName=name)
    except ClientError as error:
        # SageMaker refuses to stop a job that has ended in the meantime.
        if error.response["Error"]["Code"] != "ValidationException":
            raise
