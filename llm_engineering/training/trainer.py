"""What this project adds to TRL's trainers: whole checkpoints, exact resume, and a stop before a broken step.

- `LossWatch` recognises a loss that has exploded, and `rows_of` names the rows of a batch.
- `HeldOutTrainer` computes a validation loss that does not depend on batch size or number of processes.
- `ResumableTrainer` writes each checkpoint completely or not at all, and resumes byte by byte.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft.tuners.lora import LoraLayer
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import EvalLoopOutput, rotate_checkpoints, sort_checkpoints

from llm_engineering.errors import WorkError
from llm_engineering.training import ranks
from llm_engineering.training.checkpoints import PARTIAL, check_space, publish, size
from llm_engineering.training.telemetry import TrainingFlops, Work

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


_WINDOW_FILE = "log_window.json"
# Weights, two moments of AdamW, and DPO's reference.
_COPIES = 4
# Tokenizer, states of schedule and generators: Gemma's tokenizer alone has 33 MB.
_SMALL_FILES_BYTES = 64 * 2**20


class ResumableTrainer(HeldOutTrainer):
    """To be named before TRL's trainer among the bases.

    Attributes:
        identity: what checkpoints are made from.
        rows: the training split with its ids, to name rows of a batch.
        flops: what training this model takes.
        asks_reference: whether every step asks a reference model too.
        work: what this process has done so far.
    """

    identity: Mapping[str, Any]
    rows: Dataset
    flops: TrainingFlops
    asks_reference = False
    # TRL's: tokens of all steps.
    _total_train_tokens: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._writing: Path | None = None
        self._watch = LossWatch()
        self._batches: list[Mapping[str, Any]] = []
        self._broken: list[Mapping[str, Any]] = []
        self._step_loss = 0.0
        self._step_ended = True
        self.work = Work()
        super().__init__(*args, **kwargs)
        if self.args.bf16 or self.args.fp16:
            # PEFT makes every input float32, for its weights' sake, and autocast makes it half precision again.
            assert self.model is not None
            for layer in self.model.modules():
                if isinstance(layer, LoraLayer) and not any(layer.use_dora.values()):
                    layer.cast_input_dtype_enabled = False

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> torch.utils.data.Sampler[int] | None:
        sampler: torch.utils.data.Sampler[int] | None = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            return LengthGroupedByEpoch(sampler.batch_size, sampler.lengths, self.args.seed)
        return sampler

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._writing or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Write the checkpoint under another name, and rename it when it is complete and on the disk."""
        with self.work.timed("save"):
            self._write_checkpoint(model, trial)

    def _write_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        assert self.args.output_dir is not None
        folder = Path(self.args.output_dir)
        final = folder / f"checkpoint-{self.state.global_step}"
        partial = folder / PARTIAL
        if ranks.is_main():
            folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            check_space(folder, self._needed_bytes(folder))
        ranks.wait()
        self._writing = partial
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._writing = None
        written = partial / final.name
        is_best = self.state.best_model_checkpoint == str(written)
        if is_best:
            self.state.best_model_checkpoint = str(final)
        # Gathered from all processes, which have written their files when this is there.
        window = self._window()
        elsewhere = ranks.gathered(_own_state(written)) if ranks.several_machines() else []
        if ranks.is_main():
            for name, content in elsewhere:
                (written / name).write_bytes(content)
            if is_best:
                self.state.save_to_json(str(written / "trainer_state.json"))
            (written / _WINDOW_FILE).write_text(json.dumps(window), encoding="utf-8")
            publish(written, final, self.identity)
            partial.rmdir()
            rotate_checkpoints(
                output_dir=str(folder),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        ranks.wait()
        # Only now: if the machines share the folder after all, it was the one that is published.
        if elsewhere and ranks.is_first_here():
            shutil.rmtree(partial, ignore_errors=True)

    def _needed_bytes(self, folder: Path) -> int:
        former = sort_checkpoints(str(folder), use_mtime=True)
        if former:
            return size(Path(former[-1]))
        assert self.model is not None
        trained = sum(int(p.nbytes) for p in self.model.parameters() if p.requires_grad)
        return _COPIES * trained + _SMALL_FILES_BYTES

    def _window(self) -> dict[str, Any]:
        """What the trainers add up until the next log entry, which transformers forgets between two runs."""
        return {
            "losses": ranks.gathered(self._tr_loss.item()),
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "tokens": self._total_train_tokens,
            "metrics": self._metrics["train"],
            "recent_losses": self._watch.recent,
            "highest_median": self._watch.highest_median,
        }

    def restore_window(self, checkpoint: Path) -> None:
        """Go on adding up where the checkpoint was saved, so that the log is that of an uninterrupted run."""
        window = json.loads((checkpoint / _WINDOW_FILE).read_text(encoding="utf-8"))
        self._tr_loss.fill_(window["losses"][ranks.rank()])
        self._total_loss_scalar = window["total_loss"]
        self._globalstep_last_logged = window["last_logged"]
        self._total_train_tokens = window["tokens"]
        self._metrics["train"].update(window["metrics"])
        self._watch.recent = window["recent_losses"]
        self._watch.highest_median = window["highest_median"]

    def count(self, lengths: Sequence[int], trained_tokens: int, computed_tokens: int) -> int:
        """Count a batch of rows of these lengths, for which so many positions are computed.

        Returns the real tokens of the batch, of all processes.
        """
        tokens, computed = ranks.total(torch.tensor([sum(lengths), computed_tokens])).tolist()
        self.work.tokens += int(tokens)
        self.work.computed_tokens += int(computed)
        # Of this process alone, as its card's peak is.
        self.work.flops += self.flops.step(lengths, trained_tokens, self.asks_reference)
        return int(tokens)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The batches of a step; the time is that of waiting for data."""
        with self.work.timed("data"):
            return super().get_batch_samples(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Losses of the validation split, timed."""
        with self.work.timed("eval"):
            return super().evaluate(*args, **kwargs)

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward and backward of one batch; a loss that is not finite or has exploded ends the run before it trains.

        Raises:
            WorkError: with the rows of the batch, or of all batches of the step; in all processes.
        """
        if self._step_ended:
            self._batches, self._broken, self._step_loss = [], [], 0.0
        self._batches.append(dict(inputs))
        with self.work.timed("forward_backward"):
            loss: torch.Tensor = super().training_step(model, inputs, *args, **kwargs)
            # Waits for the card, where there is one.
            self._step_loss += loss.item()
        if not math.isfinite(self._step_loss) and not self._broken:
            self._broken = self._batches[-1:]
        self._step_ended = self.accelerator.sync_gradients
        if self._step_ended:
            # The loss of a step is the mean of its processes' shares, and not finite if one of them is not.
            step_loss = ranks.total(torch.tensor(self._step_loss, dtype=torch.float64)).item() / ranks.world_size()
            problem = self._watch.problem(step_loss)
            if problem:
                self._stop(problem, self._batches if math.isfinite(step_loss) else self._broken)
        return loss

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[no-untyped-call]
        # The scaler of fp16 looks for its scale by trying too large ones, and leaves those steps out itself.
        if self.accelerator.scaler is None and norm is not None and not math.isfinite(norm):
            self._stop(f"the norm of the gradient is {float(norm)}", self._batches)
        return norm

    def _stop(self, problem: str, batches: list[Mapping[str, Any]]) -> None:
        named = ", ".join(filter(None, ranks.gathered(rows_of(batches, self.rows))))
        # DeepSpeed takes its step within the backward pass; no checkpoint has it.
        unchanged = "" if self.is_deepspeed_enabled else " The weights were not changed by this step."
        raise WorkError(
            f"Training stopped in step {self.state.global_step + 1}: {problem}. The batch was made of these rows of the "
            f"training split: {named}. Look at them in the dataset; if nothing is wrong with them, lower learning_rate."
            f"{unchanged}"
        )


def _own_state(checkpoint: Path) -> tuple[str, bytes]:
    """The one file that each process writes itself, which machines without a common disk have to bring together."""
    name = f"rng_state_{ranks.rank()}.pth"
    return name, (checkpoint / name).read_bytes()


class LengthGroupedByEpoch(LengthGroupedSampler):
    """transformers' sampler, whose order depends on the seed and the epoch alone.

    Its own order comes from torch's global generator, which stands elsewhere when a run is resumed: rows would be
    trained twice, and others not at all.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self.seed + self.epoch)
        yield from super().__iter__()  # type: ignore[no-untyped-call]


class RestoreWindow(TrainerCallback):
    """Restores the window when training begins: transformers empties it just before."""

    def __init__(self, trainer: ResumableTrainer, checkpoint: Path) -> None:
        self.trainer = trainer
        self.checkpoint = checkpoint

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore."""
        self.trainer.restore_window(self.checkpoint)
