"""The SageMaker jobs of a training stage: their identity and names, following one to its end, and its log."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import signal
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, Self

from botocore import exceptions
from botocore.exceptions import ClientError, HTTPClientError
from datasets import DatasetDict

from llm_engineering.cloud.sagemaker.storage import folder_hash
from llm_engineering.recipe.compute_blocks import SageMakerConfig
from llm_engineering.training.job import Job
from llm_engineering.training.run import dataset_digests

GROUP = "/aws/sagemaker/TrainingJobs"
# So many go with a failure.
LAST_LINES = 50


class JobLog:
    """Reads on where it stopped, in every stream of the job: one for each machine, and new ones after a restart.

    Attributes:
        last: the last lines that were read.
    """

    def __init__(self, client: Any, job: str) -> None:
        self.client = client
        self.job = job
        self.last: deque[str] = deque(maxlen=LAST_LINES)
        self._tokens: dict[str, str | None] = {}

    def read(self) -> list[str]:
        """The lines that came since the last time, stream by stream; with several machines, behind their names."""
        for stream in self._streams():
            self._tokens.setdefault(stream, None)
        machines = {_machine(stream) for stream in self._tokens}
        lines = [
            f"{_machine(stream)}: {line}" if len(machines) > 1 else line
            for stream in sorted(self._tokens)
            for line in self._new(stream)
        ]
        self.last.extend(lines)
        return lines

    def _streams(self) -> list[str]:
        pages = self.client.get_paginator("describe_log_streams").paginate(
            logGroupName=GROUP, logStreamNamePrefix=f"{self.job}/"
        )
        try:
            return [stream["logStreamName"] for page in pages for stream in page["logStreams"]]
        except ClientError as error:
            # The group comes with the first job of an account that writes anything.
            if error.response["Error"]["Code"] == "ResourceNotFoundException":
                return []
            raise

    def _new(self, stream: str) -> list[str]:
        lines: list[str] = []
        while True:
            token = self._tokens[stream]
            page = self.client.get_log_events(
                logGroupName=GROUP,
                logStreamName=stream,
                startFromHead=True,
                **({"nextToken": token} if token else {}),
            )
            lines += [event["message"].rstrip() for event in page["events"]]
            self._tokens[stream] = page["nextForwardToken"]
            # At the end of a stream the token is the one that was given.
            if page["nextForwardToken"] == token:
                return lines


def _machine(stream: str) -> str:
    """`algo-1` of `job/algo-1-1700000000`."""
    return "-".join(stream.rpartition("/")[2].split("-")[:2])


logger = logging.getLogger(__name__)

# Tags of a job; the last says that its results were brought back, and when.
STAGE = "llm-engineering:stage"
IDENTITY = "llm-engineering:identity"
RECIPE = "llm-engineering:recipe"
FETCHED = "llm-engineering:fetched"

ENDED = ("Completed", "Failed", "Stopped")
_NAME_CHARACTERS = 63


def job_identity(job: Job, data: DatasetDict) -> dict[str, Any]:
    """All that decides what a job computes: recipe, model, data, and the model that it starts from.

    On which machines it runs, and where its metrics go, does not.
    """
    setup = job.setup.model_copy(update={"compute": job.setup.compute.in_job})
    return {
        **setup.model_dump(mode="json", exclude={"tracking": True, "compute": {"target", "sagemaker"}}),
        job.stage: job.config,
        "dataset": dataset_digests(data),
        "start": folder_hash(job.start) if job.start else None,
    }


@dataclass(frozen=True)
class JobNames:
    """Names of the jobs of one recipe, stage and identity: `<recipe>-<stage>-<digest>-<number>`."""

    recipe: str
    stage: str
    digest: str

    @classmethod
    def of(cls, recipe: str, stage: str, identity: Mapping[str, Any]) -> JobNames:
        """The names for an identity."""
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
        return cls(recipe, stage, digest)

    @property
    def part(self) -> str:
        """What the names of all jobs of this identity have in common, whatever the recipe is called."""
        return f"-{self.stage}-{self.digest}-"

    def name(self, number: int) -> str:
        """A name that SageMaker takes: 63 characters at most, letters, digits and single hyphens in between."""
        ending = f"{self.part}{number:04d}"
        recipe = re.sub(r"[^A-Za-z0-9]+", "-", self.recipe).strip("-")[: _NAME_CHARACTERS - len(ending)]
        return f"{recipe.rstrip('-')}{ending}"

    def number(self, name: str) -> int:
        """The number of one of these jobs."""
        return int(name.rpartition("-")[2])

    def newest(self, client: Any) -> dict[str, Any] | None:
        """What DescribeTrainingJob says of the job with the highest number; None if there is none."""
        pages = client.get_paginator("list_training_jobs").paginate(NameContains=self.part)
        names = [found["TrainingJobName"] for page in pages for found in page["TrainingJobSummaries"]]
        ours = [name for name in names if re.search(rf"{re.escape(self.part)}\d+$", name)]
        return describe(client, max(ours, key=self.number)) if ours else None


def describe(client: Any, name: str) -> dict[str, Any]:
    """What SageMaker says of a job."""
    description: dict[str, Any] = client.describe_training_job(TrainingJobName=name)
    return description


def exists(client: Any, name: str) -> bool:
    """Whether there is a job of this name."""
    try:
        describe(client, name)
    except ClientError as error:
        if "not found" in error.response["Error"]["Message"]:
            return False
        raise
    return True


def tags_of(client: Any, description: Mapping[str, Any]) -> dict[str, str]:
    """A job's tags."""
    pages = client.get_paginator("list_tags").paginate(ResourceArn=description["TrainingJobArn"])
    return {tag["Key"]: tag["Value"] for page in pages for tag in page["Tags"]}


