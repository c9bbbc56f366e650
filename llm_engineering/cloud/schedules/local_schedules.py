"""Schedules of this machine: a systemd user timer, or a line in the user's crontab if systemd does not answer.

A schedule's folder holds its recipe, its log and the records of its runs.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal
from zoneinfo import ZoneInfo

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from llm_engineering.cloud.schedules import crontab, systemd
from llm_engineering.cloud.schedules.cron import Entry, Timing, crontab_fields, on_calendar
from llm_engineering.cloud.schedules.run_records import Place, RunRecord
from llm_engineering.errors import RequestError, WorkError

RECIPE_FILE = "recipe.json"
LOG_FILE = "log.txt"
_STATE_FILE = "schedule.json"
# Seconds that a run has to save a checkpoint after SIGTERM.
_STOP_S = 600.0
_SCHEDULERS: dict[str, Any] = {"systemd": systemd, "cron": crontab}


class LocalSchedule(BaseModel):
    """A schedule of this machine.

    Attributes:
        scheduler: the program that starts the runs: systemd or cron.
        directory: the working directory of the runs.
        environment: variables of the runs, added to those that the scheduler sets.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    timing: Timing
    # In files of version 0.1 this key is `keeper`.
    scheduler: Literal["systemd", "cron"] = Field(validation_alias=AliasChoices("scheduler", "keeper"))
    created: datetime
    folder: Path
    directory: Path
    environment: dict[str, str]

    @property
    def place(self) -> Place:
        """The folder, as the place of the run records."""
        return Place(str(self.folder))

    @property
    def command(self) -> list[str]:
        """The command of a run."""
        recipe, place = str(self.folder / RECIPE_FILE), str(self.folder)
        return [sys.executable, "-m", "tools.cli", "run", "retrain", "--config", recipe, "--scheduled", place]

    @property
    def entry(self) -> Entry:
        """What the scheduler gets. Its name is that of the systemd timer, or of the comment that marks the crontab line."""
        log, name = self.folder / LOG_FILE, f"llm-engineering-{self.name}"
        return Entry(name, self.timing, self.command, self.directory, self.environment, log)


def scheduler() -> Literal["systemd", "cron"]:
    """The program that starts the runs: systemd or cron.

    Raises:
        RequestError: there is neither systemd nor a crontab.
    """
    if systemd.is_there():
        return "systemd"
    if shutil.which("crontab") is None:
        raise RequestError(
            "Nothing here can keep a schedule: systemd does not answer for this user, and there is no crontab. Log in with "
            "a session of your own (not by su or sudo), or install cron."
        )
    return "cron"


def timezone() -> str:
    """The IANA name of this machine's timezone.

    Raises:
        RequestError: the timezone has no name.
    """
    named = os.environ.get("TZ", "").lstrip(":")
    place = Path(named or "/etc/localtime")
    if named and not place.is_absolute():
        return named
    if not place.exists():
        return "UTC"
    _, _, name = str(place.resolve()).partition("/zoneinfo/")
    if not name:
        raise RequestError(
            f"{place} does not tell the name of the timezone: set it, for example TIMEZONE=Europe/Berlin."
        )
    return name


def check(timing: Timing, scheduler: Literal["systemd", "cron"], now: datetime) -> None:
    """Check that the scheduler can run this schedule, before anything is written.

    Raises:
        RequestError: the scheduler cannot express the time, or is a crontab and the timezone differs from the machine's.
    """
    if scheduler == "systemd":
        on_calendar(timing)
        return
    crontab_fields(timing)
    days = [now + timedelta(days=30 * month) for month in range(12)]
    zone = ZoneInfo(timing.timezone)
    if any(day.astimezone().utcoffset() != day.astimezone(zone).utcoffset() for day in days):
        raise RequestError(
            f"A crontab uses the timezone of this machine, {timezone()}, not {timing.timezone}: leave TIMEZONE out, and give "
            "the time of this machine."
        )


