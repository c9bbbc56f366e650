"""Schedules of this machine, kept by a systemd user timer, or where there is none by a line in the user's crontab.

A schedule's folder holds its recipe, its log and what became of its runs.
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

from pydantic import BaseModel, ConfigDict

from llm_engineering.cloud.schedules import crontab, systemd
from llm_engineering.cloud.schedules.cron import Timing, crontab_fields, on_calendar
from llm_engineering.cloud.schedules.run_records import Place, RunRecord
from llm_engineering.errors import RequestError, WorkError

RECIPE_FILE = "recipe.json"
LOG_FILE = "log.txt"
_STATE_FILE = "schedule.json"
# A run saves a checkpoint before it ends.
_STOP_S = 600.0
_KEEPERS: dict[str, Any] = {"systemd": systemd, "cron": crontab}


class LocalSchedule(BaseModel):
    """A schedule of this machine.

    Attributes:
        keeper: what starts it.
        folder: what belongs to it.
        directory: where the run is started.
        environment: of the run, besides what the keeper gives.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    timing: Timing
    keeper: Literal["systemd", "cron"]
    created: datetime
    folder: Path
    directory: Path
    environment: dict[str, str]

    @property
    def place(self) -> Place:
        """Where its runs are kept."""
        return Place(str(self.folder))

    @property
    def command(self) -> list[str]:
        """What is started."""
        recipe, place = str(self.folder / RECIPE_FILE), str(self.folder)
        return [sys.executable, "-m", "tools.cli", "run", "retrain", "--config", recipe, "--scheduled", place]

    @property
    def kept_as(self) -> str:
        """Its name with the keeper."""
        return f"llm-engineering-{self.name}"


def keeper() -> Literal["systemd", "cron"]:
    """What can start schedules here.

    Raises:
        RequestError: nothing can.
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
        RequestError: it does not say.
    """
    named = os.environ.get("TZ", "").lstrip(":")
    place = Path(named or "/etc/localtime")
    if named and not place.is_absolute():
        return named
    if not place.exists():
        return "UTC"
    _, _, name = str(place.resolve()).partition("/zoneinfo/")
    if not name:
        raise RequestError(f"{place} does not say which timezone it is: name it with TIMEZONE=Europe/Berlin.")
    return name


def check(timing: Timing, keeper: Literal["systemd", "cron"], now: datetime) -> None:
    """See that the keeper can keep the time, before anything is written.

    Raises:
        RequestError: it cannot say the expression, or has no timezones.
    """
    if keeper == "systemd":
        on_calendar(timing)
        return
    crontab_fields(timing)
    days = [now + timedelta(days=30 * month) for month in range(12)]
    zone = ZoneInfo(timing.timezone)
    if any(day.astimezone().utcoffset() != day.astimezone(zone).utcoffset() for day in days):
        raise RequestError(
            f"A crontab keeps the time of this machine, {timezone()}, and not that of {timing.timezone}: leave TIMEZONE out, "
            "and say the time of this machine."
        )


def write(schedule: LocalSchedule, recipe: str | None, paused: bool) -> None:
    """Make a schedule, or one anew that is there, with its recipe as JSON; None leaves the one that is there.

    Raises:
        WorkError: systemd or cron refuses.
    """
    schedule.folder.mkdir(parents=True, exist_ok=True)
    if recipe is not None:
        (schedule.folder / RECIPE_FILE).write_text(recipe, encoding="utf-8")
    _KEEPERS[schedule.keeper].write(
        schedule.kept_as,
        schedule.timing,
        schedule.command,
        schedule.directory,
        schedule.environment,
        schedule.folder / LOG_FILE,
        paused,
    )
    # Last: what is listed is there.
    (schedule.folder / _STATE_FILE).write_text(schedule.model_dump_json(indent=1), encoding="utf-8")


def list_all(folder: Path) -> list[LocalSchedule]:
    """All schedules below a folder."""
    files = sorted(folder.glob(f"*/{_STATE_FILE}"))
    return [LocalSchedule.model_validate_json(file.read_bytes()) for file in files]


def get(folder: Path, name: str) -> LocalSchedule:
    """A schedule by its name.

    Raises:
        RequestError: there is none.
    """
    file = folder / name / _STATE_FILE
    if not file.is_file():
        raise RequestError(f"There is no schedule {name} on this machine. `make schedules` lists them.")
    return LocalSchedule.model_validate_json(file.read_bytes())


def state(schedule: LocalSchedule) -> Literal["active", "paused", "lost"]:
    """Whether its keeper starts it; lost if somebody else removed the timer or the line."""
    found: Literal["active", "paused", "lost"] = _KEEPERS[schedule.keeper].state(schedule.kept_as)
    return found


def set_paused(schedule: LocalSchedule, paused: bool) -> None:
    """Let it fire no more, or again."""
    _KEEPERS[schedule.keeper].set_paused(schedule.kept_as, paused)


def run_now(schedule: LocalSchedule) -> int:
    """Start what it starts, now, apart from this process. Returns the process's number."""
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
    """The last runs, the newest first; one whose process was killed before it could say so is told as that."""
    process = schedule.place.running_process()
    killed = {"outcome": "failed", "reason": "killed: its process ended without a word"}
    return [
        record.model_copy(update=killed)
        if record.outcome == "running" and not record.run.endswith(f"-{process}")
        else record
        for record in schedule.place.records()[:limit]
    ]


def remove(schedule: LocalSchedule, stop: bool) -> None:
    """Remove timer or line, and the folder; `stop` ends a run that is under way, which saves a checkpoint first.

    Raises:
        RequestError: a run is under way and is not to be stopped: the schedule is paused then.
        WorkError: the run does not end.
    """
    if state(schedule) == "active":
        set_paused(schedule, True)
    process = schedule.place.running_process()
    if process is not None and not stop:
        raise RequestError(
            f"{schedule.name} is paused, and its run, process {process}, is under way: wait for its end, or stop it and "
            f"remove everything with `make unschedule TARGET=local NAME={schedule.name} ARGS=--stop`."
        )
    if process is not None:
        os.kill(process, signal.SIGTERM)
        deadline = time.monotonic() + _STOP_S
        while schedule.place.running_process() is not None:
            if time.monotonic() > deadline:
                raise WorkError(f"The run, process {process}, does not end. Say the same command again when it has.")
            time.sleep(0.2)
    _KEEPERS[schedule.keeper].remove(schedule.kept_as)
    shutil.rmtree(schedule.folder)
