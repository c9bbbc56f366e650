"""Uploads folders and the project's code to S3, named by their content, and downloads a job's results."""

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
from collections.abc import Iterable
from pathlib import Path

from botocore.exceptions import ClientError

from llm_engineering.cloud.sagemaker.account import Account
from llm_engineering.cloud.sagemaker.request import CHECKPOINTS
from llm_engineering.errors import RequestError, WorkError

logger = logging.getLogger(__name__)

PROJECT_ROOT = Path(__file__).resolve().parents[3]


def folder_hash(folder: Path) -> str:
    """Hash the names and contents of all files of a folder into 16 hex digits."""
    digest = hashlib.sha256()
    for path in _files(folder):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.relative_to(folder)}\0{content}\n".encode())
    return digest.hexdigest()[:16]


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
    for path in _files(folder):
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
    final = unpack(account, uri, name, output_dir.resolve() / "training", ["report/report.json", "adapter"])
    trackers = final / "trackers"
    if trackers.is_dir():
        shutil.copytree(trackers, output_dir.resolve(), dirs_exist_ok=True)
        shutil.rmtree(trackers)
    _replace_container_paths(final / "report" / "report.json", output_dir.resolve())
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
    with tempfile.TemporaryDirectory(dir=parent, prefix=f"{name}.partial-") as temporary:
        packed, unpacked = Path(temporary) / "model.tar.gz", Path(temporary) / name
        account.client("s3").download_file(bucket, key, str(packed))
        try:
            with tarfile.open(packed) as archive:
                archive.extractall(unpacked, filter="data")
        except tarfile.TarError as error:
            raise WorkError(f"The results of job {name}, {uri}, cannot be unpacked: {error}.") from error
        packed.unlink()
        lacking = [path for path in wanted if not (unpacked / path).exists()]
        if lacking:
            raise WorkError(
                f"The results of job {name}, {uri}, do not contain {' and '.join(lacking)}. The log of the job shows why."
            )
        final = parent / name
        shutil.rmtree(final, ignore_errors=True)
        unpacked.rename(final)
    return final


def _replace_container_paths(report: Path, output_dir: Path) -> None:
    """Replace the paths of the trackers' archives in a report by their paths on this machine."""
    summary = json.loads(report.read_text(encoding="utf-8"))
    for places in (summary["comet"], *summary["trackers"].values()):
        for kind, place in places.items():
            if place.startswith(f"{CHECKPOINTS}/"):
                places[kind] = str(output_dir / place.removeprefix(f"{CHECKPOINTS}/"))
    report.write_text(json.dumps(summary, indent=2), encoding="utf-8")


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


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


def code_archive(root: Path) -> bytes:
    """Pack the files that git tracks below `root` as tar.gz; equal files give equal bytes.

    Raises:
        RequestError: `root` is not a git checkout.
    """
    buffer = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for name in _tracked(root):
            path = root / name
            member = archive.gettarinfo(path, name)
            member.mtime, member.uid, member.gid, member.uname, member.gname = 0, 0, 0, "", ""
            member.mode = 0o755 if member.mode & 0o100 else 0o644
            if member.isfile():
                with path.open("rb") as file:
                    archive.addfile(member, file)
            else:
                archive.addfile(member)
    return buffer.getvalue()


def code_hash(root: Path, *places: str) -> str:
    """Hash the code that a job runs into 16 hex digits: the tracked files of the library and of other `places`.

    Raises:
        RequestError: `root` is not a git checkout.
    """
    digest = hashlib.sha256()
    for name in _tracked(root, "llm_engineering", *places):
        digest.update(f"{name}\0{hashlib.sha256((root / name).read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:16]


def _tracked(root: Path, *places: str) -> list[str]:
    """The names of the files that git tracks below `root`, or only those in some of its folders, as they are on disk."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--", *places]
    try:
        listed = subprocess.run(command, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise RequestError(
            f"{root} is not a git checkout, but a job gets the files that git tracks. Clone the project, or run `git init` "
            "and `git add` there."
        ) from error
    names = sorted(filter(None, listed.stdout.decode().split("\0")))
    # Skip tracked files that were deleted, and folders of submodules.
    return [name for name in names if (root / name).is_symlink() or (root / name).is_file()]
