"""What travels to a job on another machine, and back: the project's code, the description of the work, the results."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path

from llm_engineering.errors import RequestError, WorkError
from llm_engineering.training.processes.job import Job

PROJECT_ROOT = Path(__file__).resolve().parents[2]
# What the results of a training stage contain.
TRAINED = ("report/report.json", "adapter")


def training_command(processes: int, machines: int, job: str, results: str) -> list[str]:
    """The command of local training, with the job's file. If there are several processes, torchrun starts them.

    Args:
        processes: on all machines together.
        job: the path of the file that `job_on_machine` describes.
        results: the folder for TRAINED.
    """
    torchrun = ["torch.distributed.run", "--nproc-per-node", str(processes // machines), "-m"]
    training = ["llm_engineering.training", "--job", job, "--output", results]
    return ["python", "-m", *(torchrun if processes > 1 else []), *training]


def job_on_machine(job: Job, inputs: str, model: str | None) -> Job:
    """A job with the places of its inputs on the machine that does it.

    Args:
        inputs: the folder there with `data`, and `start` and `reward_model` if the job has them.
        model: the base model's folder there; None if the machine downloads the model.
    """
    setup = job.setup.model_copy(update={"compute": job.setup.compute.in_job})
    if model is not None:
        setup = setup.model_copy(update={"model": setup.model.model_copy(update={"name_or_path": model})})
    read = ["data", *(name for name in ("start", "reward_model") if getattr(job, name) is not None)]
    return job.model_copy(update={"setup": setup, **{name: Path(inputs, name) for name in read}})


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


def files(folder: Path) -> list[Path]:
    """All files below a folder, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def folder_hash(folder: Path) -> str:
    """Hash the names and contents of all files of a folder into 16 hex digits."""
    digest = hashlib.sha256()
    for path in files(folder):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.relative_to(folder)}\0{content}\n".encode())
    return digest.hexdigest()[:16]


def unpack_archive(packed: Path, folder: Path, wanted: Iterable[str], origin: str) -> Path:
    """Unpack the results of a job into a folder, which is replaced; returns it.

    Args:
        packed: a tar archive, perhaps compressed.
        wanted: files and folders that it must contain.
        origin: names the archive in an error.

    Raises:
        WorkError: the file is not an archive, or lacks something that is wanted.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.partial-") as temporary:
        unpacked = Path(temporary, folder.name)
        try:
            with tarfile.open(packed) as archive:
                archive.extractall(unpacked, filter="data")
        except tarfile.TarError as error:
            raise WorkError(f"The results of {origin} cannot be unpacked: {error}.") from error
        lacking = [path for path in wanted if not (unpacked / path).exists()]
        if lacking:
            raise WorkError(
                f"The results of {origin} do not contain {' and '.join(lacking)}. The log of the job shows why."
            )
        shutil.rmtree(folder, ignore_errors=True)
        unpacked.rename(folder)
    return folder


def take_over(folder: Path, outputs: str, output_dir: Path) -> None:
    """Move the trackers' archives of unpacked results to the folders that a local run uses, and write their paths to the report.

    Args:
        outputs: the folder of the outputs on the machine of the job.
    """
    trackers, report = folder / "trackers", folder / "report" / "report.json"
    if trackers.is_dir():
        shutil.copytree(trackers, output_dir, dirs_exist_ok=True)
        shutil.rmtree(trackers)
    summary = json.loads(report.read_text(encoding="utf-8"))
    for places in (summary["comet"], *summary["trackers"].values()):
        for kind, place in places.items():
            if place.startswith(f"{outputs}/"):
                places[kind] = str(output_dir / place.removeprefix(f"{outputs}/"))
    report.write_text(json.dumps(summary, indent=2), encoding="utf-8")


def rename_base(config: Path, name_or_path: str) -> None:
    """Write the recipe's name of the base model into an adapter's configuration, in place of the path on another machine."""
    if config.is_file():
        values = json.loads(config.read_text(encoding="utf-8")) | {"base_model_name_or_path": name_or_path}
        config.write_text(json.dumps(values, indent=2, sort_keys=True), encoding="utf-8")
