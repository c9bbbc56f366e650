"""The validation loss: the same number for any batch size and any number of processes."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from llm_engineering.training import ranks


def evaluation_batches(rows: int, size: int, rank: int, processes: int) -> tuple[list[list[int]], int]:
    """The rows that a process evaluates, as batches of at most `size` indices, and how many of the batches are shared.

    Every row is in one process's batches, and in each round all batches are of one size, as gathering wants it. The
    fewer than `processes` rows that cannot be dealt out stand at the end, in shared batches that every process has.
    """
    dealt = rows - rows % processes
    own, rest = range(rank, dealt, processes), range(dealt, rows)
    batches = [[list(part[i : i + size]) for i in range(0, len(part), size)] for part in (own, rest)]
    return batches[0] + batches[1], len(batches[1])


class HeldOutTrainer(Trainer):
    """Weighs every batch by what it holds, trained tokens or pairs; transformers takes the mean of the batches' means.

    Over several processes it also counts every row once; accelerate fills the last batches up with rows from the front.
    """

    # TRL's: numbers of the batches since the last log entry, by `train` and `eval`.
    _metrics: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._shared_batches = 0
        self._losses: list[torch.Tensor] = []
        self._weights: list[int] = []
        super().__init__(*args, **kwargs)

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader[Any]:
        """The batches of this process."""
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
            # Its own: a loader draws a seed, and the one of dropout is to be the same with and without an evaluation.
            generator=torch.Generator(),
        )

    def prediction_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The loss of a batch, remembered with the batch's weight."""
        # TRL stacks rejected answers below the chosen ones.
        weight = int((inputs["labels"][..., 1:] != -100).sum()) if "labels" in inputs else len(inputs["input_ids"]) // 2
        predicted = super().prediction_step(model, inputs, *args, **kwargs)
        assert predicted[0] is not None
        self._losses.append(predicted[0])
        self._weights.append(weight)
        return predicted

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate; the loss, and what TRL measures beside it, are means over tokens (SFT) or pairs (DPO)."""
        self._losses, self._weights = [], []
        # accelerate drops what it takes for filling where the training batch of the moment is the last of its epoch.
        state = self.accelerator.gradient_state
        loaders = state.dataloader_references
        state.dataloader_references = [*loaders, None]
        try:
            output = super().evaluation_loop(*args, **kwargs)
        finally:
            state.dataloader_references = loaders
        # Of a round, the mean of the processes' losses is that of its tokens or pairs: transformers scales by the
        # tokens of all processes, and the pairs are as many in each.
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
