"""Writes each schedule as one line of the user's crontab, which ends with a marking comment. Other lines stay unchanged."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Sequence
from typing import Literal

from llm_engineering.cloud.schedules.cron import Entry, crontab_fields
from llm_engineering.errors import WorkError

_PAUSED = "# paused: "


def write(entry: Entry, paused: bool) -> None:
    """Add or replace the line of a schedule.

    Raises:
        RequestError: cron cannot express the time.
        WorkError: crontab fails.
    """
    variables = [f"{key}={value}" for key, value in sorted(entry.environment.items())]
    start = f"cd {shlex.quote(str(entry.directory))} && {shlex.join(['env', *variables, *entry.command])}"
    line = f"{start} >> {shlex.quote(str(entry.log))} 2>&1 {_mark(entry.name)}".replace(
        "%", r"\%"
    )  # cron reads % as a line break
    others = [other for other in _read() if not _is_of(other, entry.name)]
    _install([*others, f"{_PAUSED if paused else ''}{crontab_fields(entry.timing)} {line}"])


def state(name: str) -> Literal["active", "paused", "lost"]:
    """Whether the line is active; `lost` if the crontab does not have it."""
    own = [line for line in _read() if _is_of(line, name)]
    if not own:
        return "lost"
    return "paused" if own[0].startswith(_PAUSED) else "active"


def set_paused(name: str, paused: bool) -> None:
    """Comment the line out, or make it active again."""

    def changed(line: str) -> str:
        return (_PAUSED if paused else "") + line.removeprefix(_PAUSED)

    _install([changed(line) if _is_of(line, name) else line for line in _read()])


def remove(name: str) -> None:
    """Remove the line. If there is no line, nothing changes."""
    lines = _read()
    others = [line for line in lines if not _is_of(line, name)]
    if others != lines:
        _install(others)


def _read() -> list[str]:
    done = subprocess.run(["crontab", "-l"], capture_output=True, text=True)  # noqa: S607
    if done.returncode and "no crontab" not in done.stderr.lower():
        raise WorkError(f"crontab -l failed: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return [] if done.returncode else done.stdout.splitlines()


def _install(lines: Sequence[str]) -> None:
    # An empty crontab is removed.
    command = ["crontab", "-"] if lines else ["crontab", "-r"]
    done = subprocess.run(command, input="".join(f"{line}\n" for line in lines), capture_output=True, text=True)
    if done.returncode:
        raise WorkError(f"{' '.join(command)} failed: {done.stderr.strip() or f'exit code {done.returncode}'}")


def _mark(name: str) -> str:
    return f"# {name}"


def _is_of(line: str, name: str) -> bool:
    return line.endswith(f" 2>&1 {_mark(name)}")
