"""Finds the records of a dataset by its name: a file, a folder, or a dataset of the Hugging Face Hub.

The libraries for the hub and for folders are imported inside the functions: that takes a second, and files are read without.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from llm_engineering.data.reading.files import BrokenRecord, Record, has_known_ending, read_records, without_nan
from llm_engineering.errors import RequestError, WorkError
from llm_engineering.recipe.settings import Settings

# The owner, the name, and one of several configurations.
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
# Files that the library datasets writes beside the rows.
_BOOKKEEPING = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


class Reference(NamedTuple):
    """A dataset's name, the split after its `#`, and its path; `path` is None for a dataset of the hub."""

    name: str
    split: str | None
    path: Path | None


def open_records(reference: str) -> Iterator[Record | BrokenRecord]:
    """The records of a dataset, read one after the other.

    Raises:
        RequestError: the dataset is missing, damaged or in no known format, or it has several splits and the reference
            names none. If a file is damaged in the middle, the error is raised when the iterator reaches the damage.
        WorkError: the connection to the hub breaks while rows are read.
    """
    found = _resolve(reference)
    if found.path is None:
        return _hub_records(found)
    if not found.path.is_dir():
        if found.split is not None:
            raise RequestError(f"{found.path} is a file and has no splits: write it without #{found.split}.")
        return read_records(found.path)
    return (record for file in _folder_files(found, found.path) for record in read_records(file))


def dataset_hash(reference: str) -> str:
    """A text that changes when the dataset changes: a hash of its files, or its commit on the hub.

    Raises:
        RequestError: the dataset is missing or cannot be read.
    """
    found = _resolve(reference)
    if found.path is None:
        return _commit(found.name.partition(":")[0])
    digest = hashlib.sha256()
    try:
        for file in visible_files(found.path):
            # A single file has the same hash under any name. In a folder, names decide which split a file belongs to.
            digest.update(str(file.relative_to(found.path)).encode("utf-8", "surrogateescape") + b"\0")
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    except OSError as error:
        raise RequestError(f"{error.filename} cannot be read: {error.strerror}. Check its permissions.") from error
    return digest.hexdigest()[:16]


def dataset_files(reference: str) -> list[Path] | None:
    """The files of a dataset without hidden ones, in a fixed order; None for a dataset of the hub.

    Raises:
        RequestError: the dataset is missing.
    """
    root = _resolve(reference).path
    return None if root is None else visible_files(root)


def visible_files(root: Path) -> list[Path]:
    """The file itself, or the files in and below a folder, without hidden files and folders, sorted.

    Links to files that do not exist are among them, so that whoever opens them names them.
    """
    if not root.is_dir():
        return [root]
    files = (file for file in root.rglob("*") if file.is_file() or (file.is_symlink() and not file.exists()))
    return sorted(file for file in files if not any(part.startswith(".") for part in file.relative_to(root).parts))


def _resolve(reference: str) -> Reference:
    # The name of a file may contain a `#`.
    if (path := Path(reference).expanduser()).exists():
        return Reference(reference, None, path)
    name, mark, split = reference.rpartition("#")
    name, named_split = (name, split) if mark else (reference, None)
    path = Path(name).expanduser()
    if path.exists():
        return Reference(name, named_split, path)
    if _HUB_ID.fullmatch(name) and not has_known_ending(path) and not name.startswith("."):
        return Reference(name, named_split, None)
    raise RequestError(
        f"There is no file {name}. Check the path; it is relative to the current folder. Write a dataset on "
        "the hub as owner/name."
    )


def _folder_files(found: Reference, folder: Path) -> Sequence[Path]:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _saved_files(found, folder)
    from datasets import load_dataset_builder

    try:
        # `datasets` derives the splits from the names of the files, or from the folder's README.
        data_files = load_dataset_builder(str(folder.resolve())).config.data_files
    except (OSError, ValueError) as error:
        raise RequestError(
            f"{folder} is a folder in which `datasets` finds no dataset ({str(error).splitlines()[0]}): name a file, "
            "or a folder with .json, .jsonl, .csv, .parquet or .arrow files."
        ) from error
    splits = {str(split): [Path(file) for file in files] for split, files in (data_files or {}).items()}
    used = {file.resolve() for files in splits.values() for file in files}
    for file in visible_files(folder):
        if has_known_ending(file) and file.name not in _BOOKKEEPING and file.resolve() not in used:
            raise RequestError(
                f"{folder} also holds {file.relative_to(folder)}, which `datasets` leaves out when it reads the folder: "
                "move it elsewhere, or name one file instead of the folder."
            )
    return splits[_one_split(found, list(splits))]


def _saved_files(found: Reference, folder: Path) -> Sequence[Path]:
    from datasets import load_from_disk

    try:
        saved = load_from_disk(str(folder), keep_in_memory=False)
    except (OSError, ValueError, KeyError) as error:
        raise RequestError(
            f"{folder} looks like a dataset that `datasets` saved, but it cannot be read "
            f"({str(error).splitlines()[0]}): save it again."
        ) from error
    splits = saved.cache_files if isinstance(saved.cache_files, dict) else {"": saved.cache_files}
    if "" in splits and found.split is not None:
        raise RequestError(f"{folder} is a dataset without splits: write it without #{found.split}.")
    split = "" if "" in splits else _one_split(found, list(splits))
    return [Path(file["filename"]) for file in splits[split]]


def _one_split(found: Reference, splits: Sequence[str]) -> str:
    choices = " or ".join(f"{found.name}#{split}" for split in splits)
    if found.split is None and len(splits) > 1:
        raise RequestError(f"{found.name} has {len(splits)} splits: write {choices}.")
    if found.split is not None and found.split not in splits:
        raise RequestError(f"{found.name} has no split {found.split}: write {choices}.")
    return found.split or splits[0]


def _token() -> str | None:
    token = Settings().hf_token
    return token.get_secret_value() if token else None


def _commit(name: str) -> str:
    from huggingface_hub import HfApi

    try:
        return str(HfApi(token=_token()).dataset_info(name).sha)
    except _hub_errors() as error:
        raise _unreachable(name, error) from error


def _hub_records(found: Reference) -> Iterator[Record | BrokenRecord]:
    from datasets import load_dataset

    name, _, configuration = found.name.partition(":")
    try:
        splits = load_dataset(name, configuration or None, streaming=True, revision=_commit(name), token=_token())
        rows = splits[_one_split(found, list(splits))]
    except _hub_errors() as error:
        raise _unreachable(found.name, error) from error
    place = 0
    try:
        for place, row in enumerate(rows, start=1):
            yield Record(without_nan(dict(row)), found.name, f"row {place}")
    except _hub_errors() as error:
        raise WorkError(
            f"Reading {found.name} from the hub broke off after row {place} ({str(error).splitlines()[0]}). Run the "
            "command again, or download the files and name their folder."
        ) from error


def _hub_errors() -> tuple[type[Exception], ...]:
    import httpx

    return OSError, ValueError, httpx.HTTPError


def _unreachable(name: str, error: Exception) -> RequestError:
    # The second line lists the configurations.
    problem = " ".join((str(error) or type(error).__name__).splitlines()[:2])
    return RequestError(
        f"{name} is no file or folder here, and it cannot be read from the hub: {problem} Check the name and, "
        "for a private dataset, HF_TOKEN; one of several configurations is named as owner/name:configuration; without a "
        "network, download the files elsewhere and name their folder."
    )
