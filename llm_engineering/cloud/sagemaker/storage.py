"""Copies folders and the project's code to S3, named by their content, and a job's results back."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import logging
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from botocore.exceptions import ClientError

from llm_engineering.cloud.sagemaker.account import Account
from llm_engineering.cloud.sagemaker.request import CHECKPOINTS
from llm_engineering.errors import RequestError, WorkError

logger = logging.getLogger(__name__)


def folder_hash(folder: Path) -> str:
    """Sixteen hex digits for the names and contents of all files of a folder."""
    digest = hashlib.sha256()
    for path in _files(folder):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.relative_to(folder)}\0{content}\n".encode())
    return digest.hexdigest()[:16]


def upload_folder(account: Account, folder: Path, *place: str) -> str:
    """Put a folder's files below a place of their own, such as one named by their content; returns its address.

    What is there already with the same length is not sent again: an upload that was cut off goes on.
    """
    s3 = account.client("s3")
    prefix = account.key(*place)
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=account.bucket, Prefix=f"{prefix}/")
    there = {found["Key"]: found["Size"] for page in pages for found in page.get("Contents", ())}
    sent = 0
    for path in _files(folder):
        key = f"{prefix}/{path.relative_to(folder).as_posix()}"
        size = path.stat().st_size
        if there.get(key) != size:
            s3.upload_file(str(path), account.bucket, key, ExtraArgs=account.encryption)
            sent += size
    logger.info("Uploaded %.1f MiB to s3://%s/%s", sent / 2**20, account.bucket, prefix)
    # With the slash, so that no other place begins with it.
    return f"s3://{account.bucket}/{prefix}/"


def is_there(account: Account, uri: str) -> bool:
    """Whether there is an object at this address."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    try:
        account.client("s3").head_object(Bucket=bucket, Key=key)
    except ClientError as error:
        if error.response["ResponseMetadata"]["HTTPStatusCode"] != 404:
            raise
        return False
    return True


def fetch_results(account: Account, uri: str, name: str, output_dir: Path) -> Path:
    """Unpack a job's `model.tar.gz` into `output_dir/training/<name>`; returns that folder.

    Archives of trackers in it go where a run on this machine would have left them, and the report names them there.

    Raises:
        WorkError: it is no archive, or has no trained model in it.
    """
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    training = output_dir.resolve() / "training"
    training.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=training, prefix=f"{name}.partial-") as temporary:
        packed, unpacked = Path(temporary) / "model.tar.gz", Path(temporary) / name
        account.client("s3").download_file(bucket, key, str(packed))
        try:
            with tarfile.open(packed) as archive:
                archive.extractall(unpacked, filter="data")
        except tarfile.TarError as error:
            raise WorkError(f"The results of job {name}, {uri}, cannot be unpacked: {error}.") from error
        packed.unlink()
        report = unpacked / "report" / "report.json"
        if not report.is_file() or not (unpacked / "adapter").is_dir():
            raise WorkError(f"The results of job {name}, {uri}, have no trained model in them. Its log says why.")
        trackers = unpacked / "trackers"
        if trackers.is_dir():
            shutil.copytree(trackers, output_dir.resolve(), dirs_exist_ok=True)
            shutil.rmtree(trackers)
        final = training / name
        shutil.rmtree(final, ignore_errors=True)
        unpacked.rename(final)
    _rename_places(final / "report" / "report.json", output_dir.resolve())
    return final


def _rename_places(report: Path, output_dir: Path) -> None:
    """Let the report name trackers' archives where they are now."""
    summary = json.loads(report.read_text(encoding="utf-8"))
    for places in (summary["comet"], *summary["trackers"].values()):
        for kind, place in places.items():
            if place.startswith(f"{CHECKPOINTS}/"):
                places[kind] = str(output_dir / place.removeprefix(f"{CHECKPOINTS}/"))
    report.write_text(json.dumps(summary, indent=2), encoding="utf-8")


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


PROJECT_ROOT = Path(__file__).resolve().parents[3]


def upload_code(account: Account) -> str:
    """Put what git tracks, as it is on disk, in the bucket; the same code is there once. Returns its address.

    What git does not track, such as `.env`, stays here.

    Raises:
        RequestError: the project is no git checkout.
    """
    archive = code_archive(PROJECT_ROOT)
    key = account.key("code", f"{hashlib.sha256(archive).hexdigest()}.tar.gz")
    uri = f"s3://{account.bucket}/{key}"
    if not is_there(account, uri):
        account.client("s3").upload_fileobj(io.BytesIO(archive), account.bucket, key, ExtraArgs=account.encryption)
    return uri


def code_archive(root: Path) -> bytes:
    """The files that git tracks below `root` as a tar.gz; equal files give equal bytes.

    Raises:
        RequestError: it is no git checkout.
    """
    command = ["git", "-C", str(root), "ls-files", "-z"]
    try:
        listed = subprocess.run(command, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise RequestError(
            f"A job gets the files that git tracks, and {root} is no git checkout that git can read. "
            "Clone the project, or run `git init` and `git add` there."
        ) from error
    buffer = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for name in sorted(filter(None, listed.stdout.decode().split("\0"))):
            path = root / name
            # A file that is tracked and was deleted; the folder of a submodule.
            if not path.is_symlink() and not path.is_file():
                continue
            member = archive.gettarinfo(path, name)
            member.mtime, member.uid, member.gid, member.uname, member.gname = 0, 0, 0, "", ""
            member.mode = 0o755 if member.mode & 0o100 else 0o644
            if member.isfile():
                with path.open("rb") as file:
                    archive.addfile(member, file)
            else:
                archive.addfile(member)
    return buffer.getvalue()
