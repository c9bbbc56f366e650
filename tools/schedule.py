"""Retraining on a schedule: python -m tools.schedule {create,change,list,pause,resume,run,remove} [--name NAME] ..."""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
from datetime import UTC, datetime
from pathlib import Path

import boto3
from botocore.exceptions import NoCredentialsError, PartialCredentialsError

from llm_engineering.cloud.sagemaker.failures import translated
from llm_engineering.cloud.schedules import eventbridge, local_schedules
from llm_engineering.cloud.schedules.cron import Timing, parse_timing
from llm_engineering.cloud.schedules.eventbridge import CloudSchedule
from llm_engineering.cloud.schedules.local_schedules import LocalSchedule
from llm_engineering.errors import RequestError
from llm_engineering.recipe.loading import load_recipe
from llm_engineering.recipe.recipe import Recipe
from llm_engineering.recipe.settings import Settings
from tools.cli import exit_code, start_logging
from tools.schedule_table import Row, as_json, print_table, where

logger = logging.getLogger("llm_engineering.schedule")

# No two hyphens in a row: they end the name in the names of its jobs.
_NAME = re.compile(r"[a-zA-Z0-9]+(-[a-zA-Z0-9]+)*")


def main() -> int:
    """Parse the command line and do it; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.schedule", description="Retraining on a schedule.")
    parser.add_argument("action", choices=("create", "change", "list", "pause", "resume", "run", "remove"))
    parser.add_argument("--config", help="the recipe (create: configs/local.yaml if none is named; change: as it is)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("--name", help="the schedule's name (default: that of the recipe, or the only one there is)")
    parser.add_argument("--target", choices=("sagemaker", "local"), help="where it runs: a job, or this machine")
    parser.add_argument("--cron", help='when: "0 3 ? * SUN *", five fields of cron, or "rate(7 days)"')
    parser.add_argument("--timezone", help="an IANA name (default: UTC; for this machine its own)")
    parser.add_argument("--documents", help="documents.path of the recipe, for a job s3://…")
    parser.add_argument("--stop", action="store_true", help="with remove: end a run that is under way")
    parser.add_argument("--limit", type=int, default=3, help="with list: how many last runs (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="with list: one JSON object on stdout")
    arguments = parser.parse_args()
    if arguments.limit < 1:
        parser.error(f"--limit must be at least 1, not {arguments.limit}")
    start_logging(arguments.debug)
    return exit_code(lambda: _done(arguments), arguments.debug)


def _done(arguments: argparse.Namespace) -> int:
    with translated(f"`{arguments.action}` was not done"):
        return _do(arguments)


def _do(arguments: argparse.Namespace) -> int:
    settings = Settings()
    if arguments.action == "create":
        return _create(arguments, settings)
    if arguments.action == "list":
        return _list(arguments, settings)
    found = _find(arguments.name, arguments.target, settings)
    if arguments.action == "change":
        return _change(arguments, settings, found)
    if arguments.action in ("pause", "resume"):
        paused = arguments.action == "pause"
        if isinstance(found, LocalSchedule):
            local_schedules.set_paused(found, paused)
        else:
            eventbridge.set_paused(_session(settings), found.name, paused)
        print(
            f"{found.name} is paused." if paused else f"{found.name} fires again. {_next(found.timing, found.created)}"
        )
    elif arguments.action == "run":
        if isinstance(found, LocalSchedule):
            print(
                f"Started as process {local_schedules.run_now(found)}; its log: {found.folder / local_schedules.LOG_FILE}"
            )
        else:
            print(
                f"Started job {eventbridge.run_now(_session(settings), found.name)}. `make schedules` shows its verdict."
            )
    elif isinstance(found, LocalSchedule):
        local_schedules.remove(found, arguments.stop)
        print(f"Removed {found.name}: its {found.keeper} entry and {found.folder}.")
    else:
        eventbridge.remove(_session(settings), found.name, arguments.stop)
        print(f"Removed {found.name}: schedule, group, rule and alarm, and {found.place.place}.")
    return 0


def _create(arguments: argparse.Namespace, settings: Settings) -> int:
    if not arguments.cron:
        raise RequestError('A schedule needs a time: make schedule CRON="0 3 ? * SUN *" is every Sunday at 3.')
    local = arguments.target == "local"
    timezone = arguments.timezone or (local_schedules.timezone() if local else "UTC")
    timing = parse_timing(arguments.cron, timezone, datetime.now(UTC))
    recipe = _recipe(arguments)
    name = arguments.name or re.sub(r"[^a-zA-Z0-9]+", "-", recipe.name).strip("-")
    _check_name(name)
    if local:
        _local(name, timing, recipe, settings, None)
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
            "Nobody is told of a job that fails before its code runs (no capacity, no image): set NOTIFY_SNS_TOPIC and use "
            "make schedule-change."
        )
    return 0


def _change(arguments: argparse.Namespace, settings: Settings, found: LocalSchedule | CloudSchedule) -> int:
    """Another time, another recipe with today's code, or both; and the settings of now."""
    if not arguments.config and (arguments.set or arguments.documents):
        raise RequestError("--set and --documents change a recipe: name it too, CONFIG=recipe.yaml.")
    timezone = arguments.timezone or found.timing.timezone
    timing = parse_timing(arguments.cron or found.timing.expression, timezone, datetime.now(UTC))
    recipe = _recipe(arguments) if arguments.config else None
    if isinstance(found, LocalSchedule):
        _local(found.name, timing, recipe, settings, found)
    else:
        from tools.schedule_job import job_request

        session = _session(settings)
        request = found.request if recipe is None else job_request(found.name, recipe, settings, session)
        eventbridge.change(session, found.name, timing, request, settings.notify_sns_topic)
    print(f"Schedule {found.name} is changed. {_next(timing, found.created)}")
    return 0


