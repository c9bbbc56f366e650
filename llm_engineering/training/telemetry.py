"""Measures a training run while it runs: losses, tokens a second, memory, and model FLOPS utilisation (MFU)."""

from __future__ import annotations

import resource
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.pytorch_utils import Conv1D

from llm_engineering.progress import Progress
from llm_engineering.training.losses import causal_model
from llm_engineering.training.tracking import Trackers

# Dense half-precision peaks of the tensor cores, in FLOP/s, from NVIDIA's data sheets. Of names that share a
# beginning, the longer one stands first.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "T4": 65e12,
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of a known card in half precision; None for anything else, of which no data sheet speaks."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAK_FLOPS.items() if known in name), None)


@dataclass(frozen=True)
class TrainingFlops:
    """Floating-point operations that training needs, after PaLM (arXiv:2204.02311, appendix B).

    A matrix of n weights takes 2n a token forward, 2n backward for its input and, if it is trained, 2n for itself: 6n in
    all, or 4n under an adapter. Causal attention over a row of T tokens takes 2 T d a token forward and twice that
    backward, d being heads × head size, in each layer. What gradient checkpointing computes again does not count.

    Attributes:
        body: a token, in all matrices but the output one.
        head: a trained token, in the output matrix.
        attention: to be multiplied with the sum of squared row lengths.
        forward: share of all this that a forward pass alone takes, for DPO's reference.
    """

    body: float
    head: float
    attention: float
    forward: float

    @classmethod
    def of(cls, policy: PreTrainedModel | PeftModel) -> TrainingFlops:
        """Count the matrices of a model, before a reference is added to it."""
        model = causal_model(policy)
        output = model.get_output_embeddings()
        sizes = {
            module: module.in_features * module.out_features if isinstance(module, nn.Linear) else module.weight.numel()
            for module in policy.modules()
            if isinstance(module, nn.Linear | Conv1D)
        }
        training = {m: (6 if m.weight.requires_grad else 4) * size for m, size in sizes.items()}
        head = training.pop(output, 0)
        body = sum(training.values())
        config = model.config.get_text_config()
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        attention = 6 * config.num_hidden_layers * config.num_attention_heads * head_size
        forward = 2 * sum(sizes.values()) / (body + head)
        return cls(body, head, attention, forward)

    def step(self, lengths: Sequence[int], trained_tokens: int, reference: bool = False) -> float:
        """FLOPs of forward and backward over rows of these lengths; with `reference`, a forward pass besides."""
        flops = self.body * sum(lengths) + self.head * trained_tokens + self.attention * sum(n * n for n in lengths)
        return flops * (1 + self.forward if reference else 1)


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
        self.newest: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the progress of what is left to do."""
        self.progress = Progress(f"{self.stage} steps", state.max_steps - state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count the step; where it is logged too, `on_log` shows it with its losses."""
        if self.progress is not None:
            self.progress.advance(show=not control.should_log)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the last step."""
        if self.progress is not None:
            self.progress.end()

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
        # An evaluation is an entry of its own: the line shows the newest value of each.
        self.newest |= {name: entry[name] for name in (*names, "tokens_per_second", "mfu") if name in entry}
        if self.newest and self.progress is not None:
            self.progress.say(", ".join(f"{name} {value:.4g}" for name, value in self.newest.items()))
        self.trackers.log_metrics({f"{self.stage}/{name}": value for name, value in entry.items()}, state.global_step)
