"""Runs processes that belong together: their output is shown, signals are passed on, and they end together."""

from __future__ import annotations

import logging
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from llm_engineering.errors import INTERRUPTED
from llm_engineering.training.interruption import Interruption

logger = logging.getLogger(__name__)

# When one process has failed, the others are given this long to end: most wait for it in vain.
GRACE_S = 5.0
_LOOK_EVERY_S = 0.1


class Ended(NamedTuple):
    """How processes ended.

    Attributes:
        codes: their exit codes in order; that of a signal is its number below zero, as in subprocess.
        killed: those that a signal ended which did not come from here.
        received: the signal that this process was sent meanwhile, and passed on.
    """

    codes: list[int]
    killed: list[int]
    received: signal.Signals | None


def run_processes(command: Sequence[str], environments: Sequence[Mapping[str, str]]) -> Ended:
    """Run a command once for each environment, to the end of all.

    What they write is logged line by line. SIGINT and SIGTERM reach them as one SIGTERM. When one fails, the others
    have `GRACE_S` to end. Whatever happens here, none of them is left.

    Raises:
        KeyboardInterrupt: a second signal.
    """
    with Interruption() as interruption, _started(command, environments) as processes:
        lines = _Lines(processes)
        killed: set[int] = set()
        passed_on, ends_at = False, float("inf")
        while any(process.poll() is None for process in processes):
            lines.show(_LOOK_EVERY_S)
            if interruption.received is not None and not passed_on:
                passed_on = True
                for process in processes:
                    process.terminate()
            codes = [process.poll() for process in processes]
            if ends_at == float("inf") and any(code not in (None, 0, INTERRUPTED) for code in codes):
                ends_at = time.monotonic() + GRACE_S
            if time.monotonic() < ends_at:
                killed |= {number for number, code in enumerate(codes) if code is not None and code < 0}
            else:
                for process in processes:
                    process.kill()
        while lines.show(0):
            pass
        return Ended([process.wait() for process in processes], sorted(killed), interruption.received)


@contextmanager
def _started(
    command: Sequence[str], environments: Sequence[Mapping[str, str]]
) -> Iterator[list[subprocess.Popen[bytes]]]:
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for environment in environments:
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                # Not the terminal's: what it sends comes from here, once.
                start_new_session=True,
            )
            processes.append(process)
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


class _Lines:
    """Reads whole lines of several processes and logs them, in the calling thread: ZenML keeps the log of that one."""

    def __init__(self, processes: Sequence[subprocess.Popen[bytes]]) -> None:
        self.selector = selectors.DefaultSelector()
        self.rests: dict[int, bytes] = {}
        for process in processes:
            assert process.stdout is not None
            self.selector.register(process.stdout, selectors.EVENT_READ)
            self.rests[process.stdout.fileno()] = b""

    def show(self, wait_s: float) -> bool:
        """Log what is there, after waiting at most so long for it; False if nothing was."""
        if not self.rests:
            time.sleep(wait_s)
            return False
        ready = self.selector.select(wait_s)
        for key, _ in ready:
            read = os.read(key.fd, 2**16)
            *lines, self.rests[key.fd] = (self.rests[key.fd] + read).split(b"\n")
            if not read:
                self.selector.unregister(key.fileobj)
                last = self.rests.pop(key.fd)
                lines += [last] if last else []
            for line in lines:
                logger.info("%s", line.decode(errors="replace").rstrip())
        return bool(ready)