def is_running(description: Mapping[str, Any]) -> bool:
    """Whether a job has not ended yet."""
    return description["TrainingJobStatus"] not in ENDED


def instance_types(config: SageMakerConfig) -> list[str]:
    """The types of machine that a recipe names, in the order in which they are tried."""
    return list(dict.fromkeys([config.instance_type, *config.fallback_instance_types]))


def types_after(config: SageMakerConfig, tried: str) -> list[str]:
    """The types that are left when one had no capacity."""
    types = instance_types(config)
    return types[types.index(tried) + 1 :] if tried in types else []


def create_first(client: Any, requests: Mapping[str, dict[str, Any]]) -> tuple[dict[str, Any], bool]:
    """Create a job with the first request whose type of machine the account's quota allows.

    Args:
        requests: by type of machine, at least one, in the order in which they are tried.

    Returns:
        the job, and whether it is new: another process may have made it under this name meanwhile.

    Raises:
        ClientError: AWS refuses; of several quotas that do not suffice, the last.
    """
    kinds = list(requests)
    for kind, request in requests.items():
        try:
            client.create_training_job(**request)
        except client.exceptions.ResourceLimitExceeded as error:
            if kind == kinds[-1]:
                raise
            logger.warning("%s: the quota does not suffice. %s", kind, error.response["Error"]["Message"])
        except client.exceptions.ResourceInUse:
            return describe(client, request["TrainingJobName"]), False
        else:
            return describe(client, request["TrainingJobName"]), True
    raise AssertionError("there is at least one request")


# Between two looks: short after news, then longer and longer.
_FIRST_WAIT_S = 1.0
_LONGEST_WAIT_S = 15.0
_FACTOR = 1.4
# CloudWatch shows a line some seconds after it was written.
_LAST_LINES_S = 1.0


class Signals:
    """Takes SIGINT and SIGTERM while it is entered, so that they end neither an upload nor a wait in the middle.

    Attributes:
        received: the last one that nobody has answered yet.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._asking = False
        self._event = threading.Event()
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        # Python hands signals to the main thread alone.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._former[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _take(self, number: int, _: FrameType | None) -> None:
        if self._asking:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        self._event.set()

    def wait(self, seconds: float) -> None:
        """Wait, but not longer than to the next signal."""
        self._event.wait(seconds)

    def answered(self) -> None:
        """Forget the signal that was received."""
        self.received = None
        self._event.clear()

    def stop_is_meant(self, job: str) -> bool:
        """Whether the signal that was received means to stop the job; else it is left running.

        Ctrl-C on a terminal asks; again, or the end of the input, stops. Elsewhere nobody could answer: it stops.
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


def follow(client: Any, log: JobLog, name: str, signals: Signals) -> dict[str, Any]:
    """Show a job's states and log until it has ended; returns what SageMaker says of it then.

    Raises:
        KeyboardInterrupt: it was stopped, or left running, by a signal.
        ClientError, BotoCoreError: AWS refuses to tell. A lost connection is waited for.
    """
    shown, wait, stopping, lost = 0, _FIRST_WAIT_S, False, False
    while True:
        try:
            description = describe(client, name)
            if not is_running(description):
                signals.wait(_LAST_LINES_S)
            lines = log.read()
        except (exceptions.ConnectionError, HTTPClientError, ClientError) as error:
            if not _passes(error):
                raise
            if not lost:
                logger.warning("AWS cannot be reached (%s). Job %s goes on; looking again", error, name)
            lost = True
        else:
            lost = False
            transitions = description.get("SecondaryStatusTransitions", [])
            _show(name, transitions[shown:], lines)
            if lines or len(transitions) > shown:
                shown, wait = len(transitions), _FIRST_WAIT_S
            if not is_running(description):
                if stopping and description["TrainingJobStatus"] == "Stopped":
                    raise KeyboardInterrupt(f"job {name} was stopped")
                return description
        if signals.received is not None:
            if stopping:
                logger.warning("Job %s is being stopped; its checkpoint is kept", name)
                raise KeyboardInterrupt(f"job {name} is being stopped")
            if not signals.stop_is_meant(name):
                logger.info("Job %s goes on. The same command takes it up again, also with --attach %s", name, name)
                raise KeyboardInterrupt(f"detached from job {name}")
            stopping = True
            signals.answered()
            stop(client, name)
        signals.wait(wait)
        wait = min(wait * _FACTOR, _LONGEST_WAIT_S)


def _show(name: str, states: Sequence[dict[str, Any]], lines: Sequence[str]) -> None:
    for state in states:
        logger.info("%s: %s. %s", name, state["Status"], state.get("StatusMessage", "").rstrip("."))
    for line in lines:
        logger.info("%s", line)


def stop(client: Any, name: str) -> None:
    """Stop a job; one that has ended by now stays as it is."""
    logger.warning("Stopping job %s: it saves a checkpoint, within two minutes. Again leaves at once", name)
    try:
        client.stop_training_job(TrainingJobName=name)
    except ClientError as error:
        if error.response["Error"]["Code"] != "ValidationException":
            raise


def _passes(error: Exception) -> bool:
    """Whether the same request may succeed later, by itself."""
    if not isinstance(error, ClientError):
        return True
    status = error.response["ResponseMetadata"]["HTTPStatusCode"]
    return status >= 500 or error.response["Error"]["Code"] in ("ThrottlingException", "Throttling")
