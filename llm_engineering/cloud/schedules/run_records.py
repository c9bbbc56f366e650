"""What became of each run that a schedule started: one JSON file each, in a folder or in S3."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import boto3
import psutil
from pydantic import BaseModel, ConfigDict

# The environment of a scheduled training job holds its name here.
JOB_VARIABLE = "LLM_SCHEDULED_JOB"

_LOCK_FILE = "lock"
# These judged a model by the gate: the same data again would end the same way.
_COMPLETED = ("promoted", "staged", "gate failed")


def job_prefix(schedule: str) -> str:
    """What the names of a schedule's jobs begin with, and no other's: a schedule's name has no two hyphens in a row."""
    return f"{schedule}--"


class RunRecord(BaseModel):
    """A run of a schedule.

    Attributes:
        run: the training job's name; for a run on this machine its time and process.
        ended: None while it runs, or if nobody was left to say how it ended.
        reason: which rule failed, what was raised, why nothing ran.
        run_id: of the ZenML run; None if it never began.
        version: of the model.
        fingerprint: of what the run would read and do; None if it ended before that was known.
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
        """The outcome in words: `promoted: version 4`, `skipped: no new data`, `failed: …`."""
        return f"{self.outcome}: {self.reason}" if self.reason else self.outcome

    @property
    def is_complete(self) -> bool:
        """Whether the run went through the whole chain to a judgement."""
        return self.outcome in _COMPLETED


class Place:
    """Where a schedule keeps what belongs to it: a folder, or `s3://bucket/prefix`. Its last part is the schedule's name."""

    def __init__(self, place: str) -> None:
        self.place = place.rstrip("/")
        self.in_s3 = place.startswith("s3://")

    @property
    def schedule(self) -> str:
        """The schedule's name."""
        return self.place.rpartition("/")[2]

    def write(self, record: RunRecord) -> None:
        """Keep a record, in place of a former one of the same run."""
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

    def records(self, s3: Any = None) -> list[RunRecord]:
        """All records, the newest first. `s3` is a boto3 client, where the default one is not meant."""
        if self.in_s3:
            s3 = s3 or boto3.client("s3")
            bucket, prefix = self.bucket_and_prefix
            pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/runs/")
            keys = [item["Key"] for page in pages for item in page.get("Contents", [])]
            texts = [s3.get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys]
        else:
            texts = [file.read_bytes() for file in (Path(self.place) / "runs").glob("*.json")]
        found = [RunRecord.model_validate_json(text) for text in texts]
        return sorted(found, key=lambda record: record.began, reverse=True)

    @contextmanager
    def kept(self, file: Path) -> Iterator[None]:
        """Let a file outlive the machine of a job: it is there before the work, and in S3 after it, however that ends.

        What is on the machine already is newer, for it comes from the job's checkpoints. In a folder nothing is done.
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
        """Whether this process is the only run of the schedule; of a folder."""
        folder = Path(self.place)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / _LOCK_FILE).open("a+") as file:
            try:
                # The kernel lets go of it when the process ends, however that comes about.
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield True
            file.truncate(0)

    def running_process(self) -> int | None:
        """The process that holds the lock of a folder; None if none does. It is not asked by locking, which would make a
        run that begins just then believe that it is the second."""
        file = Path(self.place) / _LOCK_FILE
        try:
            process = psutil.Process(int(file.read_text() or 0))
            # A number alone is given again to other processes.
            holds = process.create_time() <= file.stat().st_mtime + 1 and process.status() != psutil.STATUS_ZOMBIE
        except (FileNotFoundError, psutil.NoSuchProcess):
            return None
        return process.pid if holds else None

    @property
    def bucket_and_prefix(self) -> tuple[str, str]:
        """Of a place in S3."""
        bucket, _, prefix = self.place.removeprefix("s3://").partition("/")
        return bucket, prefix
