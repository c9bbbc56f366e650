"""The history of a run in a file beside its checkpoints, so that `watch` can show it while the run trains."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llm_engineering.process import is_running, this_process

logger = logging.getLogger(__name__)

LIVE_FILE = "live.jsonl"
# The rate of the steps is that of the last entries, because a mean over all steps would count a pause to the end.
_RATE_ENTRIES = 10


class LiveHistory:
    """Writes the entries of a trainer's history as JSON lines. The first line describes the run and its process.

    A run that resumes writes the file again, with the entries before its checkpoint.
    """

    def __init__(self, folder: Path, stage: str, max_steps: int, earlier: Sequence[Mapping[str, Any]]) -> None:
        self.path = folder / LIVE_FILE
        self._write("w", [{"stage": stage, "max_steps": max_steps, **this_process()}, *earlier])

    def add(self, entry: Mapping[str, Any]) -> None:
        """Append an entry, with the time in seconds since the epoch."""
        self._write("a", [{**entry, "time": time.time()}])

    def end(self) -> None:
        """Mark the run as ended."""
        self._write("a", [{"ended": time.time()}])

    def _write(self, mode: str, lines: Sequence[Mapping[str, Any]]) -> None:
        try:
            with self.path.open(mode, encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
        except OSError as error:
            logger.warning("%s cannot be written (%s); training continues", self.path, error.strerror)


class LiveRun(NamedTuple):
    """A run as its file describes it.

    Attributes:
        history: the entries of the trainer's history.
        is_training: whether its process still runs and has not ended the training.
        seconds_left: until the last step, from the rate of the last steps; None if it is not known.
    """

    folder: Path
    stage: str
    max_steps: int
    history: list[dict[str, Any]]
    is_training: bool
    seconds_left: float | None


def read_live(path: Path) -> LiveRun | None:
    """Read a live file; None if its first line is not written yet. A last line that is not complete is left out."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    if not lines:
        return None
    run, history = lines[0], [line for line in lines[1:] if "ended" not in line]
    timed = [entry for entry in history if "time" in entry and "loss" in entry][-_RATE_ENTRIES:]
    left = None
    if timed and timed[-1]["step"] > timed[0]["step"]:
        each = (timed[-1]["time"] - timed[0]["time"]) / (timed[-1]["step"] - timed[0]["step"])
        left = each * (run["max_steps"] - timed[-1]["step"])
    alive = len(history) == len(lines) - 1 and bool(is_running(run))
    return LiveRun(path.parent, run["stage"], run["max_steps"], history, alive, left)
