"""The project's code as one archive in S3, named by its content and uploaded once."""

from __future__ import annotations

import gzip
import hashlib
import io
import subprocess
import tarfile
from pathlib import Path

from llm_engineering.compute.sagemaker.account import Account
from llm_engineering.compute.sagemaker.storage import is_there
from llm_engineering.errors import RequestError

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
