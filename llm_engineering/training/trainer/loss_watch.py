"""Detects a loss that has exploded, and names the rows of the batch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

from datasets import Dataset

from llm_engineering.training.losses import row_lengths

# In a healthy run, a batch of mislabelled pairs reaches several times the usual DPO loss, and training recovers from it.
# No healthy run has been seen to reach ten times the usual loss.
EXPLOSION_FACTOR = 10.0
# The running median covers the last 32 steps. It starts after 8 steps.
MEDIAN_STEPS = 32
FIRST_MEDIAN_STEPS = 8
_NAMED_ROWS = 16

# The inputs of a model, or the rows of the prompts that get completions.
Batch = Mapping[str, Any] | list[dict[str, Any]]


class LossWatch:
    """Compares the loss of each step with the highest running median so far.

    The current median would be too strict: the DPO loss can fall by orders of magnitude, and then a single hard pair
    is far above it although nothing is wrong.
    """

    def __init__(self, factor: float = EXPLOSION_FACTOR) -> None:
        self.factor = factor
        self.recent: list[float] = []
        self.highest_median = 0.0

    def problem(self, loss: float) -> str:
        """Describe what is wrong with the loss of the next step. If nothing is, record the loss and return ""."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if self.highest_median and loss > self.factor * self.highest_median:
            return f"the loss is {loss:.4g}, and its median was {self.highest_median:.4g} before"
        self.recent = [*self.recent, loss][-MEDIAN_STEPS:]
        if len(self.recent) >= FIRST_MEDIAN_STEPS:
            self.highest_median = max(self.highest_median, statistics.median(self.recent))
        return ""


def named_rows(batches: list[Batch], rows: Dataset) -> str:
    """List the rows in some batches: index in the training split, and id.

    Finds the rows by their tokens, because collating drops ids and packing mixes rows.
    """
    wanted = {sequence for batch in batches for sequence in _sequences(batch)}
    named = []
    for index, row in enumerate(rows):
        answer = next((name for name in ("completion_ids", "chosen_ids") if name in row), None)
        tokens = row["input_ids"] if "input_ids" in row else row["prompt_ids"] + (row[answer] if answer else [])
        if tuple(tokens) in wanted:
            named.append(f"{index} (id {row['id']})" if "id" in row else str(index))
    more = f" and {len(named) - _NAMED_ROWS} more" if len(named) > _NAMED_ROWS else ""
    return ", ".join(named[:_NAMED_ROWS]) + more


def _sequences(batch: Batch) -> list[tuple[int, ...]]:
    """Token ids of each row of a batch; for a pair, its prompt and chosen answer; for a prompt that gets completions, it."""
    if isinstance(batch, list):
        return [tuple(row["prompt_ids"]) for row in batch]
    ids = batch["input_ids"]
    if "attention_mask" not in batch:
        # Concatenated rows, `(1, tokens)`: the position ids start again at each row.
        return [tuple(row.tolist()) for row in ids[0].split(row_lengths(batch["position_ids"]))]
    # `(rows, tokens)` with padding; TRL stacks the rejected answers below the chosen ones.
    count = len(ids) // 2 if "completion_mask" in batch and "label" not in batch else len(ids)
    return [tuple(row[mask.bool()].tolist()) for row, mask in zip(ids[:count], batch["attention_mask"], strict=False)]
