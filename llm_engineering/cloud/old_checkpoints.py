"""Deletes checkpoints from S3 that training has deleted from the job's disk.

SageMaker copies new files of the folder to S3, and never deletes any there. So every checkpoint of a run would stay, and a
job that starts again after an interruption would download all of them.
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import boto3
from botocore.exceptions import BotoCoreError, ClientError

from llm_engineering.training.trainer.checkpoints import PARTIAL

# Environment variable with the address to which SageMaker copies the folder of the checkpoints.
CHECKPOINTS_URI = "LLM_CHECKPOINTS_URI"
_PAUSE_S = 60.0
_NAME = re.compile(r"checkpoint-(\d+)")


@contextmanager
def deleting_old_checkpoints(uri: str | None, folder: Path) -> Iterator[None]:
    """Delete old checkpoints every minute until the block ends. Without an address, nothing is deleted.

    An error never ends the job. It is printed, and the next attempt is a minute later; a missing permission ends this work.
    """
    if uri is None:
        yield
        return
    ended = threading.Event()

    def work() -> None:
        while not ended.wait(_PAUSE_S):
            try:
                delete_old_checkpoints(boto3.client("s3"), uri, folder)
            except (BotoCoreError, ClientError) as error:
                if isinstance(error, ClientError) and error.response["Error"]["Code"] == "AccessDenied":
                    remedy = "The job's role needs s3:DeleteObject."
                    print(f"Old checkpoints stay in {uri}: {error}. {remedy}", file=sys.stderr)
                    return
                print(f"Old checkpoints stay in {uri} until the next attempt: {error}", file=sys.stderr)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def delete_old_checkpoints(s3: Any, uri: str, folder: Path) -> None:
    """Delete the checkpoints that are not in the folder, if S3 has all files of a newer one that is.

    Args:
        uri: the address of the folder's copy in S3.
    """
    bucket, _, prefix = uri.rstrip("/").removeprefix("s3://").partition("/")
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/")
    sizes = {
        PurePosixPath(found["Key"].removeprefix(f"{prefix}/")): found["Size"]
        for page in pages
        for found in page.get("Contents", ())
    }
    checkpoints = {parent for path in sizes for parent in path.parents if _NAME.fullmatch(parent.name)}
    # The newest complete checkpoint of each run: the run continues from it if the machine is taken away now.
    newest: dict[PurePosixPath, int] = {}
    for checkpoint in checkpoints:
        if checkpoint.parent.name != PARTIAL and _is_copied(checkpoint, folder, sizes):
            newest[checkpoint.parent] = max(_number(checkpoint), newest.get(checkpoint.parent, 0))
    for checkpoint in checkpoints:
        run = checkpoint.parent.parent if checkpoint.parent.name == PARTIAL else checkpoint.parent
        if _number(checkpoint) <= newest.get(run, -1) and not (folder / checkpoint).exists():
            for path in sizes:
                if path.is_relative_to(checkpoint):
                    s3.delete_object(Bucket=bucket, Key=f"{prefix}/{path}")


def _is_copied(checkpoint: PurePosixPath, folder: Path, sizes: dict[PurePosixPath, int]) -> bool:
    """Whether a checkpoint is in the folder, and S3 has all its files with their sizes."""
    try:
        here = {path: path.stat().st_size for path in (folder / checkpoint).rglob("*") if path.is_file()}
    except FileNotFoundError:
        # Training has just deleted it.
        return False
    return bool(here) and all(sizes.get(PurePosixPath(path.relative_to(folder))) == size for path, size in here.items())


def _number(checkpoint: PurePosixPath) -> int:
    return int(checkpoint.name.partition("-")[2])
