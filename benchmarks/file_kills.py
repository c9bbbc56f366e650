"""Ends a process at each of its file operations, and runs the same work again: python -m benchmarks.file_kills [--write]

The second run must end with the bytes of a run that nothing interrupted, without a further file, and without repeating what
the first run had finished. The same holds if the disk is full from an operation on, and if the clock has jumped by a day
before the kill. `file_faults.c` counts the operations of the process and makes them fail, also those of libraries in C++ and
Rust. Each process is forked from this one, which has imported everything and computed nothing.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.machine import machine, show

RESULTS = Path(__file__).parent / "results" / "file_kills.json"
_SOURCE = Path(__file__).with_name("file_faults.c")
_LIBRARY = "FILE_FAULTS"
_KILL, _FULL = 1, 2
_DAY_S = 86_400
# The faults: what happens at an operation, and by how much the clock jumps at the operation half as far.
FAULTS = {"kill": (_KILL, 0), "full": (_FULL, 0), "back": (_KILL, -_DAY_S), "ahead": (_KILL, _DAY_S)}
# Operations that fail on a full disk.
_TAKE_SPACE = ("open", "write", "mkdir")

Did = Callable[[str], None]


def names(folder: Path) -> list[str]:
    """The names of all files and folders below a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@dataclass(frozen=True)
class Work:
    """Something that a command does with files.

    Attributes:
        run: does the work in a folder. It finds what an interrupted run left there, and calls `did` with the name of each
            part that is finished and never to be repeated.
        result: what must be equal after every interruption, besides the names of the files.
        prepare: writes the files that are there before.
        files: the names of the files, which must be equal after every interruption too.
        faults: the faults that it meets.
        varies: whether the number of its operations differs a little in each run.
    """

    name: str
    run: Callable[[Path, Did], None]
    result: Callable[[Path], Any]
    prepare: Callable[[Path], None] = lambda _: None
    files: Callable[[Path], list[str]] = names
    faults: Sequence[str] = tuple(FAULTS)
    varies: bool = False


class Ended(NamedTuple):
    """A process that has ended: its exit code, its file operations as `kind path`, the parts that it finished, its error."""

    code: int
    operations: list[str]
    done: list[str]
    error: str


def main() -> None:
    """Interrupt the works, and print how many operations were met and survived."""
    from benchmarks.killed_run import RUN
    from benchmarks.killed_works import WORKS

    known = {**WORKS, RUN.name: RUN}
    logging.disable(logging.WARNING)
    parser = argparse.ArgumentParser(description="Interrupt each file operation.")
    parser.add_argument("--works", default=",".join(known), help=f"some of {', '.join(known)}")
    parser.add_argument("--draw", type=int, help="number of interruptions that are drawn instead of all")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    arguments = parser.parse_args()
    works = [known[name] for name in arguments.works.split(",")]
    figures = interrupt_all(works, arguments.draw, arguments.seed)
    show(figures | {"machine": machine()}, RESULTS if arguments.write else None)
    sys.exit(bool(figures["failures"]))


def with_faults() -> None:
    """Start this program again with `file_faults.c` loaded, unless it is."""
    if _LIBRARY in os.environ:
        return
    with tempfile.TemporaryDirectory() as folder:
        library = str(Path(folder) / "file_faults.so")
        subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", library, str(_SOURCE)], check=True)  # noqa: S607
        environment = {**os.environ, "LD_PRELOAD": library, _LIBRARY: library, "TMPDIR": folder, "OMP_NUM_THREADS": "1"}
        environment |= {"TOKENIZERS_PARALLELISM": "false"}
        module = sys.modules["__main__"].__spec__
        assert module is not None
        program = [sys.executable, "-m", module.name, *sys.argv[1:]]
        sys.exit(subprocess.run(program, env=environment, check=False).returncode)


def interrupt_all(works: Sequence[Work], draw: int | None = None, seed: int = 0) -> dict[str, Any]:
    """Interrupt works at every file operation, or at `draw` of them, spread over works, faults and kinds of operations.

    Returns:
        Counts of operations and interruptions by work, kind and fault, and the failures in words.
    """
    started = time.monotonic()
    tried: Counter[str] = Counter()
    survived: Counter[str] = Counter()
    counts: dict[str, Any] = {}
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        trials = {work.name: Trial(work, Path(scratch) / work.name) for work in works}
        planned = [
            (work, fault, number, operation.partition(" ")[0])
            for work, trial in trials.items()
            for fault in trial.work.faults
            for number, operation in enumerate(trial.whole.operations, 1)
            if fault != "full" or operation.startswith(_TAKE_SPACE)
        ]
        if draw is not None:
            planned = _drawn(planned, draw, random.Random(seed))
        for work, fault, number, kind in planned:
            problem = trials[work].interrupt(fault, number)
            if problem is None:
                continue
            about = (f"work {work}", f"fault {fault}", f"operation {kind}")
            tried.update(about)
            if not problem:
                survived.update(about)
            else:
                operation = trials[work].whole.operations[number - 1]
                failures.append(f"{work}, {fault} at operation {number}, {operation}: {problem}")
                print(failures[-1], file=sys.stderr, flush=True)
        counts = {
            name: Counter(operation.partition(" ")[0] for operation in trial.whole.operations)
            for name, trial in trials.items()
        }
    return {
        "operations": sum((count.total() for count in counts.values()), 0),
        "operations_by_work_and_kind": counts,
        "interrupted": sum(tried[f"work {work.name}"] for work in works),
        "survived": sum(survived[f"work {work.name}"] for work in works),
        "interrupted_by": dict(sorted(tried.items())),
        "survived_by": dict(sorted(survived.items())),
        "failures": failures,
        "seconds": round(time.monotonic() - started, 1),
    }


