"""Times of schedules: accepted, translated and refused expressions, and next times against a calendar."""

import shutil
import subprocess
from datetime import UTC, datetime, timedelta

import pytest

from llm_engineering.cloud.schedules.cron import Timing, crontab_fields, on_calendar, parse_timing
from llm_engineering.errors import RequestError

# A Monday.
NOW = datetime(2026, 11, 23, 15, 40, tzinfo=UTC)


def parse(text: str, timezone: str = "UTC") -> Timing:
    return parse_timing(text, timezone, NOW)


def fires(text: str, count: int = 3, timezone: str = "UTC", after: datetime = NOW) -> list[str]:
    return [f"{time:%a %Y-%m-%d %H:%M%z}" for time in parse(text, timezone).next_times(after, count)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0 3 ? * SUN *", "cron(0 3 ? * SUN *)"),
        ("cron(0 3 ? * sun *)", "cron(0 3 ? * SUN *)"),
        ("0  3 1 * ?   *", "cron(0 3 1 * ? *)"),
        # Sunday is 0 or 7 for cron and 1 for AWS; Monday to Friday are 1-5 and 2-6.
        ("0 3 * * 0", "cron(0 3 ? * SUN *)"),
        ("0 3 * * 7", "cron(0 3 ? * SUN *)"),
        ("0 3 * * 1-5", "cron(0 3 ? * MON,TUE,WED,THU,FRI *)"),
        ("0 3 * * 5-7", "cron(0 3 ? * SUN,FRI,SAT *)"),
        ("0 3 * * */2", "cron(0 3 ? * SUN,TUE,THU,SAT *)"),
        ("0 3 * * mon,fri", "cron(0 3 ? * MON,FRI *)"),
        ("0 3 * * *", "cron(0 3 * * ? *)"),
        ("0 3 15 JAN *", "cron(0 3 15 1 ? *)"),
        ("*/20 0-12/6 * * *", "cron(0,20,40 0,6,12 * * ? *)"),
        ("5/10 3 * * *", "cron(5,15,25,35,45,55 3 * * ? *)"),
        ("0 3 * * *,1", "cron(0 3 * * ? *)"),
        ("@weekly", "cron(0 0 ? * SUN *)"),
        ("rate(7 days)", "rate(7 days)"),
        ("rate(1 day)", "rate(1 day)"),
    ],
)
def test_expressions_in_eventbridge_form(text, expected):
    assert parse(text).expression == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0 3 * * SUN *", '"0 3 ? * SUN *"'),
        ("0 3 * * * *", '"0 3 * * ? *"'),
        ("0 3 1 * SUN *", "exactly one of them must be ?"),
        ("0 3 ? * ? *", "exactly one of them must be ?"),
        ("0 3 ? * SUN", '"0 3 ? * SUN *"'),
        ("0 3 1 * 0", '"0 3 1 * *" and "0 3 * * 0"'),
        ("60 3 * * ? *", "minute"),
        ("0 24 * * ? *", "hour"),
        ("0 3 ? * 0 *", "day-of-week"),
        ("0 3 ? * 8 *", "day-of-week"),
        ("0 3 ? * LOTS *", "day-of-week"),
        ("0/0 3 * * ? *", "cannot be read"),
        ("0 3 LW * ? *", "cannot be read"),
        ("0 3 * * 8", "is not a time ([0 3 * * 8] is not acceptable, out of range)"),
        ("MON-FRI/2 3 * * *", "is not a time"),
        ("*/0 3 * * *", "step '0' in field 0 is not acceptable"),
        *((text, "is not a time") for text in ("0 3 15W * *", "0 3 L * *", "0 3 * * 1#1", "R 3 * * *", "0 3 * R *")),
        ("0 3 30 2 ? *", "never fires"),
        ("0 3 1 1 ? 2020", "never fires"),
        ("0 3 *", "3 fields instead of 6"),
        ("", "0 fields instead of 6"),
        ("@reboot", "is not a time"),
        ("at(2027-01-01T00:00:00)", "fires only once"),
        ("rate(1 days)", "not a rate"),
        ("rate(7 day)", "not a rate"),
        ("rate(0 days)", "not a rate"),
        ("rate(2 weeks)", "not a rate"),
    ],
)
def test_wrong_expressions_are_refused_with_the_right_form(text, said):
    with pytest.raises(RequestError) as refused:
        parse(text)
    assert said in str(refused.value)


