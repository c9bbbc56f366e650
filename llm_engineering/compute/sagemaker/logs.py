"""A job's log, as it is written, from CloudWatch Logs."""

from __future__ import annotations

from collections import deque
from typing import Any

from botocore.exceptions import ClientError

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