def _drawn(
    planned: Sequence[tuple[str, str, int, str]], count: int, rng: random.Random
) -> list[tuple[str, str, int, str]]:
    """So many of the interruptions: each next one has the work, the fault and the kind that were drawn least before."""
    rest = rng.sample(list(planned), len(planned))
    drawn: list[tuple[str, str, int, str]] = []
    used: Counter[str] = Counter()
    while rest and len(drawn) < count:
        drawn.append(min(rest, key=lambda trial: used[trial[0]] + used[trial[1]] + used[trial[3]]))
        rest.remove(drawn[-1])
        used.update((drawn[-1][0], drawn[-1][1], drawn[-1][3]))
    return drawn


class Trial:
    """A work, and how a run that nothing interrupts ends.

    Raises:
        AssertionError: that run fails, or its repetition ends with another result.
    """

    def __init__(self, work: Work, folder: Path) -> None:
        self.work, self.folder = work, folder
        self._faults = ctypes.CDLL(os.environ[_LIBRARY])
        self._before = folder.with_suffix(".before")
        self._before.mkdir(parents=True)
        # In a process of its own too: a thread that a library starts would be missing in the processes that are forked later.
        process = os.fork()
        if process == 0:
            # The figures alone are on stdout.
            os.dup2(2, 1)
            work.prepare(self._before)
            os._exit(0)
        assert os.waitpid(process, 0)[1] == 0, f"{work.name} cannot be prepared"
        self.wanted: tuple[Any, list[str]] | None = None
        for _ in range(2):
            self._clear()
            self.whole = self._start(0, 0, 0)
            assert self.whole.code == 0, f"{work.name} fails: {self.whole.error}"
            found = self._found()
            assert self.wanted in (None, found), f"{work.name} has another result each time"
            self.wanted = found

    def interrupt(self, fault: str, number: int) -> str | None:
        """Run the work with a fault at an operation, and then without; returns what is wrong afterwards, or an empty text.

        None: a work whose number of operations varies ended before this operation.
        """
        kind, jump = FAULTS[fault]
        self._clear()
        first = self._start(kind, number, jump)
        if self.work.varies and first.code == 0 and len(first.operations) < number:
            return None
        if kind == _KILL and first.code != -signal.SIGKILL:
            return f"the process was not killed and ended with {first.code} {first.error}"
        if kind == _FULL and first.code == 0 and self._found() != self.wanted:
            return "the work ended well on a full disk, and with another result"
        if kind == _FULL and first.code < 0:
            return f"the full disk ended the process with signal {-first.code}"
        again = self._start(0, 0, 0)
        if again.code != 0:
            return f"the second run fails: {again.error}"
        repeated = sorted(set(first.done) & set(again.done))
        if repeated:
            return f"the second run repeats {', '.join(repeated)}"
        result, files = self._found()
        assert self.wanted is not None
        if files != self.wanted[1]:
            return f"other files: {sorted(set(files) ^ set(self.wanted[1]))}"
        return "" if result == self.wanted[0] else "another result"

    def _clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self._before, self.folder)

    def _found(self) -> tuple[Any, list[str]]:
        return self.work.result(self.folder), self.work.files(self.folder)

    def _start(self, fault: int, number: int, jump: int) -> Ended:
        """Run the work in a forked process until it ends."""
        log, errors = self.folder.with_suffix(".log"), self.folder.with_suffix(".err")
        process = os.fork()
        if process == 0:
            code = 1
            written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
            stream = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(stream, 1), os.dup2(stream, 2)
            try:
                seconds = ctypes.c_long(jump)
                half = ctypes.c_long(max(1, number // 2))
                self._faults.arm(os.fsencode(self.folder), written, fault, ctypes.c_long(number), half, seconds)
                self.work.run(self.folder, partial(_note, written))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        lines = log.read_text(encoding="utf-8").splitlines()
        told = errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return Ended(
            code,
            [line for line in lines if not line.startswith("did ")],
            [line[4:] for line in lines if line.startswith("did ")],
            told[-1] if told else "",
        )


def _note(log: int, part: str) -> None:
    os.write(log, f"did {part}\n".encode())


if __name__ == "__main__":
    with_faults()
    main()
