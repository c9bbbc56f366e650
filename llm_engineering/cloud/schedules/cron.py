"""When a schedule fires: expressions of EventBridge Scheduler, checked here and translated for cron and systemd.

EventBridge's cron has six fields, minute hour day-of-month month day-of-week year, of which one of the two days is `?`
(https://docs.aws.amazon.com/scheduler/latest/UserGuide/schedule-types.html). It counts Sunday as 1 and cron as 0, so that
a field taken over as it is could mean another day.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from aws_croniter import AwsCroniter
from aws_croniter.exceptions import AwsCroniterExpressionError
from pydantic import BaseModel, ConfigDict

from llm_engineering.errors import RequestError

RIGHT_FORM = (
    'the form is "minute hour day-of-month month day-of-week year" with ? for one of the days: "0 3 ? * SUN *" is every '
    'Sunday at 3, "0 3 1 * ? *" every first of a month, "rate(7 days)" every seven days'
)
DAYS = ("SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT")
MONTHS = ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")
_NICKNAMES = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}
_RATE = re.compile(r"rate\(\s*([0-9]+)\s+(minute|hour|day)(s?)\s*\)")
# First and last value of cron's fields, and the names of the values from the first one on.
_CRON: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "minute": (0, 59, ()),
    "hour": (0, 23, ()),
    "day of month": (1, 31, ()),
    "month": (1, 12, MONTHS),
    "day of week": (0, 7, DAYS),
}


class Timing(BaseModel):
    """When a schedule fires.

    Attributes:
        expression: `cron(…)` or `rate(…)`, as EventBridge Scheduler takes it.
        timezone: an IANA name; a rate has none, and keeps UTC.
    """

    model_config = ConfigDict(frozen=True)

    expression: str
    timezone: str

    @property
    def fields(self) -> str | None:
        """The six fields of a cron expression; None of a rate."""
        return self.expression[5:-1] if self.expression.startswith("cron(") else None

    @property
    def step(self) -> timedelta | None:
        """The time between two starts of a rate; None of a cron expression."""
        return _rate(self.expression) if self.fields is None else None

    def next_times(self, after: datetime, count: int, created: datetime | None = None) -> list[datetime]:
        """The next times after `after`, in the schedule's timezone, at most `count`.

        A wall-clock time that the change to summer time leaves out does not fire, one that the change back repeats
        fires once, as EventBridge Scheduler does it. A rate counts from `created`, `after` if that is None.
        """
        zone = ZoneInfo(self.timezone)
        if (step := self.step) is not None:
            start = created or after
            passed = max(0, (after - start) // step)
            return [(start + (passed + i) * step).astimezone(zone) for i in range(1, count + 1)]
        cron, found = AwsCroniter(self.fields), list[datetime]()
        # The library counts in UTC, which here stands for the wall clock of the schedule's zone.
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


def parse_timing(text: str, timezone: str, now: datetime) -> Timing:
    """Read an expression: six fields, five where their meaning is the same, `@weekly` and the like, or a rate.

    Raises:
        RequestError: it is not valid, never fires after `now`, or the timezone is unknown; says the right form.
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
        raise RequestError(f'"{text}" fires once, which is no schedule: run `make retrain` instead; {RIGHT_FORM}.')
    fields = text.removeprefix("cron(").removesuffix(")") if text.startswith("cron(") else text
    if fields.startswith("@") and fields not in _NICKNAMES:
        raise RequestError(f'"{fields}" is no time that can be scheduled: {RIGHT_FORM}.')
    fields = _NICKNAMES.get(fields, fields)
    if len(fields.split()) == 5:
        fields = _six_fields(fields)
    timing = Timing(expression=f"cron({_checked(fields)})", timezone=timezone)
    if not timing.next_times(now, 1):
        raise RequestError(f'"{fields}" never fires after {now:%Y-%m-%d}: {RIGHT_FORM}.')
    return timing


def crontab_fields(timing: Timing) -> str:
    """The five fields of cron.

    Raises:
        RequestError: cron cannot say it.
    """
    minutes, hours, days, months, weekdays, _ = _values(timing, "A crontab line")
    return " ".join(
        (
            _listed(minutes, 60),
            _listed(hours, 24),
            _listed(days, 31),
            _listed(months, 12),
            # AWS counts from 1, cron from 0; both begin with Sunday.
            _listed([day - 1 for day in weekdays], 7),
        )
    )


def on_calendar(timing: Timing) -> str:
    """The same as systemd's OnCalendar (systemd.time(7)), with its timezone.

    Raises:
        RequestError: systemd cannot say it.
    """
    minutes, hours, days, months, weekdays, years = _values(timing, "A systemd timer")
    names = ",".join(DAYS[day - 1].title() for day in weekdays)
    date = f"{_listed(years, 230)}-{_listed(months, 12)}-{_listed(days, 31)}"
    clock = f"{_listed(hours, 24)}:{_listed(minutes, 60)}:00"
    return " ".join(part for part in (names if len(weekdays) < 7 else "", date, clock, timing.timezone) if part)


