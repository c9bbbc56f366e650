"""Writes schedules as timers of systemd's user instance (systemd.timer(5)): a `.service` with the command, and a `.timer`."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from llm_engineering.cloud.schedules.cron import Entry, on_calendar
from llm_engineering.errors import WorkError


def is_there() -> bool:
    """Whether systemd answers for this user. It does not answer in containers and after su."""
    if shutil.which("systemctl") is None:
        return False
    return subprocess.run(["systemctl", "--user", "show-environment"], capture_output=True).returncode == 0  # noqa: S607


def write(entry: Entry, paused: bool) -> None:
    """Add or replace the units of a schedule.

    Raises:
        RequestError: systemd cannot express the time.
        WorkError: systemctl fails.
    """
    variables = "".join(
        f"Environment={_quoted([f'{key}={value}'])}\n" for key, value in sorted(entry.environment.items())
    )
    output = str(entry.log).replace("%", "%%")
    service = (
        f"[Unit]\nDescription={entry.name}\n\n"
        f"[Service]\nType=oneshot\nWorkingDirectory={str(entry.directory).replace('%', '%%')}\n{variables}"
        f"ExecStart={_quoted([word.replace('$', '$$') for word in entry.command])}\n"
        f"StandardOutput=append:{output}\nStandardError=append:{output}\n"
        # Saving a checkpoint of a large model takes longer than systemd's default of 90 seconds.
        "TimeoutStopSec=600\n"
    )
    timer = (
        f"[Unit]\nDescription={entry.name}\n\n"
        f"[Timer]\nOnCalendar={on_calendar(entry.timing)}\nAccuracySec=1\n\n"
        "[Install]\nWantedBy=timers.target\n"
    )
    _folder().mkdir(parents=True, exist_ok=True)
    _unit(entry.name, "service").write_text(service, encoding="utf-8")
    _unit(entry.name, "timer").write_text(timer, encoding="utf-8")
    _systemctl("daemon-reload")
    if not paused:
        _systemctl("enable", f"{entry.name}.timer")
        # An active timer keeps its old time until it is restarted.
        _systemctl("restart", f"{entry.name}.timer")


def state(name: str) -> Literal["active", "paused", "lost"]:
    """Whether the timer is enabled; `lost` if its unit does not exist."""
    if not _unit(name, "timer").is_file():
        return "lost"
    command = ["systemctl", "--user", "is-enabled", "--quiet", f"{name}.timer"]
    return "active" if subprocess.run(command, capture_output=True).returncode == 0 else "paused"


def set_paused(name: str, paused: bool) -> None:
    """Disable or enable the timer."""
    _systemctl("disable" if paused else "enable", "--now", f"{name}.timer")


def remove(name: str) -> None:
    """Remove both units."""
    if state(name) == "active":
        set_paused(name, True)
    for kind in ("timer", "service"):
        _unit(name, kind).unlink(missing_ok=True)
    _systemctl("daemon-reload")


def _folder() -> Path:
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "systemd" / "user"


def _unit(name: str, kind: str) -> Path:
    return _folder() / f"{name}.{kind}"


def _quoted(words: Sequence[str]) -> str:
    """Quote words for a unit file (systemd.service(5), "Command lines")."""
    escaped = (word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%") for word in words)
    return " ".join(f'"{word}"' for word in escaped)


def _systemctl(*arguments: str) -> None:
    command = ["systemctl", "--user", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise WorkError(f"{' '.join(command)} failed: {done.stderr.strip() or f'exit code {done.returncode}'}")