def write(schedule: LocalSchedule, recipe: str | None, paused: bool) -> None:
    """Create or replace a schedule.

    Args:
        recipe: the recipe as JSON; None keeps the recipe of the existing schedule.

    Raises:
        WorkError: systemd or cron fails.
    """
    schedule.folder.mkdir(parents=True, exist_ok=True)
    if recipe is not None:
        (schedule.folder / RECIPE_FILE).write_text(recipe, encoding="utf-8")
    _SCHEDULERS[schedule.scheduler].write(schedule.entry, paused)
    # Written last, so a listed schedule is always complete.
    (schedule.folder / _STATE_FILE).write_text(schedule.model_dump_json(indent=1), encoding="utf-8")


def list_all(folder: Path) -> list[LocalSchedule]:
    """All schedules below a folder, by name."""
    files = sorted(folder.glob(f"*/{_STATE_FILE}"))
    return [LocalSchedule.model_validate_json(file.read_bytes()) for file in files]


def get(folder: Path, name: str) -> LocalSchedule:
    """A schedule by its name.

    Raises:
        RequestError: there is no schedule of this name.
    """
    file = folder / name / _STATE_FILE
    if not file.is_file():
        raise RequestError(f"There is no schedule {name} on this machine. `make schedules` lists them.")
    return LocalSchedule.model_validate_json(file.read_bytes())


def state(schedule: LocalSchedule) -> Literal["active", "paused", "lost"]:
    """Whether the scheduler starts its runs; `lost` if its timer or crontab line was removed in another way."""
    found: Literal["active", "paused", "lost"] = _SCHEDULERS[schedule.scheduler].state(schedule.entry.name)
    return found


def set_paused(schedule: LocalSchedule, paused: bool) -> None:
    """Stop the scheduler from starting runs, or let it start them again."""
    _SCHEDULERS[schedule.scheduler].set_paused(schedule.entry.name, paused)


def run_now(schedule: LocalSchedule) -> int:
    """Start a run now, in a new session; returns its process id."""
    with (schedule.folder / LOG_FILE).open("ab") as log:
        process = subprocess.Popen(
            schedule.command,
            cwd=schedule.directory,
            env={**os.environ, **schedule.environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    return process.pid


def runs(schedule: LocalSchedule, limit: int) -> list[RunRecord]:
    """The records of the last runs, the newest first. A run whose process was killed is listed as failed."""
    process = schedule.place.running_process()
    records = sorted(schedule.place.records(), key=lambda record: record.began, reverse=True)
    killed = {"outcome": "failed", "reason": "killed: its process ended without a verdict"}
    return [
        record.model_copy(update=killed)
        if record.outcome == "running" and not record.run.endswith(f"-{process}")
        else record
        for record in records[:limit]
    ]


def remove(schedule: LocalSchedule, stop: bool) -> None:
    """Remove the schedule's timer or crontab line, and its folder.

    Args:
        stop: whether to end a run in progress, which saves a checkpoint first.

    Raises:
        RequestError: a run is in progress, and `stop` is false; the schedule is then paused.
        WorkError: the run does not end.
    """
    if state(schedule) == "active":
        set_paused(schedule, True)
    process = schedule.place.running_process()
    if process is not None and not stop:
        raise RequestError(
            f"{schedule.name} is paused, but its run, process {process}, is in progress: wait until it ends, or stop it and "
            f"remove everything with `make unschedule TARGET=local NAME={schedule.name} ARGS=--stop`."
        )
    if process is not None:
        os.kill(process, signal.SIGTERM)
        deadline = time.monotonic() + _STOP_S
        while schedule.place.running_process() is not None:
            if time.monotonic() > deadline:
                raise WorkError(
                    f"The run, process {process}, does not end. Run the same command again when it has ended."
                )
            time.sleep(0.2)
    _SCHEDULERS[schedule.scheduler].remove(schedule.entry.name)
    shutil.rmtree(schedule.folder)
