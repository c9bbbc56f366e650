"""Computes a validation loss that depends neither on the batch size nor on the number of processes."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from llm_engineering.training.processes import ranks


def evaluation_batches(rows: int, size: int, rank: int, processes: int) -> tuple[list[list[int]], int]:
    """Choose the rows that a process evaluates.

    Gathering needs batches of equal size in all processes. So each process gets the same number of rows, and the
    remainder, fewer than `processes` rows, goes to all processes in shared batches at the end.

    Returns:
        Batches of at most `size` row indices, and the number of shared batches among them.
    """
    divisible = rows - rows % processes
    own, rest = range(rank, divisible, processes), range(divisible, rows)
    batches = [[list(part[i : i + size]) for i in range(0, len(part), size)] for part in (own, rest)]
    return batches[0] + batches[1], len(batches[1])


class HeldOutTrainer(Trainer):
    """Weights the loss of each evaluation batch by its trained tokens or pairs. transformers weights all batches alike.

    In several processes it counts each row once. accelerate repeats the first rows to fill the last batches.
    """

    # Set by TRL: metrics of each batch since the last log entry, under `train` and `eval`.
    _metrics: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._shared_batches = 0
        self._losses: list[torch.Tensor] = []
        self._weights: list[int] = []
        super().__init__(*args, **kwargs)

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader[Any]:
        """The batches that this process evaluates."""
        if ranks.world_size() == 1:
            return super().get_eval_dataloader(eval_dataset)
        rows = self._remove_unused_columns(self.eval_dataset, description="Evaluation")
        batches, self._shared_batches = evaluation_batches(
            len(rows), self.args.eval_batch_size, ranks.rank(), ranks.world_size()
        )
        return DataLoader(
            rows,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
            # A loader draws a seed when it starts. If it drew from the global generator, an evaluation would change the
            # dropout of the next steps.
            generator=torch.Generator(),
        )

    def prediction_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Compute the loss of a batch, and record it with the batch's weight."""
        weight = self._weight(inputs)
        predicted = super().prediction_step(model, inputs, *args, **kwargs)
        assert predicted[0] is not None
        self._losses.append(predicted[0])
        self._weights.append(weight)
        return predicted

    def _weight(self, inputs: Any) -> int:
        """The trained tokens of a batch, or its pairs: TRL stacks rejected answers below the chosen ones."""
        return int((inputs["labels"][..., 1:] != -100).sum()) if "labels" in inputs else len(inputs["input_ids"]) // 2

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate. The loss and TRL's other metrics become means over tokens (SFT) or pairs (DPO)."""
        self._losses, self._weights = [], []
        # If the current training batch is the last of its epoch, accelerate would drop evaluated rows, because it takes
        # them for padding of that batch. The entry None prevents this.
        state = self.accelerator.gradient_state
        loaders = state.dataloader_references
        state.dataloader_references = [*loaders, None]
        try:
            output = super().evaluation_loop(*args, **kwargs)
        finally:
            state.dataloader_references = loaders
        # The mean over processes is the mean over tokens or pairs: transformers scales each loss by the tokens of all
        # processes, and each process has the same number of pairs.
        losses = ranks.total(torch.stack(self._losses)) / ranks.world_size()
        weights = ranks.total(torch.tensor(self._weights))
        if self._shared_batches:
            weights[-self._shared_batches :] /= ranks.world_size()
        shares = weights / weights.sum()
        assert output.metrics is not None
        output.metrics[f"{kwargs.get('metric_key_prefix', 'eval')}_loss"] = float((losses * shares).sum())
        for name, values in self._metrics["eval"].items():
            if len(values) == len(shares):
                self._metrics["eval"][name] = [float((torch.tensor(values, dtype=torch.float64) * shares).sum())]
        return output
