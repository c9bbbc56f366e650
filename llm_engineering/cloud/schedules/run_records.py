"""Records of the runs that a schedule started: one JSON file for each run, in a folder or in S3."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import boto3
from pydantic import BaseModel, ConfigDict

from llm_engineering.process import PROCESS, is_running, this_process

# Environment variable of a scheduled training job with the job's name.
JOB_VARIABLE = "LLM_SCHEDULED_JOB"

_LOCK_FILE = "run.lock"
# Outcomes of runs that judged a model. Another run with the same data would end the same way.
_COMPLETED = ("promoted", "staged", "gate failed")


def job_prefix(schedule: str) -> str:
    """The beginning of the names of a schedule's jobs. It is unique, because a schedule's name has no double hyphen."""
    return f"{schedule}--"


class RunRecord(BaseModel):
    """A run of a schedule.

    Attributes:
        run: the training job's name; for a run on this machine, its time and process id.
        ended: None while the run is in progress, or if its process was killed.
        reason: the rule that failed, the error, or why nothing ran.
        run_id: the id of the ZenML run; None if no ZenML run began.
        fingerprint: hash of the run's inputs, recipe and code; None if the run ended before it was computed.
    """

    model_config = ConfigDict(frozen=True)

    run: str
    began: datetime
    ended: datetime | None = None
    outcome: Literal["running", "promoted", "staged", "gate failed", "stale", "skipped", "failed", "interrupted"] = (
        "running"
    )
    reason: str = ""
    run_id: str | None = None
    version: int | None = None
    fingerprint: str | None = None

    @property
    def verdict(self) -> str:
        """Outcome and reason, such as `promoted: version 4`, `skipped: no new data` or `failed: …`."""
        return f"{self.outcome}: {self.reason}" if self.reason else self.outcome

    @property
    def is_complete(self) -> bool:
        """Whether the run went through the whole chain and judged a model."""
        return self.outcome in _COMPLETED


class Place:
    """The place of a schedule's files: a folder, or `s3://bucket/prefix`. Its last part is the schedule's name."""

    def __init__(self, place: str) -> None:
        self.place = place.rstrip("/")
        self.in_s3 = place.startswith("s3://")

    @property
    def schedule(self) -> str:
        """The schedule's name."""
        return self.place.rpartition("/")[2]

    def write(self, record: RunRecord) -> None:
        """Write a record; it replaces an earlier record of the same run."""
        text = record.model_dump_json(indent=1)
        if self.in_s3:
            bucket, prefix = self.bucket_and_prefix
            boto3.client("s3").put_object(Bucket=bucket, Key=f"{prefix}/runs/{record.run}.json", Body=text.encode())
            return
        folder = Path(self.place) / "runs"
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{record.run}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(folder / f"{record.run}.json")

    def record(self, run: str, s3: Any) -> RunRecord | None:
        """The record of a run in S3; None if the run wrote none. `s3` is a boto3 client."""
        bucket, prefix = self.bucket_and_prefix
        try:
            answer = s3.get_object(Bucket=bucket, Key=f"{prefix}/runs/{run}.json")
        except s3.exceptions.NoSuchKey:
            return None
        return RunRecord.model_validate_json(answer["Body"].read())

    def records(self) -> Iterator[RunRecord]:
        """The records, the last written first. Each is read when the caller reaches it."""
        if self.in_s3:
            s3, (bucket, prefix) = boto3.client("s3"), self.bucket_and_prefix
            pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/runs/")
            found = [item for page in pages for item in page.get("Contents", [])]
            for item in sorted(found, key=lambda item: item["LastModified"], reverse=True):
                yield RunRecord.model_validate_json(s3.get_object(Bucket=bucket, Key=item["Key"])["Body"].read())
        else:
            files = (Path(self.place) / "runs").glob("*.json")
            for file in sorted(files, key=lambda file: file.stat().st_mtime_ns, reverse=True):
                yield RunRecord.model_validate_json(file.read_bytes())

    @contextmanager
    def kept(self, file: Path) -> Iterator[None]:
        """Download a file from S3 before the block and upload it afterwards, so that it outlives the job's machine.

        A file that is already on the machine is not replaced: it comes from the job's checkpoints, so it is newer. If
        the place is a folder on this machine, this does nothing.
        """
        if not self.in_s3:
            yield
            return
        s3, (bucket, prefix) = boto3.client("s3"), self.bucket_and_prefix
        key = f"{prefix}/{file.name}"
        if not file.exists() and s3.list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1).get("Contents"):
            file.parent.mkdir(parents=True, exist_ok=True)
            s3.download_file(bucket, key, str(file))
        try:
            yield
        finally:
            if file.exists():
                s3.upload_file(str(file), bucket, key)

    @contextmanager
    def lock(self) -> Iterator[bool]:
        """Lock the folder until the block ends; yields whether this process is the only run of the schedule."""
        folder = Path(self.place)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / _LOCK_FILE).open("a+") as file:
            try:
                # The kernel releases the lock when the process ends, even if it is killed.
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            file.truncate(0)
            file.write(json.dumps(this_process()))
            file.flush()
            yield True
            file.truncate(0)

    def running_process(self) -> int | None:
        """The id of the process that holds the lock of the folder; None if no process holds it.

        This does not take the lock to test it: a run that begins at that moment would find the folder locked, and would
        be skipped.
        """
        file = Path(self.place) / _LOCK_FILE
        recorded: dict[str, Any] = json.loads(file.read_text() or "{}") if file.exists() else {}
        return recorded[PROCESS]["pid"] if is_running(recorded) else None

    @property
    def bucket_and_prefix(self) -> tuple[str, str]:
        """Bucket and key prefix of a place in S3."""
        bucket, _, prefix = self.place.removeprefix("s3://").partition("/")
        return bucket, prefix
