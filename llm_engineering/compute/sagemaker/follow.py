"""Follows a running job to its end: its states and log lines as they come, and what Ctrl-C means for it."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any, Self

from botocore import exceptions
from botocore.exceptions import ClientError, HTTPClientError

from llm_engineering.compute.sagemaker.jobs import describe, is_running
from llm_engineering.compute.sagemaker.logs import JobLog

logger = logging.getLogger(__name__)

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
