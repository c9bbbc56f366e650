"""The record of a process, by which a later command finds out whether that process still runs."""

import os
import socket
from collections.abc import Mapping
from typing import Any

import psutil

PROCESS = "process"
# The system records a process's start in clock ticks since boot, and the boot time only to one second. So two readings
# of the same start time can differ.
_START_TOLERANCE_S = 2.0


def this_process() -> dict[str, Any]:
    """Host, process id and start time of this process. The id alone is not enough, because the system reuses ids."""
    return {PROCESS: {"host": socket.gethostname(), "pid": os.getpid(), "started": psutil.Process().create_time()}}


def is_running(recorded: Mapping[str, Any]) -> bool | None:
    """Whether the process that `this_process` recorded still runs; None if there is no record, or one of another host."""
    process = recorded.get(PROCESS)
    if process is None or process["host"] != socket.gethostname():
        return None
    try:
        found = psutil.Process(process["pid"])
        started = abs(found.create_time() - process["started"]) <= _START_TOLERANCE_S
        return started and found.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
