"""Schedules with their next and last runs, for people and for machines."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from llm_engineering.cloud.schedules.eventbridge import CloudSchedule
from llm_engineering.cloud.schedules.local_schedules import LocalSchedule
from llm_engineering.cloud.schedules.run_records import RunRecord


class Row(NamedTuple):
    """A schedule: `active`, `paused` or `lost`, its last runs, the newest first, and a start that came to nothing."""

    schedule: LocalSchedule | CloudSchedule
    state: str
    runs: list[RunRecord]
    missed: datetime | None

    def next_time(self, now: datetime) -> datetime | None:
        """When it fires next, in UTC; None if it does not."""
        times = self.schedule.timing.next_times(now, 1, self.schedule.created) if self.state == "active" else []
        return times[0].astimezone(UTC) if times else None


def print_table(rows: Sequence[Row], now: datetime) -> None:
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
            where(row.schedule),
            row.state,
            f"{timing.expression} {timing.timezone}",
            f"{following:%Y-%m-%d %H:%M}" if following else "",
            began,
            verdict,
        )
        for began, verdict in lines[1:]:
            table.add_row("", "", "", "", "", began, verdict)
    Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False).print(table)


def as_json(row: Row, now: datetime) -> dict[str, Any]:
    """What is promised to machines."""
    following = row.next_time(now)
    return {
        "name": row.schedule.name,
        "where": where(row.schedule),
        "state": row.state,
        "expression": row.schedule.timing.expression,
        "timezone": row.schedule.timing.timezone,
        "next": following.isoformat() if following else None,
        "missed": row.missed.astimezone(UTC).isoformat() if row.missed else None,
        "runs": [{**record.model_dump(mode="json"), "verdict": record.verdict} for record in row.runs],
    }


def where(schedule: LocalSchedule | CloudSchedule) -> str:
    """Where it runs."""
    if isinstance(schedule, LocalSchedule):
        return f"this machine ({schedule.keeper})"
    return f"sagemaker ({schedule.request['ResourceConfig']['InstanceType']})"
