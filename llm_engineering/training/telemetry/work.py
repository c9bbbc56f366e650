"""Measures a training run while it runs: losses, tokens per second, memory, and model FLOPS utilisation (MFU)."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llm_engineering.progress import Progress
from llm_engineering.training.telemetry.live import LiveHistory
from llm_engineering.training.telemetry.tracking import Trackers


def peak_memory_bytes() -> int:
    """Peak memory of this process in bytes: allocated GPU memory with CUDA, resident memory otherwise."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return peak_resident_bytes()


def peak_resident_bytes() -> int:
    """Peak resident memory of this process in bytes."""
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def environment() -> dict[str, Any]:
    """The machine and the software of this process, which decide the last bits of a training.

    Returns:
        `processor` with the instructions that torch uses, `gpu` (empty on a CPU), `threads` of torch, `python`, `system`, and
        `packages`: the version of every installed package by its name.
    """
    return {
        "processor": f"{_processor()} ({torch.backends.cpu.get_cpu_capability()})",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": dict(installed_packages()),
    }


@functools.cache
def installed_packages() -> tuple[tuple[str, str], ...]:
    """The name and version of every installed package, sorted. Cached, because it parses the metadata of each package."""
    found = {one.name: one.version for one in importlib.metadata.distributions()}
    return tuple(sorted(found.items()))


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor())


@dataclass
class Work:
    """The work of a process so far.

    Attributes:
        tokens: tokens without padding.
        computed_tokens: tokens with padding.
        flops: operations of the model (`TrainingFlops`).
        seconds: time by part: `data` (waiting for batches), `generate` (completions and their rewards),
            `forward_backward`, `optimizer`, `eval`, `save`.
    """

    tokens: int = 0
    computed_tokens: int = 0
    flops: float = 0.0
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the time of the `with` block to a part, also if the block fails."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - started

    @property
    def step_seconds(self) -> float:
        """Seconds of training steps, without evaluation and saving."""
        return sum(self.seconds.get(part, 0.0) for part in ("data", "generate", "forward_backward", "optimizer"))

    def rates(self, since: Work, peak: float | None) -> dict[str, float]:
        """Rates between an earlier state and this one; empty if no training step lies between them.

        Args:
            peak: peak of the GPU in FLOP/s; None if unknown.

        Returns:
            `tokens_per_second` without padding, `padding_share`, and with a known peak `mfu`: the model's FLOP/s
            divided by the peak.
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
        """Copy this state, to compute rates since then later."""
        return replace(self, seconds=self.seconds.copy())


class TelemetryCallback(TrainerCallback):
    """Adds speed, padding share, MFU and peak memory to each log entry, and sends it to the trackers and the log."""

    def __init__(self, stage: str, trackers: Trackers, work: Work, peak_flops: float | None) -> None:
        self.stage, self.trackers = stage, trackers
        self.work, self.logged, self.peak_flops = work, Work(), peak_flops
        self.optimizer_started = 0.0
        self.progress: Progress | None = None
        self.newest: dict[str, float] = {}
        self.live: LiveHistory | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the progress of the remaining steps, and start the file for `watch`."""
        self.progress = Progress(f"{self.stage} steps", state.max_steps - state.global_step)
        if state.is_world_process_zero:
            folder = Path(str(args.output_dir)).parent
            self.live = LiveHistory(folder, self.stage, state.max_steps, state.log_history)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count the step. If it is also logged, `on_log` shows it with its losses, and the last one always is."""
        if state.global_step >= state.max_steps:
            control.should_log = True
        if self.progress is not None:
            self.progress.advance(show=not control.should_log)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log the last step of a training that was stopped early."""
        if control.should_training_stop:
            control.should_log = True

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Show the last step."""
        if self.progress is not None:
            self.progress.end()
        if self.live is not None:
            self.live.end()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Start timing the optimiser."""
        self.optimizer_started = time.perf_counter()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Add the time of the optimiser's step."""
        self.work.seconds["optimizer"] += time.perf_counter() - self.optimizer_started

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the rates to the newest entry of the trainer's history, and send it to the trackers and the log."""
        entry = state.log_history[-1]
        if "loss" in entry:
            entry |= self.work.rates(self.logged, self.peak_flops)
            self.logged = self.work.copy()
            entry["peak_memory_bytes"] = peak_memory_bytes()
        names = (
            "loss", "eval_loss", "learning_rate", "grad_norm", "rewards/accuracies", "rewards/margins", "accuracy",
            "reward", "eval_reward", "kl", "completions/mean_length",
        )  # fmt: skip
        # Training and evaluation have separate entries. The progress line shows the newest value of each name.
        self.newest |= {name: entry[name] for name in (*names, "tokens_per_second", "mfu") if name in entry}
        if self.newest and self.progress is not None:
            self.progress.say(", ".join(f"{name} {value:.4g}" for name, value in self.newest.items()))
        if self.live is not None:
            self.live.add(entry)
        self.trackers.log_metrics({f"{self.stage}/{name}": value for name, value in entry.items()}, state.global_step)
