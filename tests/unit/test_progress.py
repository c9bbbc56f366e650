"""Progress lines: how often they are printed, and what they show."""

import contextlib
import io
import logging
import re

import pytest

from llm_engineering import progress
from llm_engineering.progress import LINE_EVERY_S, LogHandler, Progress, counted


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
    assert lines(caplog) == ["sft steps: 1 of 2, 1.0 s each, 1 s left — loss 3"]


def test_a_total_of_zero_shows_nothing(clock, caplog):
    with caplog.at_level(logging.INFO):
        Progress("answers", 0).end()
    assert lines(caplog) == []


def test_the_time_left_forgets_a_stall(clock, caplog):
    with caplog.at_level(logging.INFO):
        shown = Progress("answers", 100)
        clock(7200.0)
        shown.advance()
        clock(LINE_EVERY_S)
        shown.advance()
        clock(LINE_EVERY_S)
        shown.advance()
    assert lines(caplog) == [
        "answers: 1 of 100, 7200.0 s each, 198 h 0 min left",
        "answers: 2 of 100, 5.0 s each, 8 min left",
        "answers: 3 of 100, 5.0 s each, 8 min left",
    ]


def test_slow_items_have_the_rate_of_the_last_one(clock, caplog):
    with caplog.at_level(logging.INFO):
        shown = Progress("steps", 4)
        for seconds in (100.0, 100.0, 300.0):
            clock(seconds)
            shown.advance()
    assert lines(caplog)[-1] == "steps: 3 of 4, 300.0 s each, 5 min left"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def columns(monkeypatch):
    """A terminal of 80 columns. tqdm reads the two variables only if both are set."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")


@pytest.mark.usefixtures("columns")
def test_the_bar_keeps_its_width_beside_a_long_note():
    with contextlib.redirect_stderr(Terminal()) as terminal:
        shown = Progress("sft steps", 10)
        shown.advance(5, "loss 1.234, " * 20)
        shown.bar.refresh()
        shown.end()
    drawn = terminal.getvalue().split("\r")
    assert any(re.search(r"50%\|[█#]{10} {10}\| 5/10 ", line) for line in drawn)


@pytest.mark.usefixtures("columns")
def test_a_log_line_stands_above_the_bar():
    with contextlib.redirect_stderr(Terminal()) as terminal:
        handler = LogHandler()
        shown = Progress("sft steps", 10)
        handler.emit(logging.LogRecord("a", logging.INFO, "", 0, "SIGINT: saving", None, None))
        shown.end()
    before, line, after = terminal.getvalue().partition("SIGINT: saving\n")
    assert line
    # The bar's line is overwritten with spaces, and the bar is drawn again below.
    assert re.search(r"\r +\r$", before)
    assert "sft steps: " in after


def test_one_is_not_many():
    assert [counted(count, "row") for count in (0, 1, 2, 1200)] == ["0 rows", "1 row", "2 rows", "1,200 rows"]