def _local(name: str, timing: Timing, recipe: Recipe | None, settings: Settings, former: LocalSchedule | None) -> None:
    """Write a schedule of this machine; without a recipe the former one stays."""
    from tools.schedule_local import environment

    folder, now = _folder(settings), datetime.now(UTC)
    if former is None and (folder / name).exists():
        raise RequestError(
            f"There is a schedule {name} on this machine already. `make schedule-change NAME={name}` changes it, "
            f"`make unschedule NAME={name}` removes it."
        )
    keeper = former.keeper if former is not None else local_schedules.keeper()
    local_schedules.check(timing, keeper, now)
    if recipe is not None and recipe.compute.target != "local":
        logger.info("compute.target is %s: on a schedule of this machine, training runs on it", recipe.compute.target)
        recipe = recipe.model_copy(
            update={"compute": recipe.compute.model_copy(update={"target": "local", "sagemaker": None})}
        )
    schedule = LocalSchedule(
        name=name,
        timing=timing,
        keeper=keeper,
        created=former.created if former is not None else now,
        folder=folder / name,
        directory=Path.cwd(),
        environment=environment(),
    )
    paused = former is not None and local_schedules.state(former) == "paused"
    kept = recipe.model_dump_json(indent=1) if recipe is not None else None
    local_schedules.write(schedule, kept, paused)


def _list(arguments: argparse.Namespace, settings: Settings) -> int:
    rows: list[Row] = []
    now = datetime.now(UTC)
    if arguments.target != "sagemaker":
        rows += [
            Row(local, local_schedules.state(local), local_schedules.runs(local, arguments.limit), None)
            for local in local_schedules.list_all(_folder(settings))
        ]
    for cloud in _in_the_cloud(arguments.target, settings):
        session = _session(settings)
        found = eventbridge.runs(session, cloud, arguments.limit)
        missed = eventbridge.missed(cloud, found[0] if found else None, now)
        rows.append(Row(cloud, "paused" if cloud.paused else "active", found, missed))
    if arguments.json:
        print(json.dumps([as_json(row, now) for row in rows]))
    else:
        print_table(rows, now)
    return 0


def _find(name: str | None, target: str | None, settings: Settings) -> LocalSchedule | CloudSchedule:
    """The schedule of that name, or the only one there is.

    Raises:
        RequestError: there is none, or there are several.
    """
    found: list[LocalSchedule | CloudSchedule] = []
    if target != "sagemaker":
        found += local_schedules.list_all(_folder(settings))
    found += _in_the_cloud(target, settings)
    wanted = [schedule for schedule in found if name in (None, schedule.name)]
    if len(wanted) == 1:
        return wanted[0]
    names = ", ".join(f"{schedule.name} ({where(schedule)})" for schedule in found) or "none"
    if not wanted:
        raise RequestError(f"There is no schedule {name or ''}. Those there are: {names}.".replace("  ", " "))
    raise RequestError(f"Several schedules could be meant: {names}. Say which one: NAME=…, or TARGET=local|sagemaker.")


def _in_the_cloud(target: str | None, settings: Settings) -> list[CloudSchedule]:
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


def _recipe(arguments: argparse.Namespace) -> Recipe:
    overrides = list(arguments.set)
    if arguments.documents:
        overrides.append(f"documents.path={arguments.documents}")
    return load_recipe(arguments.config or "configs/local.yaml", overrides)


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


if __name__ == "__main__":
    sys.exit(main())
