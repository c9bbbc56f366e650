"""Tells a loss that has exploded, and which rows a batch was made of."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset

# A batch of nothing but mislabelled pairs reaches several times the usual DPO loss in a run that is sound, and loses
# nothing by going on; ten times the usual loss was never seen of one.
EXPLOSION_FACTOR = 10.0
# Steps that the running median is taken over; with fewer than the second number there is none.
MEDIAN_STEPS = 32
FIRST_MEDIAN_STEPS = 8
_NAMED_ROWS = 16


class LossWatch:
    """Knows the losses of the last steps, and the highest median that they ever had.

    The highest and not the present one: the loss of DPO can fall by orders of magnitude, and a single hard pair is
    then far above its median without anything being wrong.
    """

    def __init__(self) -> None:
        self.recent: list[float] = []
        self.highest_median = 0.0

    def problem(self, loss: float) -> str:
        """What is wrong with the loss of the next step; empty if nothing is, and then it is remembered."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if self.highest_median and loss > EXPLOSION_FACTOR * self.highest_median:
            return f"the loss is {loss:.4g}, and was {self.highest_median:.4g} before"
        self.recent = [*self.recent, loss][-MEDIAN_STEPS:]
        if len(self.recent) >= FIRST_MEDIAN_STEPS:
            self.highest_median = max(self.highest_median, statistics.median(self.recent))
        return ""


def rows_of(batches: list[Mapping[str, Any]], rows: Dataset) -> str:
    """Names the rows that batches were made of: their place in the training split, and their id.

    Collating drops ids, and packing mixes rows, so they are found again by their tokens.
    """
    wanted = {sequence for batch in batches for sequence in _sequences(batch)}
    named = []
    for place, row in enumerate(rows):
        tokens = row["input_ids"] if "input_ids" in row else row["prompt_ids"] + row["chosen_ids"]
        if tuple(tokens) in wanted:
            named.append(f"{place} (id {row['id']})" if "id" in row else str(place))
    more = f" and {len(named) - _NAMED_ROWS} more" if len(named) > _NAMED_ROWS else ""
    return ", ".join(named[:_NAMED_ROWS]) + more


def _sequences(batch: Mapping[str, torch.Tensor]) -> list[tuple[int, ...]]:
    """Token ids of each row of a batch; of pairs, prompt and chosen answer."""
    ids = batch["input_ids"]
    if "attention_mask" not in batch:
        # Rows in a row, `(1, tokens)`: position ids start again at each.
        starts = torch.nonzero(batch["position_ids"][0] == 0).flatten().tolist()
        return [tuple(ids[0, start:end].tolist()) for start, end in zip(starts, [*starts[1:], None], strict=True)]
    # `(rows, tokens)` with padding; TRL stacks the rejected answers below the chosen ones.
    count = len(ids) // 2 if "completion_mask" in batch else len(ids)
    return [tuple(row[mask.bool()].tolist()) for row, mask in zip(ids[:count], batch["attention_mask"], strict=False)]
