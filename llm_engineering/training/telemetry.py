"""What a training run tells while it runs: losses, speed and memory, to the log and to trackers."""

from __future__ import annotations

import resource
import time
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


class TelemetryCallback(TrainerCallback):
    """Adds `tokens_per_second` and `peak_memory_bytes` to every training log entry and passes all on.

    Tokens are real ones, not padding: TRL counts them by the attention mask, or the packed length.
    Time is that of training steps alone, without evaluation and saving.
    """

    def __init__(self, stage: str, trackers: Trackers) -> None:
        self.stage = stage
        self.trackers = trackers
        self.step_started = 0.0
        self.seconds_since_log = 0.0
        self.seconds = 0.0
        self.tokens_logged = 0.0
        self.tokens = 0.0
        self.progress: Progress | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the progress of what is left to do."""
        self.progress = Progress(f"{self.stage} steps", state.max_steps - state.global_step)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock of a step."""
        self.step_started = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop the clock of a step."""
        self.seconds_since_log += time.perf_counter() - self.step_started
        if self.progress is not None:
            self.progress.advance()

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
            if "num_tokens" in entry and self.seconds_since_log > 0:
                new = entry["num_tokens"] - self.tokens_logged
                self.tokens_logged = entry["num_tokens"]
                entry["tokens_per_second"] = new / self.seconds_since_log
                self.tokens += new
                self.seconds += self.seconds_since_log
                self.seconds_since_log = 0.0
            entry["peak_memory_bytes"] = peak_memory_bytes()
        names = ("loss", "eval_loss", "learning_rate", "grad_norm", "rewards/accuracies", "rewards/margins")
        shown = [f"{name} {entry[name]:.4g}" for name in (*names, "tokens_per_second") if name in entry]
        if shown and self.progress is not None:
            self.progress.say(", ".join(shown))
        self.trackers.log_metrics({f"{self.stage}/{name}": value for name, value in entry.items()}, state.global_step)

    @property
    def tokens_per_second(self) -> float:
        """Real tokens a second over all logged steps of this process."""
        return self.tokens / self.seconds if self.seconds else 0.0
