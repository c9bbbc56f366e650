"""Times the last epoch of any training with transformers' trainer."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import TrainerCallback


class LastEpoch(TrainerCallback):
    """Seconds from the beginning of the last epoch to the end of its last step, and its losses.

    In an epoch every row is trained once, however batches are made of them; what is compiled and allocated on the way
    is so in the first one.
    """

    def __init__(self) -> None:
        self.started = self.ended = 0.0
        self.losses: list[float] = []

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start anew: there was no later epoch so far."""
        self.losses = []
        self.started = _now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop; a later step stops later."""
        self.ended = _now()

    def on_log(self, *args: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Keep the loss of a step, where the entry is one of a step."""
        if logs is not None and "loss" in logs:
            self.losses.append(float(logs["loss"]))

    def figures(self) -> dict[str, float | None]:
        """`last_epoch_seconds`, and `train_loss`: the mean of the last epoch's logged losses, None if none was logged."""
        mean = sum(self.losses) / len(self.losses) if self.losses else None
        return {"last_epoch_seconds": self.ended - self.started, "train_loss": mean}


def _now() -> float:
    """Seconds, after all that the card was told to do is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
