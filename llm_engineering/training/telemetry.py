"""What a training run tells while it runs: losses, speed and memory, to the log and to trackers."""

from __future__ import annotations

import resource
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llm_engineering.progress import Progress
from llm_engineering.tracking import Trackers


def peak_memory_bytes() -> int:
    """Peak memory of this process: allocated on the card with CUDA, resident otherwise."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass
class Work:
    """What a process has computed, and the seconds it took by part.

    Attributes:
        tokens: real ones, that a row has.
        computed_tokens: those, and padding.
        flops: of the model alone (`TrainingFlops`).
        seconds: `data` (waiting for batches), `forward_backward`, `optimizer`, `eval`, `save`.
    """

    tokens: int = 0
    computed_tokens: int = 0
    flops: float = 0.0
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the time of the `with` block to a part."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - started

    @property
    def step_seconds(self) -> float:
        """Of training steps alone, without evaluation and saving."""
        return sum(self.seconds[part] for part in ("data", "forward_backward", "optimizer"))

    def rates(self, since: Work, peak: float | None) -> dict[str, float]:
        """Between a former state and this one: real tokens a second, share of padding, and MFU where the peak is known.

        MFU is the model's FLOPs a second over the peak of the card (`peak`, FLOP/s).
        """
        seconds, computed = self.step_seconds - since.step_seconds, self.computed_tokens - since.computed_tokens
        if seconds <= 0 or computed <= 0:
            return {}
        tokens = self.tokens - since.tokens
        rates = {"tokens_per_second": tokens / seconds, "padding_share": 1 - tokens / computed}
        if peak is not None:
            rates["mfu"] = (self.flops - since.flops) / seconds / peak
        return rates

    def copy(self) -> Work:
        """A state to compare with later."""
        return replace(self, seconds=self.seconds.copy())


class TelemetryCallback(TrainerCallback):
    """Adds speed, share of padding, MFU and peak memory to every training log entry and passes all on."""

    def __init__(self, stage: str, trackers: Trackers) -> None:
        self.stage = stage
        self.trackers = trackers
        # The trainer's own, as soon as there is one.
        self.work = Work()
        self.logged = Work()
        self.peak_flops: float | None = None
        self.optimizer_started = 0.0
        self.progress: Progress | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the progress of what is left to do."""
        self.progress = Progress(f"{self.stage} steps", state.max_steps - state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count the step."""
        if self.progress is not None:
            self.progress.advance()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock of the optimiser."""
        self.optimizer_started = time.perf_counter()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop it."""
        self.work.seconds["optimizer"] += time.perf_counter() - self.optimizer_started

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Complete the entry, keep it in the trainer's history, and log it."""
        entry = state.log_history[-1]
        if "loss" in entry:
            entry |= self.work.rates(self.logged, self.peak_flops)
            self.logged = self.work.copy()
            entry["peak_memory_bytes"] = peak_memory_bytes()
        names = ("loss", "eval_loss", "learning_rate", "grad_norm", "rewards/accuracies", "rewards/margins")
        shown = [f"{name} {entry[name]:.4g}" for name in (*names, "tokens_per_second", "mfu") if name in entry]
        if shown and self.progress is not None:
            self.progress.say(", ".join(shown))
        self.trackers.log_metrics({f"{self.stage}/{name}": value for name, value in entry.items()}, state.global_step)
