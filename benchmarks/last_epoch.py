"""Times the last epoch of a training run with transformers' trainer."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import TrainerCallback


class LastEpoch(TrainerCallback):
    """Measures the seconds from the start of the last epoch to the end of its last step, and its losses.

    An epoch trains each row once, for any batch size. Compilation and allocation happen in the first epoch.
    """

    def __init__(self) -> None:
        self.started = self.ended = 0.0
        self.losses: list[float] = []

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start again, because this may be the last epoch."""
        self.losses = []
        self.started = _now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Record the time, because this may be the last step."""
        self.ended = _now()

    def on_log(self, *args: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Record the loss, if the entry is that of a training step."""
        if logs is not None and "loss" in logs:
            self.losses.append(float(logs["loss"]))

    def figures(self) -> dict[str, float | None]:
        """`last_epoch_seconds`, and `train_loss`: the mean logged loss of the last epoch, or None."""
        mean = sum(self.losses) / len(self.losses) if self.losses else None
        return {"last_epoch_seconds": self.ended - self.started, "train_loss": mean}


def _now() -> float:
    """Seconds of the clock, after the GPU has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
