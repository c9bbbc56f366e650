"""Uploads folders and the project's code to S3, named by their content, and downloads a job's results."""

from __future__ import annotations

import hashlib
import io
import logging
import tempfile
from collections.abc import Iterable
from pathlib import Path

from botocore.exceptions import ClientError

from llm_engineering.cloud.package import PROJECT_ROOT, TRAINED, code_archive, files, take_over, unpack_archive
from llm_engineering.cloud.sagemaker.account import Account
from llm_engineering.cloud.sagemaker.request import CHECKPOINTS

logger = logging.getLogger(__name__)


def upload_folder(account: Account, folder: Path, *place: str) -> str:
    """Upload a folder's files below the key `<prefix>/<place>/`; returns that address.

    Files that S3 already has with the same length are skipped, so an interrupted upload can be resumed. `place` must
    therefore contain a hash of the folder.
    """
    s3 = account.client("s3")
    prefix = account.key(*place)
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=account.bucket, Prefix=f"{prefix}/")
    sizes = {item["Key"]: item["Size"] for page in pages for item in page.get("Contents", ())}
    sent = 0
    for path in files(folder):
        key = f"{prefix}/{path.relative_to(folder).as_posix()}"
        size = path.stat().st_size
        if sizes.get(key) != size:
            s3.upload_file(str(path), account.bucket, key, ExtraArgs=account.encryption)
            sent += size
    logger.info("Uploaded %.1f MiB to s3://%s/%s", sent / 2**20, account.bucket, prefix)
    # The slash excludes other folders whose names begin with this one.
    return f"s3://{account.bucket}/{prefix}/"


def is_there(account: Account, uri: str) -> bool:
    """Whether S3 has an object at this address."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    try:
        account.client("s3").head_object(Bucket=bucket, Key=key)
    except ClientError as error:
        if error.response["ResponseMetadata"]["HTTPStatusCode"] != 404:
            raise
        return False
    return True


def fetch_results(account: Account, uri: str, name: str, output_dir: Path) -> Path:
    """Unpack a training job's `model.tar.gz` into `output_dir/training/<name>`; returns that folder.

    The trackers' archives are moved to the folders that a local run uses, and their new paths are written to the report.

    Raises:
        WorkError: see `unpack`.
    """
    final = unpack(account, uri, name, output_dir.resolve() / "training", TRAINED)
    take_over(final, CHECKPOINTS, output_dir.resolve())
    return final


def unpack(account: Account, uri: str, name: str, parent: Path, wanted: Iterable[str]) -> Path:
    """Unpack a job's `model.tar.gz` into `parent/<name>`; returns that folder.

    Args:
        wanted: files and folders that it must contain.

    Raises:
        WorkError: the file is not an archive, or lacks something that is wanted.
    """
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=parent, prefix=f"{name}.partial-") as packed:
        account.client("s3").download_file(bucket, key, packed.name)
        return unpack_archive(Path(packed.name), parent / name, wanted, f"job {name}, {uri},")


def upload_code(account: Account) -> str:
    """Upload the files that git tracks, as they are on disk, unless S3 has the same code; returns the address.

    Untracked files, such as `.env`, are not uploaded.

    Raises:
        RequestError: the project is not a git checkout.
    """
    archive = code_archive(PROJECT_ROOT)
    key = account.key("code", f"{hashlib.sha256(archive).hexdigest()}.tar.gz")
    uri = f"s3://{account.bucket}/{key}"
    if not is_there(account, uri):
        account.client("s3").upload_fileobj(io.BytesIO(archive), account.bucket, key, ExtraArgs=account.encryption)
    return uri
