"""Progress lines: how often they are printed, and what they show."""

import logging

import pytest

from llm_engineering import progress
from llm_engineering.progress import LINE_EVERY_S, Progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves forward. Standard error is not a terminal."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: False, raising=False)

    def turn(seconds):
        now[0] += seconds

    return turn


def lines(caplog):
    return [record.getMessage() for record in caplog.records]


def test_lines_are_printed_every_few_seconds_and_never_twice(clock, caplog):
    with caplog.at_level(logging.INFO):
        shown = Progress("sft steps", 100)
        for step in range(1, 101):
            clock(LINE_EVERY_S / 4)
            # Telemetry advances and then adds the note in the same way.
            shown.advance(show=False)
            shown.say(f"loss {step}")
        shown.end()
        shown.end()
    found = lines(caplog)
    assert len(found) == len(set(found)) == 25
    assert found[0].startswith("sft steps: 4 of 100,")
    assert found[0].endswith("— loss 4")
    assert found[-1].startswith("sft steps: 100 of 100,")


def test_the_last_count_of_short_work_is_shown(clock, caplog):
    with caplog.at_level(logging.INFO):
        shown = Progress("sft steps", 2)
        clock(1.0)
        shown.advance(show=False)
        shown.say("loss 3")
        assert lines(caplog) == []
        shown.end()
    assert lines(caplog) == ["sft steps: 1 of 2, 1.0 a second, 1 s left — loss 3"]


def test_a_total_of_zero_shows_nothing(clock, caplog):
    with caplog.at_level(logging.INFO):
        Progress("answers", 0).end()
    assert lines(caplog) == []
