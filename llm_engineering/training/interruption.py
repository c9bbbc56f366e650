"""Ctrl-C and SIGTERM during training: the step is finished, a checkpoint saved, and then the run ends."""

from __future__ import annotations

import logging
import os
import signal
import threading
from types import FrameType
from typing import Any, Self

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llm_engineering.training import ranks

logger = logging.getLogger(__name__)


class Interruption(TrainerCallback):
    """Takes the two signals while it is entered, and gives them back.

    SIGTERM is what systemd, a container's stop and the end of a spot machine send. Python hands signals to the main
    thread alone: in another one nothing is taken. A second signal ends at once, without a checkpoint; not in a process
    that has a launcher, which passes on what the terminal or systemd may have sent to all of them before, and ends them
    itself. Several processes agree at the end of every step: a signal to one of them stops all, at the same step.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._former[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._former.clear()

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if ranks.has_launcher():
                return
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        if not ranks.is_main():
            return
        # Not by the logger, which may be in the middle of a line: a handler must not enter it again.
        os.write(2, f"{self.received.name}: ending after this step, with a checkpoint; again ends now\n".encode())

    def agree(self) -> None:
        """What one process has received, all have received; every process must call it."""
        number = ranks.maximum(self.received or 0)
        self.received = signal.Signals(number) if number else None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop. An evaluation that is due is left out: who sends SIGTERM does not wait long."""
        self.agree()
        if self.received is not None and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False
            logger.info("%s: saving step %d of %d", self.received.name, state.global_step, state.max_steps)
