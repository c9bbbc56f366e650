"""Checks the expressions of EventBridge Scheduler, and translates them for cron and systemd.

EventBridge's cron has six fields: minute, hour, day of month, month, day of week, year. One of the two days must be `?`
(https://docs.aws.amazon.com/scheduler/latest/UserGuide/schedule-types.html). Sunday is 1 there and 0 in cron, so a
day of week must be translated.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from aws_croniter import AwsCroniter
from aws_croniter.exceptions import AwsCroniterExpressionError
from croniter import croniter
from pydantic import BaseModel, ConfigDict

from llm_engineering.errors import RequestError

RIGHT_FORM = (
    'the form is "minute hour day-of-month month day-of-week year" with ? for one of the days: "0 3 ? * SUN *" is every '
    'Sunday at 3, "0 3 1 * ? *" every first of a month, "rate(7 days)" every seven days'
)
DAYS = ("SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT")
_RATE = re.compile(r"rate\(\s*([0-9]+)\s+(minute|hour|day)(s?)\s*\)")
# Cron's five fields. The library also reads L, W, # and R (random), and ignores some of them.
_CRON = re.compile(r"([\d*,/-]+ ){3}([\d*,/-]|[A-Z]{3})+ ([\d*,/-]|[A-Z]{3})+")


class Timing(BaseModel):
    """When a schedule fires.

    Attributes:
        expression: `cron(…)` or `rate(…)`, in the form of EventBridge Scheduler.
        timezone: an IANA name; UTC for a rate, which does not depend on a timezone.
    """

    model_config = ConfigDict(frozen=True)

    expression: str
    timezone: str

    @property
    def fields(self) -> str | None:
        """The six fields of a cron expression; None for a rate."""
        return self.expression[5:-1] if self.expression.startswith("cron(") else None

    @property
    def step(self) -> timedelta | None:
        """The time between two starts of a rate; None for a cron expression."""
        return _rate(self.expression) if self.fields is None else None

    def next_times(self, after: datetime, count: int, created: datetime | None = None) -> list[datetime]:
        """Return at most `count` times after `after`, in the schedule's timezone.

        As in EventBridge Scheduler, a local time that is skipped when summer time begins does not fire, and a local time
        that occurs twice when summer time ends fires once. A rate counts from `created`, or from `after` if `created` is
        None.
        """
        zone = ZoneInfo(self.timezone)
        if (step := self.step) is not None:
            start = created or after
            passed = max(0, (after - start) // step)
            return [(start + (passed + i) * step).astimezone(zone) for i in range(1, count + 1)]
        cron, found = AwsCroniter(self.fields), list[datetime]()
        # The library computes in UTC, so local times are passed to it with the label UTC.
        wall = after.astimezone(zone).replace(tzinfo=UTC)
        while len(found) < count:
            (following,) = cron.get_next(wall, 1)
            if following is None:
                break
            wall = following
            local = wall.replace(tzinfo=zone)
            exists = local.astimezone(UTC).astimezone(zone).replace(tzinfo=UTC) == wall
            if exists and local > after:
                found.append(local)
        return found


class Entry(NamedTuple):
    """What cron or systemd starts at fixed times. The command's output is appended to `log`."""

    name: str
    timing: Timing
    command: Sequence[str]
    directory: Path
    environment: Mapping[str, str]
    log: Path


def parse_timing(text: str, timezone: str, now: datetime) -> Timing:
    """Parse six fields, cron's five fields if they can be translated, a nickname such as `@weekly`, or a rate.

    Raises:
        RequestError: the expression is not valid or never fires after `now`, or the timezone is unknown. The message
            shows the right form.
    """
    try:
        ZoneInfo(timezone)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise RequestError(
            f'The timezone "{timezone}" is unknown. Use a name such as UTC or Europe/Berlin (timedatectl list-timezones).'
        ) from error
    text = " ".join(text.split())
    if text.startswith("rate("):
        _rate(text)
        return Timing(expression=text, timezone="UTC")
    if text.startswith("at("):
        raise RequestError(f'"{text}" fires only once: run `make retrain` instead; {RIGHT_FORM}.')
    fields = text.removeprefix("cron(").removesuffix(")") if text.startswith("cron(") else text
    if fields.startswith("@") or len(fields.split()) == 5:
        fields = _six_fields(fields)
    timing = Timing(expression=f"cron({_checked(fields)})", timezone=timezone)
    if not timing.next_times(now, 1):
        raise RequestError(f'"{fields}" never fires after {now:%Y-%m-%d}: {RIGHT_FORM}.')
    return timing


def crontab_fields(timing: Timing) -> str:
    """Cron's five fields.

    Raises:
        RequestError: cron cannot express these times.
    """
    minutes, hours, days, months, weekdays, _ = _values(timing, "A crontab line")
    # Sunday is 1 for AWS and 0 for cron.
    weekdays = [day - 1 for day in weekdays]
    fields = ((minutes, 60), (hours, 24), (days, 31), (months, 12), (weekdays, 7))
    return " ".join(_listed(values, count) for values, count in fields)


