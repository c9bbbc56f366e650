"""The list of schedules, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from rich.table import Table

from llm_engineering.cloud.schedules.eventbridge import CloudSchedule
from llm_engineering.cloud.schedules.local_schedules import LocalSchedule
from llm_engineering.cloud.schedules.run_records import RunRecord
from tools.terminal import console

Schedule = LocalSchedule | CloudSchedule


class Row(NamedTuple):
    """One row of the table.

    Attributes:
        state: `active`, `paused` or `lost`.
        runs: the last runs, the newest first.
        missed: the time of a start for which no job was created; None if there is no such start.
    """

    schedule: Schedule
    state: str
    runs: list[RunRecord]
    missed: datetime | None

    def next_time(self, now: datetime) -> datetime | None:
        """The time of the next start in UTC; None if the schedule is not active."""
        times = self.schedule.timing.next_times(now, 1, self.schedule.created) if self.state == "active" else []
        return times[0].astimezone(UTC) if times else None


def print_table(rows: Sequence[Row], now: datetime) -> None:
    """Print a line for each schedule and each of its last runs."""
    if not rows:
        print('There are no schedules. Create one: make schedule CRON="0 3 ? * SUN *"')
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
    console(width=200).print(table)


def row_json(row: Row, now: datetime) -> dict[str, Any]:
    """A schedule in the JSON that `--json` prints. Its keys are part of the public interface."""
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


def where(schedule: Schedule) -> str:
    """The place of the runs, for the table: this machine or SageMaker."""
    if isinstance(schedule, LocalSchedule):
        return f"this machine ({schedule.scheduler})"
    return f"sagemaker ({schedule.request['ResourceConfig']['InstanceType']})"