def _rate(expression: str) -> timedelta:
    found = _RATE.fullmatch(expression)
    if found is None or int(found[1]) == 0 or (int(found[1]) == 1) == bool(found[3]):
        raise RequestError(
            f'"{expression}" is no rate: write rate(1 day), rate(7 days), rate(12 hours); the unit is minute, hour or day, '
            "with an s unless the number is 1."
        )
    return timedelta(**{f"{found[2]}s": int(found[1])})


def _checked(fields: str) -> str:
    """The six fields, upper case.

    Raises:
        RequestError: they are not valid.
    """
    parts = fields.upper().split()
    if len(parts) != 6:
        raise RequestError(f'"{fields}" has {len(parts)} fields instead of 6: {RIGHT_FORM}.')
    if (parts[2] == "?") == (parts[4] == "?"):
        # Which of the two is meant is plain where the other one is any day.
        spare = 4 if parts[4] == "*" else 2
        mended = [*parts[:spare], "?", *parts[spare + 1 :]]
        hint = f'"{" ".join(mended)}"' if parts[spare] == "*" else RIGHT_FORM
        raise RequestError(
            f'"{fields}" has day-of-month {parts[2]} and day-of-week {parts[4]}, and exactly one of them has to be ?: '
            f"{hint}."
        )
    try:
        AwsCroniter(" ".join(parts))
    except (AwsCroniterExpressionError, ValueError) as error:
        # A ValueError is what passes the library's patterns and then cannot be read as a number.
        detail = str(error).rstrip(".") if isinstance(error, AwsCroniterExpressionError) else "a field cannot be read"
        raise RequestError(f'"{fields}" is not valid ({detail}): {RIGHT_FORM}.') from error
    return " ".join(parts)


def _six_fields(fields: str) -> str:
    """Cron's five fields in EventBridge's form.

    Raises:
        RequestError: their meaning has no single expression there.
    """
    if "?" in fields:
        raise RequestError(f'"{fields}" has no year, add * for every year: "{fields} *"; {RIGHT_FORM}.')
    minute, hour, day, month, weekday = fields.upper().split()
    if day != "*" and weekday != "*":
        raise RequestError(
            f'"{fields}" fires on days of the month and on days of the week, which needs two schedules: '
            f'"{minute} {hour} {day} {month} *" and "{minute} {hour} * {month} {weekday}".'
        )
    return " ".join(
        (
            _translated(minute, "minute", fields),
            _translated(hour, "hour", fields),
            _translated(day, "day of month", fields) if weekday == "*" else "?",
            _translated(month, "month", fields),
            _weekdays(weekday, fields) if weekday != "*" else "?",
            "*",
        )
    )


def _translated(field: str, name: str, fields: str) -> str:
    """A field of cron; steps become lists, for AWS steps over a range are not documented."""
    if "/" not in field:
        return field
    return ",".join(str(value) for value in _expanded(field, name, fields))


def _weekdays(field: str, fields: str) -> str:
    """Days by name: both Sundays of cron, 0 and 7, have none of AWS's numbers."""
    chosen = {value % 7 for value in _expanded(field, "day of week", fields)}
    return ",".join(DAYS[day] for day in sorted(chosen))


def _expanded(field: str, name: str, fields: str) -> list[int]:
    """The values of a field of cron: `*/15`, `1-5`, `MON,WED`, `0-30/10`."""
    first, last, names = _CRON[name]
    values: set[int] = set()
    for part in field.split(","):
        span, slash, step = part.partition("/")
        ends = span.split("-")
        try:
            if span == "*":
                # A step through the week ends with Saturday: 7 would be Sunday again.
                low, high = first, 6 if names is DAYS else last
            else:
                low, high = (names.index(end) + first if end in names else int(end) for end in (ends[0], ends[-1]))
            lone_step = slash and span != "*" and len(ends) == 1
            if lone_step or len(ends) > 2 or not first <= low <= high <= last:
                raise ValueError(part)
            values.update(range(low, high + 1, int(step) if slash else 1))
        except ValueError as error:
            raise RequestError(f'"{fields}": {field} is no {name} of a five-field expression; {RIGHT_FORM}.') from error
    return sorted(values)


def _values(timing: Timing, place: str) -> Iterator[list[int]]:
    """The values of the six fields; every value of a `?`."""
    if timing.fields is None:
        raise RequestError(f"{place} cannot keep {timing.expression}: name the times instead; {RIGHT_FORM}.")
    cron = AwsCroniter(timing.fields)
    fields = (cron.minutes, cron.hours, cron.days_of_month, cron.months, cron.days_of_week, cron.years)
    lasts = (None, None, 31, None, 7, None)
    if any(isinstance(value, str) for field in fields for value in field):
        raise RequestError(f'{place} has no L, W or # as "{timing.fields}" has: name the days.')
    if place == "A crontab line" and timing.fields.split()[5] != "*":
        raise RequestError(f'{place} has no year as "{timing.fields}" has: use * for it.')
    return (sorted(set(field)) or list(range(1, (last or 0) + 1)) for field, last in zip(fields, lasts, strict=True))


def _listed(values: list[int], of: int) -> str:
    return "*" if len(values) == of else ",".join(map(str, values))