def test_unknown_timezone_is_refused():
    for timezone in ("Europe/Atlantis", "", "../etc/passwd"):
        with pytest.raises(RequestError, match="timezone"):
            parse("0 3 * * ? *", timezone)


def test_next_times():
    assert fires("0 3 ? * SUN *") == [
        "Sun 2026-11-29 03:00+0000",
        "Sun 2026-12-06 03:00+0000",
        "Sun 2026-12-13 03:00+0000",
    ]
    assert fires("30 6 L * ? *", 2) == ["Mon 2026-11-30 06:30+0000", "Thu 2026-12-31 06:30+0000"]
    assert fires("0 3 ? * 2#1 *", 1) == ["Mon 2026-12-07 03:00+0000"]
    assert fires("0 3 29 2 ? *", 1) == ["Tue 2028-02-29 03:00+0000"]
    assert fires("0 3 1 1 ? 2027", 3) == ["Fri 2027-01-01 03:00+0000"]


def test_times_are_in_the_timezone_of_the_schedule():
    # 15:40 in UTC is past 3 o'clock in Tokyo, where it is the 24th already.
    assert fires("0 3 * * ? *", 1, "Asia/Tokyo") == ["Tue 2026-11-24 03:00+0900"]
    assert fires("45 15 * * ? *", 1, "UTC") == ["Mon 2026-11-23 15:45+0000"]


def test_a_time_that_summer_time_skips_does_not_fire_and_a_repeated_time_fires_once():
    # Berlin goes from 02:00 to 03:00 on 28 March 2027, and back from 03:00 to 02:00 on 31 October 2027.
    spring = datetime(2027, 3, 27, 12, 0, tzinfo=UTC)
    assert fires("30 2 * * ? *", 2, "Europe/Berlin", spring) == [
        "Mon 2027-03-29 02:30+0200",
        "Tue 2027-03-30 02:30+0200",
    ]
    autumn = datetime(2027, 10, 30, 12, 0, tzinfo=UTC)
    assert fires("30 2 * * ? *", 2, "Europe/Berlin", autumn) == [
        "Sun 2027-10-31 02:30+0200",
        "Mon 2027-11-01 02:30+0100",
    ]


def test_a_rate_counts_from_the_creation():
    timing, created = parse("rate(7 days)"), NOW - timedelta(days=8)
    assert timing.next_times(NOW, 2, created) == [created + timedelta(days=14), created + timedelta(days=21)]


@pytest.mark.parametrize(
    ("text", "line", "calendar"),
    [
        ("0 3 ? * SUN *", "0 3 * * 0", "Sun *-*-* 3:0:00 UTC"),
        ("0 3 ? * 2-6 *", "0 3 * * 1,2,3,4,5", "Mon,Tue,Wed,Thu,Fri *-*-* 3:0:00 UTC"),
        ("0/15 * 1,15 MAR ? *", "0,15,30,45 * 1,15 3 *", "*-3-1,15 *:0,15,30,45:00 UTC"),
    ],
)
def test_expressions_for_cron_and_systemd(text, line, calendar):
    assert crontab_fields(parse(text)) == line
    assert on_calendar(parse(text)) == calendar


def test_times_that_cron_or_systemd_cannot_express_are_refused():
    for text in ("0 3 L * ? *", "0 3 ? * 2#1 *", "rate(7 days)", "0 3 1 1 ? 2027-2030"):
        with pytest.raises(RequestError):
            crontab_fields(parse(text))
    for text in ("0 3 15W * ? *", "rate(7 days)"):
        with pytest.raises(RequestError):
            on_calendar(parse(text))


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
@pytest.mark.parametrize("text", ["0 3 ? * SUN *", "*/20 4 * * *", "0 3 1 1-3 ? 2027-2029", "15 2 31 * ? *"])
def test_systemd_reads_the_same_time(text):
    timing = parse(text, "Europe/Berlin")
    command = ["systemd-analyze", "calendar", "--base-time=2026-11-23 15:40:00 UTC", on_calendar(timing)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, env={"TZ": "UTC", "LC_ALL": "C"}).stdout
    (following,) = timing.next_times(NOW, 1)
    assert f"{following.astimezone(UTC):%Y-%m-%d %H:%M}:00 UTC" in shown


def test_the_last_day_of_the_week_is_saturday():
    timing = parse("0 3 ? * L *")
    assert [time.strftime("%a %d") for time in timing.next_times(NOW, 2)] == ["Sat 28", "Sat 05"]
    assert crontab_fields(timing) == "0 3 * * 6"
