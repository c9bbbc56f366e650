"""Turns a target of the Makefile and its variables into a command: python -m tools.make TARGET [PYTHON-ARGUMENT ...]

Values are passed as environment variables, so that neither make nor a shell expands them. Only the variables that
MAKE_GIVEN lists are used: the Makefile writes into it the variables of make's command line, and CONFIG and ARGS also if
the environment sets them. Other variables may come from the system; WSL, for example, sets NAME.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from llm_engineering.errors import RequestError

GIVEN = "MAKE_GIVEN"


class Target(NamedTuple):
    """The command of a target.

    Attributes:
        command: the words after `llm-engineering`.
        options: variables that become options of the same name.
        argument: variable that becomes the argument.
        default: value of the argument if the variable is not given.
        words: whether the argument is several words, one argument each.
    """

    command: str
    options: tuple[str, ...] = ()
    argument: str | None = None
    default: str = ""
    words: bool = False


_SCHEDULE = ("NAME", "TARGET")
_TIMED = ("CONFIG", *_SCHEDULE, "CRON", "TIMEZONE", "DOCUMENTS")

TARGETS = {
    "run": Target("run", ("CONFIG",), "STAGE"),
    "run-sft": Target("run sft", ("CONFIG",)),
    "run-dpo": Target("run dpo", ("CONFIG",)),
    "retrain": Target("run retrain", ("CONFIG",)),
    "datasets": Target("run datasets", ("CONFIG",)),
    "sweep": Target("sweep", ("CONFIG",)),
    "runs": Target("runs"),
    "dashboard": Target("dashboard"),
    "watch": Target("watch"),
    "inspect": Target("inspect", ("CONFIG",), "DATA"),
    "review": Target("review", ("CONFIG",), "DATA"),
    "push-dataset": Target("push-dataset", ("CONFIG",), "KIND", "instruction"),
    "chat": Target("chat", ("CONFIG", "VERSION", "PROMPT")),
    "compare": Target("compare", ("CONFIG", "VERSION", "PROMPT")),
    "exam": Target("exam", ("CONFIG", "VERSION")),
    "serve": Target("serve", ("CONFIG", "VERSION", "ALSO")),
    "models": Target("models list", ("CONFIG",)),
    "compare-versions": Target("models compare", ("CONFIG",), "VERSIONS", words=True),
    "promote": Target("models promote", ("CONFIG", "NOTE"), "VERSION"),
    "rollback": Target("models rollback", ("CONFIG", "NOTE")),
    "lineage": Target("models lineage", ("CONFIG",), "VERSION"),
    "verify": Target("models verify", ("CONFIG",), "VERSION"),
    "replay": Target("models replay", ("CONFIG",), "VERSION"),
    "evidence": Target("models evidence", ("CONFIG",), "VERSION"),
    "sign": Target("models sign", ("CONFIG",), "VERSION"),
    "delete-version": Target("models delete", ("CONFIG",), "VERSION"),
    "export": Target("models export", ("CONFIG", "VERSION", "FORMAT", "QUANT", "OUTPUT")),
    "push-model": Target("models push", ("CONFIG", "VERSION")),
    "deploy": Target("models deploy", ("CONFIG", "VERSION", "NAME")),
    "undeploy": Target("models undeploy", ("CONFIG", "NAME")),
    "schedule": Target("schedule create", _TIMED),
    "schedules": Target("schedule list", ("TARGET",)),
    "schedule-change": Target("schedule change", _TIMED),
    "schedule-pause": Target("schedule pause", _SCHEDULE),
    "schedule-resume": Target("schedule resume", _SCHEDULE),
    "schedule-run": Target("schedule run", _SCHEDULE),
    "unschedule": Target("schedule remove", _SCHEDULE),
    "preflight": Target("cloud preflight", ("CONFIG",)),
    "image": Target("cloud image"),
    "stack-aws": Target("cloud stack"),
}


def main() -> int:
    """Run the command of a target; returns its exit code."""
    target, *program = sys.argv[1:]
    try:
        if program:
            os.execv(sys.executable, [sys.executable, *program, *extra(os.environ)])  # noqa: S606
        arguments = command(target, os.environ)
    except RequestError as error:
        print(f"Error: {error}", file=sys.stderr)
        return error.exit_code
    from tools.cli import main as run_command

    return run_command(arguments)


def command(target: str, environment: Mapping[str, str]) -> list[str]:
    """The words after `llm-engineering` for a target.

    Raises:
        RequestError: ARGS cannot be split into words.
    """
    words, options, argument, default, several = TARGETS[target]
    given = environment.get(GIVEN, "").split()
    # Joined with "=", because a separate value with a leading hyphen would be read as an option. ARGS come later,
    # because the last value of an option counts.
    named = [f"--{name.lower()}={environment[name]}" for name in options if name in given]
    found = [*words.split(), *named, *extra(environment)]
    if argument is not None:
        value = environment[argument] if argument in given else default
        found += ["--", *(value.split() if several else [value])]
    return found


def extra(environment: Mapping[str, str]) -> Sequence[str]:
    """The words of ARGS, split as by a shell, but without any expansion.

    Raises:
        RequestError: a quote is not closed, or ARGS ends with a backslash.
    """
    text = environment["ARGS"] if "ARGS" in environment.get(GIVEN, "").split() else ""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise RequestError(
            f"ARGS {text} cannot be split into words: {error}. Close the quote, or put a \\ before it."
        ) from error


if __name__ == "__main__":
    sys.exit(main())
