"""Checks ZenML's store before it is used: a database that has moved or is damaged, and artifacts whose files are gone."""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
from contextlib import closing, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import yaml
from filelock import FileLock

from llm_engineering.errors import RequestError
from llm_engineering.recipe.settings import check_folder

if TYPE_CHECKING:
    from zenml.models import ArtifactVersionResponse, StepRunResponse

logger = logging.getLogger("llm_engineering.run")

_SQLITE = "sqlite:///"
# File systems of disks. SQLite's log needs memory that its processes share, which a folder of several machines does not give.
_LOCAL = frozenset(["apfs", "bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "tmpfs", "xfs", "zfs"])


def open_database() -> None:
    """Check the database, and have ZenML make it if there is none.

    Other processes wait meanwhile. Two that make the same database at once disturb each other, and one of them fails.

    Raises:
        RequestError: as `check_database`.
    """
    from zenml.client import Client
    from zenml.utils.io_utils import get_global_config_directory

    folder = Path(get_global_config_directory())
    if not (folder / "config.yaml").is_file():
        check_folder(folder, "ZENML_CONFIG_PATH", "the environment")
    elif not os.access(folder, os.W_OK):
        # Settings that this user may only read are complete.
        check_database()
        return
    with FileLock(folder / "database.lock"):
        is_new = not (folder / "config.yaml").is_file()
        check_database()
        if is_new:
            _ = Client().zen_store
        database = _database(folder / "config.yaml")
        if database is not None and _is_on_this_machine(database):
            _log_ahead(database)


def check_database() -> None:
    """Check that the database that ZenML's settings name is there, and that it is one.

    ZenML would make a new, empty database in the place of one that has moved, and all runs and models would seem to be gone.

    Raises:
        RequestError: the file is missing or damaged, or it cannot be made. The message says what to do.
    """
    from zenml.utils.io_utils import get_global_config_directory

    config = Path(get_global_config_directory()) / "config.yaml"
    if not config.is_file():
        # ZenML makes its settings and a database.
        check_folder(config.parent, "ZENML_CONFIG_PATH", "the environment")
        return
    database = _database(config)
    if database is None:
        return
    if not database.is_file():
        raise RequestError(
            f"ZenML's database {database} does not exist, but {config} names it. If the folder has moved, correct the paths in that "
            f"file, or move the folder back. To start with an empty database, delete {config}."
        )
    problem = _problem(database)
    if problem:
        raise RequestError(
            f"ZenML's database {database} is damaged ({problem}). Replace it by a backup; or move it away together with {config}, "
            "to start with an empty one. The files of all artifacts are still in their folders."
        )


def _database(config: Path) -> Path | None:
    """The file of the database that ZenML's settings name; None for a server."""
    store = (yaml.safe_load(config.read_text(encoding="utf-8")) or {}).get("store") or {}
    url = str(store.get("url", ""))
    return Path(url.removeprefix(_SQLITE)) if url.startswith(_SQLITE) else None


def _is_on_this_machine(file: Path) -> bool:
    """Whether the file is on a disk of this machine, and not in a folder that machines share."""
    mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    return next((mounts[folder] in _LOCAL for folder in file.resolve().parents if folder in mounts), False)


def _log_ahead(database: Path) -> None:
    """Have SQLite write changes to a log beside the database first (https://sqlite.org/wal.html), now and in later processes.

    A commit then waits once for the disk, and not four times: 4 ms instead of 19 on the machine of the benchmarks. ZenML commits
    about 250 times in a run whose steps are all cached. What a commit has written is as safe as before.
    """
    # A database that another process is using is changed by a later command.
    with closing(sqlite3.connect(database, timeout=0)) as connection, suppress(sqlite3.OperationalError):
        connection.execute("PRAGMA journal_mode=WAL")


def _problem(database: Path) -> str:
    """What sqlite says about the structure of a damaged file; empty if it finds nothing, or if another process holds it."""
    connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=1)
    try:
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        pages = (
            connection.execute("PRAGMA page_count").fetchone()[0] * connection.execute("PRAGMA page_size").fetchone()[0]
        )
    except sqlite3.OperationalError:
        return ""
    except sqlite3.DatabaseError as error:
        return str(error)
    finally:
        connection.close()
    log = database.with_name(f"{database.name}-wal")
    if log.is_file() and log.stat().st_size:
        # Pages that are in the log only.
        return ""
    cut = pages - database.stat().st_size
    return f"{cut} bytes are missing at its end" if cut > 0 else ""


def forget_lost() -> None:
    """Mark the steps whose results have lost their files, so that a run repeats them and does not take them from the cache."""
    from zenml.client import Client
    from zenml.utils.pagination_utils import depaginate

    from steps.materializers import is_lost

    made_again: set[str] = set()
    for artifact in depaginate(Client().list_artifact_versions, size=1000):
        step_id = artifact.get_hydrated_version().producer_step_run_id if is_lost(artifact.uri) else None
        if step_id is not None and Client().get_run_step(step_id).cache_expires_at is None:
            Client().update_step_run(step_id, cache_expires_at=datetime.now(UTC).replace(tzinfo=None))
            made_again.add(artifact.artifact.name)
    if made_again:
        logger.warning(
            "Files of earlier runs are gone, and will be made again if needed: %s", ", ".join(sorted(made_again))
        )


def newest_stored(artifact: str, facts: list[str], **where: Any) -> ArtifactVersionResponse | None:
    """The newest version of an artifact with these facts in its metadata; None if there is none, or its files are lost."""
    from zenml.client import Client

    from steps.materializers import is_lost

    known = (
        Client()
        .list_artifact_versions(
            artifact=artifact, run_metadata=facts, sort_by="desc:created", size=1, hydrate=True, **where
        )
        .items
    )
    return known[0] if known and not is_lost(known[0].uri) else None


def remove_unregistered(step: StepRunResponse) -> None:
    """Remove the folders of outputs that a killed step has written, or begun to write, and not registered.

    They are found in an artifact store on this machine only.
    """
    from zenml.client import Client

    for folder in Path(Client().active_stack.artifact_store.path).glob(f"{step.name}/*/{step.id}"):
        if not any(Client().list_artifact_versions(uri=str(output), size=1).total for output in folder.glob("*")):
            # Another command may remove it too.
            shutil.rmtree(folder, ignore_errors=True)
