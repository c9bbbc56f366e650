"""Retraining at fixed times: the commands that make, list, change, pause, resume, fire and remove schedules."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import boto3
import typer
from botocore.exceptions import NoCredentialsError, PartialCredentialsError
from rich.console import Console
from rich.table import Table

from llm_engineering.cloud.sagemaker.failures import translated
from llm_engineering.cloud.schedules import eventbridge, local_schedules
from llm_engineering.cloud.schedules.cron import Timing, parse_timing
from llm_engineering.cloud.schedules.eventbridge import CloudSchedule
from llm_engineering.cloud.schedules.local_schedules import LocalSchedule
from llm_engineering.cloud.schedules.run_records import RunRecord
from llm_engineering.errors import RequestError
from llm_engineering.recipe.loading import load_recipe
from llm_engineering.recipe.recipe import Recipe
from llm_engineering.recipe.settings import Settings
from tools.cli import DEFAULT_RECIPE, Config, Json, Overrides

logger = logging.getLogger("llm_engineering.schedule")

# No two hyphens in a row: they end the name in the names of its jobs.
_NAME = re.compile(r"[a-zA-Z0-9]+(-[a-zA-Z0-9]+)*")

Schedule = LocalSchedule | CloudSchedule
Place = Literal["sagemaker", "local"]
Name = Annotated[
    str | None,
    typer.Option("--name", help="The schedule's name. Default: that of the recipe, or the only one there is."),
]
Target = Annotated[
    Place | None, typer.Option("--target", help="Where it runs: as a SageMaker job, or on this machine.")
]
Cron = Annotated[
    str | None,
    typer.Option("--cron", metavar="TIME", help='"0 3 ? * SUN *", five fields of cron, or "rate(7 days)".'),
]
Timezone = Annotated[
    str | None, typer.Option("--timezone", metavar="ZONE", help="An IANA name. Default: UTC; for this machine its own.")
]
Documents = Annotated[
    str | None, typer.Option("--documents", metavar="PLACE", help="documents.path of the recipe; for a job s3://…")
]
Stop = Annotated[bool, typer.Option("--stop", help="End a run that is under way.")]


class Row(NamedTuple):
    """A schedule: `active`, `paused` or `lost`, its last runs, the newest first, and a start that came to nothing."""

    schedule: Schedule
    state: str
    runs: list[RunRecord]
    missed: datetime | None

    def next_time(self, now: datetime) -> datetime | None:
        """When it fires next, in UTC; None if it does not."""
        times = self.schedule.timing.next_times(now, 1, self.schedule.created) if self.state == "active" else []
        return times[0].astimezone(UTC) if times else None


def create(
    config: Config = DEFAULT_RECIPE,
    overrides: Overrides = None,
    name: Name = None,
    target: Target = None,
    cron: Cron = None,
    timezone: Timezone = None,
    documents: Documents = None,
) -> int:
    """Make a schedule.

    At each time, `run retrain` is started with the recipe as it is now; a run ends at once if nothing is new. Without
    --target it is a SageMaker job.

    Example: `llm-engineering schedule create --target local --cron "0 3 ? * SUN *"`
    """
    with translated("`create` was not done"):
        if not cron:
            raise RequestError('A schedule needs a time: make schedule CRON="0 3 ? * SUN *" is every Sunday at 3.')
        settings, local = Settings(), target == "local"
        zone = timezone or (local_schedules.timezone() if local else "UTC")
        timing = parse_timing(cron, zone, datetime.now(UTC))
        recipe = _recipe(config, overrides, documents)
        name = name or re.sub(r"[^a-zA-Z0-9]+", "-", recipe.name).strip("-")
        _check_name(name)
        if local:
            from tools.schedule_job import write_local

            write_local(name, timing, recipe, _folder(settings), None)
        else:
            from tools.schedule_job import job_request

            session = _session(settings)
            eventbridge.check_free(session, name)
            request = job_request(name, recipe, settings, session)
            assert settings.scheduler_role is not None
            eventbridge.create(session, name, timing, request, settings.scheduler_role, settings.notify_sns_topic)
        print(f"Schedule {name} is made. {_next(timing, datetime.now(UTC))}")
        if local:
            print(_hint(local_schedules.get(_folder(settings), name)))
        elif settings.notify_sns_topic is None:
            print(
                "Nobody is told of a job that fails before its code runs (no capacity, no image): set NOTIFY_SNS_TOPIC "
                "and use make schedule-change."
            )
    return 0


def list_schedules(
    target: Target = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="How many last runs of each.")] = 3,
    as_json: Json = False,
) -> int:
    """List schedules with their next and last runs.

    Example: `llm-engineering schedule list --limit 5`
    """
    rows: list[Row] = []
    settings, now = Settings(), datetime.now(UTC)
    with translated("`list` was not done"):
        if target != "sagemaker":
            rows += [
                Row(local, local_schedules.state(local), local_schedules.runs(local, limit), None)
                for local in local_schedules.list_all(_folder(settings))
            ]
        for cloud in _in_the_cloud(target, settings):
            session = _session(settings)
            found = eventbridge.runs(session, cloud, limit)
            missed = eventbridge.missed(cloud, found[0] if found else None, now)
            rows.append(Row(cloud, "paused" if cloud.paused else "active", found, missed))
    if as_json:
        print(json.dumps([_as_json(row, now) for row in rows]))
    else:
        _print_table(rows, now)
    return 0


def change(
    config: Annotated[
        str | None,
        typer.Option("--config", metavar="FILE", help="Another recipe, with today's code. Default: as it is."),
    ] = None,
    overrides: Overrides = None,
    name: Name = None,
    target: Target = None,
    cron: Cron = None,
    timezone: Timezone = None,
    documents: Documents = None,
) -> int:
    """Change the time or the recipe of a schedule.

    What is not named stays, but the settings of .env are those of now.

    Example: `llm-engineering schedule change --cron "0 5 ? * MON *"`
    """
    with translated("`change` was not done"):
        settings = Settings()
        found = _find(name, target, settings)
        if not config and (overrides or documents):
            raise RequestError("--set and --documents change a recipe: name it too, CONFIG=recipe.yaml.")
        timing = parse_timing(cron or found.timing.expression, timezone or found.timing.timezone, datetime.now(UTC))
        recipe = _recipe(config, overrides, documents) if config else None
        if isinstance(found, LocalSchedule):
            from tools.schedule_job import write_local

            write_local(found.name, timing, recipe, _folder(settings), found)
        else:
            from tools.schedule_job import job_request

            session = _session(settings)
            request = found.request if recipe is None else job_request(found.name, recipe, settings, session)
            eventbridge.change(session, found.name, timing, request, settings.notify_sns_topic)
        print(f"Schedule {found.name} is changed. {_next(timing, found.created)}")
    return 0


def pause(name: Name = None, target: Target = None) -> int:
    """Pause a schedule: it fires no more.

    Example: `llm-engineering schedule pause --name weekly`
    """
    with translated("`pause` was not done"):
        found = _set_paused(name, target, paused=True)
        print(f"{found.name} is paused.")
    return 0


def resume(name: Name = None, target: Target = None) -> int:
    """Resume a paused schedule.

    Example: `llm-engineering schedule resume --name weekly`
    """
    with translated("`resume` was not done"):
        found = _set_paused(name, target, paused=False)
        print(f"{found.name} fires again. {_next(found.timing, found.created)}")
    return 0


def run_now(name: Name = None, target: Target = None) -> int:
    """Start now what a schedule starts.

    Example: `llm-engineering schedule run --name weekly`
    """
    with translated("`run` was not done"):
        settings = Settings()
        found = _find(name, target, settings)
        if isinstance(found, LocalSchedule):
            process = local_schedules.run_now(found)
            print(f"Started as process {process}; its log: {found.folder / local_schedules.LOG_FILE}")
        else:
            job = eventbridge.run_now(_session(settings), found.name)
            print(f"Started job {job}. `make schedules` shows its verdict.")
    return 0


def remove(name: Name = None, target: Target = None, stop: Stop = False) -> int:
    """Remove a schedule with everything that it made.

    Models and runs stay. A run that is under way hinders it, unless --stop ends that.

    Example: `llm-engineering schedule remove --name weekly`
    """
    with translated("`remove` was not done"):
        settings = Settings()
        found = _find(name, target, settings)
        if isinstance(found, LocalSchedule):
            local_schedules.remove(found, stop)
            print(f"Removed {found.name}: its {found.keeper} entry and {found.folder}.")
        else:
            eventbridge.remove(_session(settings), found.name, stop)
            print(f"Removed {found.name}: schedule, group, rule and alarm, and {found.place.place}.")
    return 0


def _set_paused(name: str | None, target: Place | None, paused: bool) -> Schedule:
    settings = Settings()
    found = _find(name, target, settings)
    if isinstance(found, LocalSchedule):
        local_schedules.set_paused(found, paused)
    else:
        eventbridge.set_paused(_session(settings), found.name, paused)
    return found


def _find(name: str | None, target: Place | None, settings: Settings) -> Schedule:
    """The schedule of that name, or the only one there is.

    Raises:
        RequestError: there is none, or there are several.
    """
    found: list[Schedule] = []
    if target != "sagemaker":
        found += local_schedules.list_all(_folder(settings))
    found += _in_the_cloud(target, settings)
    wanted = [schedule for schedule in found if name in (None, schedule.name)]
    if len(wanted) == 1:
        return wanted[0]
    names = ", ".join(f"{schedule.name} ({_where(schedule)})" for schedule in found) or "none"
    if not wanted:
        raise RequestError(f"There is no schedule {name or ''}. Those there are: {names}.".replace("  ", " "))
    raise RequestError(f"Several schedules could be meant: {names}. Say which one: NAME=…, or TARGET=local|sagemaker.")


def _in_the_cloud(target: Place | None, settings: Settings) -> list[CloudSchedule]:
    """The schedules of the account; where none is asked for and there is no account, that is said."""
    if target == "local":
        return []
    if target is None and not _has_region(settings):
        logger.info("Schedules of SageMaker are not looked up: no region is known (AWS_REGION).")
        return []
    try:
        return eventbridge.list_all(_session(settings))
    except (NoCredentialsError, PartialCredentialsError):
        if target is not None:
            raise
        logger.info("Schedules of SageMaker are not looked up: there are no AWS credentials.")
        return []


def _recipe(config: str, overrides: Sequence[str] | None, documents: str | None) -> Recipe:
    own = [f"documents.path={documents}"] if documents else []
    return load_recipe(config, [*(overrides or ()), *own])


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name) or len(name) > eventbridge.MAX_NAME:
        raise RequestError(
            f'"{name}" is no name for a schedule: letters, digits and single hyphens, at most {eventbridge.MAX_NAME}. '
            "Choose one: NAME=weekly."
        )


def _next(timing: Timing, created: datetime) -> str:
    times = timing.next_times(datetime.now(UTC), 3, created)
    return f"It fires next at {', '.join(f'{time:%a %Y-%m-%d %H:%M}' for time in times)} ({timing.timezone})."


def _hint(schedule: LocalSchedule) -> str:
    if schedule.keeper == "systemd":
        return (
            "It fires while you are logged in; `loginctl enable-linger` lets it fire without. The machine has to be on."
        )
    return "It is a line of your crontab. The machine has to be on."


def _folder(settings: Settings) -> Path:
    return settings.llm_output_dir.absolute() / "schedules"


def _has_region(settings: Settings) -> bool:
    return bool(settings.aws_region or boto3.Session().region_name)


def _session(settings: Settings) -> boto3.Session:
    session = boto3.Session(region_name=settings.aws_region or boto3.Session().region_name)
    if not session.region_name:
        raise RequestError(
            "No AWS region is known: set AWS_REGION in .env, or TARGET=local for a timer of this machine."
        )
    return session


def _print_table(rows: Sequence[Row], now: datetime) -> None:
    """Print a line for each schedule and each of its last runs."""
    if not rows:
        print('There is no schedule. `make schedule CRON="0 3 ? * SUN *"` makes one.')
        return
    table = Table("Schedule", "Where", "State", "When", "Next (UTC)", "Last runs (UTC)", "Verdict")
    for row in rows:
        following = row.next_time(now)
        lines = [(f"{record.began:%Y-%m-%d %H:%M}", record.verdict) for record in row.runs]
        if row.missed is not None:
            lines.insert(0, (f"{row.missed.astimezone(UTC):%Y-%m-%d %H:%M}", "no job was started: see CloudTrail"))
        began, verdict = lines[0] if lines else ("none yet", "")
        timing = row.schedule.timing
        table.add_row(
            row.schedule.name,
            _where(row.schedule),
            row.state,
            f"{timing.expression} {timing.timezone}",
            f"{following:%Y-%m-%d %H:%M}" if following else "",
            began,
            verdict,
        )
        for began, verdict in lines[1:]:
            table.add_row("", "", "", "", "", began, verdict)
    Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False).print(table)


def _as_json(row: Row, now: datetime) -> dict[str, Any]:
    """What is promised to machines."""
    following = row.next_time(now)
    return {
        "name": row.schedule.name,
        "where": _where(row.schedule),
        "state": row.state,
        "expression": row.schedule.timing.expression,
        "timezone": row.schedule.timing.timezone,
        "next": following.isoformat() if following else None,
        "missed": row.missed.astimezone(UTC).isoformat() if row.missed else None,
        "runs": [{**record.model_dump(mode="json"), "verdict": record.verdict} for record in row.runs],
    }


def _where(schedule: Schedule) -> str:
    """Where it runs."""
    if isinstance(schedule, LocalSchedule):
        return f"this machine ({schedule.keeper})"
    return f"sagemaker ({schedule.request['ResourceConfig']['InstanceType']})"