def on_calendar(timing: Timing) -> str:
    """The value of systemd's OnCalendar (systemd.time(7)), with the timezone.

    Raises:
        RequestError: systemd cannot express these times.
    """
    minutes, hours, days, months, weekdays, years = _values(timing, "A systemd timer")
    names = ",".join(DAYS[day - 1].title() for day in weekdays)
    date = f"{_listed(years, 230)}-{_listed(months, 12)}-{_listed(days, 31)}"
    clock = f"{_listed(hours, 24)}:{_listed(minutes, 60)}:00"
    return " ".join(part for part in (names if len(weekdays) < 7 else "", date, clock, timing.timezone) if part)


def _rate(expression: str) -> timedelta:
    match = _RATE.fullmatch(expression)
    if match is None or int(match[1]) == 0 or (int(match[1]) == 1) == bool(match[3]):
        raise RequestError(
            f'"{expression}" is not a rate: write rate(1 day), rate(7 days), rate(12 hours); the unit is minute, hour or day, '
            "with an s unless the number is 1."
        )
    return timedelta(**{f"{match[2]}s": int(match[1])})


def _checked(fields: str) -> str:
    """Check six fields, and return them in upper case."""
    parts = fields.upper().split()
    if len(parts) != 6:
        raise RequestError(f'"{fields}" has {len(parts)} fields instead of 6: {RIGHT_FORM}.')
    if (parts[2] == "?") == (parts[4] == "?"):
        # If one of the two is *, it is the one to replace.
        spare = 4 if parts[4] == "*" else 2
        corrected = [*parts[:spare], "?", *parts[spare + 1 :]]
        hint = f'write "{" ".join(corrected)}"' if parts[spare] == "*" else RIGHT_FORM
        raise RequestError(
            f'"{fields}" has day-of-month {parts[2]} and day-of-week {parts[4]}, but exactly one of them must be ?: {hint}.'
        )
    if parts[4] == "L":
        # The last day of the week. The library knows L only after a day.
        parts[4] = "SAT"
    try:
        AwsCroniter(" ".join(parts))
    except (AwsCroniterExpressionError, ValueError) as error:
        # The library raises ValueError for a field that matches its pattern but is not a number.
        detail = str(error).rstrip(".") if isinstance(error, AwsCroniterExpressionError) else "a field cannot be read"
        raise RequestError(f'"{fields}" is not valid ({detail}): {RIGHT_FORM}.') from error
    return " ".join(parts)


def _six_fields(fields: str) -> str:
    """Translate cron's five fields or a nickname such as `@weekly` into EventBridge's six. Ranges and steps become lists.

    Raises:
        RequestError: the fields are not valid, or no single EventBridge expression has this meaning.
    """
    if "?" in fields:
        raise RequestError(f'"{fields}" has no year. Add * for every year: "{fields} *"; {RIGHT_FORM}.')
    if _CRON.fullmatch(fields.upper()):
        minute, hour, day, month, weekday = fields.upper().split()
        if day != "*" and weekday != "*":
            raise RequestError(
                f'"{fields}" fires on days of the month and on days of the week. Make two schedules of it: '
                f'"{minute} {hour} {day} {month} *" and "{minute} {hour} * {month} {weekday}".'
            )
    elif not fields.startswith("@"):
        raise RequestError(f'"{fields}" is not a time: {RIGHT_FORM}.')
    try:
        *expanded, weekdays = croniter.expand(fields)[0]
    except ValueError as error:
        raise RequestError(f'"{fields}" is not a time ({str(error).rstrip(".")}): {RIGHT_FORM}.') from error
    minute, hour, day, month = ("*" if "*" in values else ",".join(map(str, values)) for values in expanded)
    # Cron's Sunday, 0 or 7, has another number in AWS.
    weekday = "*" if "*" in weekdays else ",".join(DAYS[value] for value in weekdays)
    return f"{minute} {hour} {day} {month} ? *" if weekday == "*" else f"{minute} {hour} ? {month} {weekday} *"


def _values(timing: Timing, place: str) -> Iterator[list[int]]:
    """The values of the six fields; a `?` gives every value.

    Args:
        place: the subject of the error messages.

    Raises:
        RequestError: the timing is a rate, has L, W or #, or has years that a crontab line cannot express.
    """
    if timing.fields is None:
        raise RequestError(f"{place} cannot express {timing.expression}: write the times instead; {RIGHT_FORM}.")
    cron = AwsCroniter(timing.fields)
    fields = (cron.minutes, cron.hours, cron.days_of_month, cron.months, cron.days_of_week, cron.years)
    lasts = (None, None, 31, None, 7, None)
    if any(isinstance(value, str) for field in fields for value in field):
        raise RequestError(f'{place} cannot express L, W or #, as in "{timing.fields}": write the days instead.')
    if place == "A crontab line" and timing.fields.split()[5] != "*":
        raise RequestError(f'{place} cannot express a year, as in "{timing.fields}": write * for it.')
    return (sorted(set(field)) or list(range(1, (last or 0) + 1)) for field, last in zip(fields, lasts, strict=True))


def _listed(values: list[int], count: int) -> str:
    """The values, separated by commas, or * if these are all `count` values."""
    return "*" if len(values) == count else ",".join(map(str, values))
