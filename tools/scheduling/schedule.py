"""The commands `schedule create`, `list`, `change`, `pause`, `resume`, `run` and `remove`: retraining at fixed times."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import boto3
import typer
from botocore.exceptions import NoCredentialsError, PartialCredentialsError

from llm_engineering.cloud.sagemaker.failures import translated
from llm_engineering.cloud.schedules import eventbridge, local_schedules
from llm_engineering.cloud.schedules.cron import Timing, parse_timing
from llm_engineering.cloud.schedules.eventbridge import CloudSchedule
from llm_engineering.cloud.schedules.local_schedules import LocalSchedule
from llm_engineering.errors import RequestError
from llm_engineering.recipe.loading import check_name, load_recipe
from llm_engineering.recipe.recipe import Recipe
from llm_engineering.recipe.settings import Settings
from tools.cli import DEFAULT_RECIPE, Config, Json, Overrides
from tools.scheduling.listing import Row, Schedule, print_table, row_json, where

logger = logging.getLogger("llm_engineering.schedule")

# A name has no double hyphen, because in the names of jobs a double hyphen follows the schedule's name.
_NAME = re.compile(r"[a-zA-Z0-9]+(-[a-zA-Z0-9]+)*")

Place = Literal["sagemaker", "local"]
Name = Annotated[
    str | None,
    typer.Option(
        "--name",
        help="Name of the schedule. Default: the recipe's name for a new schedule, otherwise the only existing schedule.",
    ),
]
Target = Annotated[
    Place | None, typer.Option("--target", help="Where the runs take place: in SageMaker jobs, or on this machine.")
]
Cron = Annotated[
    str | None,
    typer.Option(
        "--cron", metavar="TIME", help='When to run: "0 3 ? * SUN *", five fields as in a crontab, or "rate(7 days)".'
    ),
]
Timezone = Annotated[
    str | None,
    typer.Option(
        "--timezone",
        metavar="ZONE",
        help="IANA name of the timezone. Default: UTC for a SageMaker job, this machine's timezone for --target local.",
    ),
]
Documents = Annotated[
    str | None,
    typer.Option(
        "--documents", metavar="PLACE", help="Replaces documents.path of the recipe. A SageMaker job needs s3://…"
    ),
]
Stop = Annotated[bool, typer.Option("--stop", help="Also stop a run in progress.")]


def create(
    config: Config = DEFAULT_RECIPE,
    overrides: Overrides = None,
    name: Name = None,
    target: Target = None,
    cron: Cron = None,
    timezone: Timezone = None,
    documents: Documents = None,
) -> int:
    """Create a schedule.

    At each time, the schedule starts `run retrain` with the recipe as it is now. A run ends at once if nothing has
    changed. By default, the runs are SageMaker jobs.

    Example: `llm-engineering schedule create --target local --cron "0 3 ? * SUN *"`
    """
    with translated("The schedule was not created"):
        if not cron:
            raise RequestError(
                'A schedule needs a time. Add one, for example every Sunday at 3: make schedule CRON="0 3 ? * SUN *"'
            )
        settings, local = Settings(), target == "local"
        zone = timezone or (local_schedules.timezone() if local else "UTC")
        timing = parse_timing(cron, zone, datetime.now(UTC))
        recipe = _recipe(config, overrides, documents)
        name = name or re.sub(r"[^a-zA-Z0-9]+", "-", recipe.name).strip("-")
        _check_name(name)
        if local:
            from tools.scheduling.schedule_job import write_local

            write_local(name, timing, recipe, _folder(settings), None)
        else:
            from tools.scheduling.schedule_job import job_request

            session = _session(settings)
            eventbridge.check_free(session, name)
            request = job_request(name, recipe, settings, session)
            assert settings.scheduler_role is not None
            eventbridge.create(session, name, timing, request, settings.scheduler_role, settings.notify_sns_topic)
        print(f"Schedule {name} is created. {_next(timing, datetime.now(UTC))}")
        if local:
            print(_hint(local_schedules.get(_folder(settings), name)))
        elif settings.notify_sns_topic is None:
            print(
                "You get no notification of a job that fails before its code runs (no capacity, no image). To get one, set "
                "NOTIFY_SNS_TOPIC in .env, then run make schedule-change."
            )
    return 0


def list_schedules(
    target: Target = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Maximum number of runs of each schedule.")] = 3,
    as_json: Json = False,
) -> int:
    """List schedules with their next and last runs.

    Example: `llm-engineering schedule list --limit 5`
    """
    rows: list[Row] = []
    settings, now = Settings(), datetime.now(UTC)
    with translated("The schedules were not listed"):
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
        print(json.dumps([row_json(row, now) for row in rows]))
    else:
        print_table(rows, now)
    return 0


def change(
    config: Annotated[
        str | None,
        typer.Option(
            "--config",
            metavar="FILE",
            help="Another recipe, which then runs with today's code. Default: recipe and code stay unchanged.",
        ),
    ] = None,
    overrides: Overrides = None,
    name: Name = None,
    target: Target = None,
    cron: Cron = None,
    timezone: Timezone = None,
    documents: Documents = None,
) -> int:
    """Change the time or the recipe of a schedule.

    Without an option, its value stays unchanged. The settings are read from .env again.

    Example: `llm-engineering schedule change --cron "0 5 ? * MON *"`
    """
    with translated("The schedule was not changed"):
        settings = Settings()
        found = _find(name, target, settings)
        if not config and (overrides or documents):
            raise RequestError(
                "--set and --documents change a recipe, so the recipe must be given too. Add CONFIG=recipe.yaml."
            )
        timing = parse_timing(cron or found.timing.expression, timezone or found.timing.timezone, datetime.now(UTC))
        recipe = _recipe(config, overrides, documents) if config else None
        if isinstance(found, LocalSchedule):
            from tools.scheduling.schedule_job import write_local

            write_local(found.name, timing, recipe, _folder(settings), found)
        else:
            from tools.scheduling.schedule_job import job_request

            session = _session(settings)
            request = found.request if recipe is None else job_request(found.name, recipe, settings, session)
            role = settings.scheduler_role or found.role
            found = eventbridge.change(session, found.name, timing, request, role, settings.notify_sns_topic)
        print(f"Schedule {found.name} is changed. {_next(timing, found.created)}")
    return 0


def pause(name: Name = None, target: Target = None) -> int:
    """Pause a schedule, so that it starts no more runs.

    Example: `llm-engineering schedule pause --name weekly`
    """
    return _set_paused(name, target, paused=True)


def resume(name: Name = None, target: Target = None) -> int:
    """Resume a paused schedule.

    Example: `llm-engineering schedule resume --name weekly`
    """
    return _set_paused(name, target, paused=False)


def run_now(name: Name = None, target: Target = None) -> int:
    """Start a run of a schedule now.

    Example: `llm-engineering schedule run --name weekly`
    """
    with translated("The run was not started"):
        settings = Settings()
        found = _find(name, target, settings)
        if isinstance(found, LocalSchedule):
            process = local_schedules.run_now(found)
            print(f"Started as process {process}. Its log: {found.folder / local_schedules.LOG_FILE}")
        else:
            job = eventbridge.run_now(_session(settings), found.name)
            print(f"Started job {job}. `make schedules` shows its result.")
    return 0


def remove(name: Name = None, target: Target = None, stop: Stop = False) -> int:
    """Remove a schedule and everything that was created for it.

    Models and runs stay. While a run is in progress, the schedule is only paused, unless --stop is given.

    Example: `llm-engineering schedule remove --name weekly`
    """
    with translated("The schedule was not removed"):
        settings = Settings()
        found = _find(name, target, settings)
        if isinstance(found, LocalSchedule):
            local_schedules.remove(found, stop)
            print(f"Removed {found.name}: its {found.scheduler} entry and {found.folder}.")
        else:
            eventbridge.remove(_session(settings), found.name, stop)
            print(f"Removed {found.name}: schedule, group, rule and alarm, and {found.place.place}.")
    return 0


def _set_paused(name: str | None, target: Place | None, paused: bool) -> int:
    with translated(f"The schedule was not {'paused' if paused else 'resumed'}"):
        settings = Settings()
        found = _find(name, target, settings)
        if isinstance(found, LocalSchedule):
            local_schedules.set_paused(found, paused)
        else:
            eventbridge.set_paused(_session(settings), found.name, paused)
        print(
            f"{found.name} is paused."
            if paused
            else f"{found.name} is active again. {_next(found.timing, found.created)}"
        )
    return 0


def _find(name: str | None, target: Place | None, settings: Settings) -> Schedule:
    """The schedule of this name; without a name, the only schedule.

    Raises:
        RequestError: no schedule matches, or several do.
    """
    found: list[Schedule] = []
    if target != "sagemaker":
        found += local_schedules.list_all(_folder(settings))
    found += _in_the_cloud(target, settings)
    wanted = [schedule for schedule in found if name in (None, schedule.name)]
    if len(wanted) == 1:
        return wanted[0]
    names = ", ".join(f"{schedule.name} ({where(schedule)})" for schedule in found)
    if not wanted:
        remedy = f"Existing schedules: {names}." if names else 'Create one: make schedule CRON="0 3 ? * SUN *"'
        raise RequestError(f"There is no schedule{f' {name}' if name else ''}. {remedy}")
    raise RequestError(f"There are several schedules: {names}. Choose one with NAME=…, or TARGET=local|sagemaker.")


def _in_the_cloud(target: Place | None, settings: Settings) -> list[CloudSchedule]:
    """The schedules of the AWS account. Without a target, a missing region or missing credentials are only logged."""
    if target == "local":
        return []
    if target is None and not _has_region(settings):
        logger.info("Schedules of SageMaker are not listed, because AWS_REGION is not set.")
        return []
    try:
        return eventbridge.list_all(_session(settings))
    except (NoCredentialsError, PartialCredentialsError):
        if target is not None:
            raise
        logger.info("Schedules of SageMaker are not listed, because there are no AWS credentials.")
        return []


def _recipe(config: str, overrides: Sequence[str] | None, documents: str | None) -> Recipe:
    own = [f"documents.path={documents}"] if documents else []
    recipe = load_recipe(config, [*(overrides or ()), *own])
    check_name(config, [*(overrides or ()), *own])
    return recipe


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name) or len(name) > eventbridge.MAX_NAME:
        raise RequestError(
            f'"{name}" cannot be the name of a schedule. A name has letters, digits and single hyphens, and at most '
            f"{eventbridge.MAX_NAME} characters. Choose another name: NAME=weekly."
        )


def _next(timing: Timing, created: datetime) -> str:
    times = timing.next_times(datetime.now(UTC), 3, created)
    return f"The next runs start at {', '.join(f'{time:%a %Y-%m-%d %H:%M}' for time in times)} ({timing.timezone})."


def _hint(schedule: LocalSchedule) -> str:
    if schedule.scheduler == "systemd":
        return (
            "Runs start only while you are logged in; after `loginctl enable-linger`, always. The machine has to be on."
        )
    return "The schedule is a line of your crontab. The machine has to be on."


def _folder(settings: Settings) -> Path:
    return settings.llm_output_dir.absolute() / "schedules"


def _has_region(settings: Settings) -> bool:
    return bool(settings.aws_region or boto3.Session().region_name)


def _session(settings: Settings) -> boto3.Session:
    session = boto3.Session(region_name=settings.aws_region or boto3.Session().region_name)
    if not session.region_name:
        raise RequestError(
            "No AWS region is set: set AWS_REGION in .env, or use TARGET=local for a schedule on this machine."
        )
    return session
