"""The base class of all stages' trainers: complete checkpoints, exact resume, and a stop before a broken step.

A checkpoint is written completely or not at all, and a resumed run ends with the same bytes. `validation_loss.py` computes
the validation loss, and `loss_watch.py` finds the broken steps.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict
from transformers import TrainerCallback
from transformers.trainer import FSDP_MODEL_NAME, SCHEDULER_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import rotate_checkpoints, sort_checkpoints

from llm_engineering.errors import WorkError
from llm_engineering.training.processes import ranks, transfer
from llm_engineering.training.telemetry.flops import TrainingFlops
from llm_engineering.training.telemetry.work import Work
from llm_engineering.training.trainer.checkpoints import PARTIAL, SHARDED_STATE, check_space, publish, size
from llm_engineering.training.trainer.loss_watch import Batch, LossWatch, named_rows
from llm_engineering.training.trainer.validation_loss import HeldOutTrainer

logger = logging.getLogger(__name__)

_WINDOW_FILE = "log_window.json"
# Weights, AdamW's two moments, and the reference of DPO or KTO.
_COPIES = 4
# Tokenizer, scheduler and random states. Gemma's tokenizer alone has 33 MB.
_SMALL_FILES_BYTES = 64 * 2**20


class ResumableTrainer(HeldOutTrainer):
    """Base class for a stage's trainer. It must come before TRL's trainer in the list of bases.

    Attributes:
        identity: stored in each checkpoint (`TrainingRun.identity`).
        rows: the training split with its ids, to name the rows of a broken batch.
        flops: floating-point operations that training this model takes.
        forwards: forward passes of a step besides that of training, e.g. of a reference.
        work: tokens, operations and seconds of this process so far.
        earlier_flops: operations of all processes before the checkpoint that the run resumed from.
    """

    identity: Mapping[str, Any]
    rows: Dataset
    flops: TrainingFlops
    forwards = 0
    earlier_flops = 0.0
    # Set by TRL: tokens of all steps so far.
    _total_train_tokens: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._writing: Path | None = None
        self._watch = LossWatch()
        self._batches: list[Batch] = []
        self._broken: list[Batch] = []
        self._step_loss = 0.0
        self._step_ended = True
        self.work = Work()
        # With several visible cards and one process, transformers would wrap the model in DataParallel and multiply the
        # batch by the number of cards: half the steps, and twice the loss and the gradient norm, with two cards.
        arguments = kwargs["args"]
        arguments._n_gpu = min(arguments.n_gpu, 1)
        # TRL would round an adapter on a quantised base to bf16. Updates smaller than the last bit would be lost, and the
        # fp16 scaler, on cards without bf16, has no kernel for bf16 gradients. TRL uses the attribute for nothing else.
        policy = kwargs["model"]
        if isinstance(policy, PeftModel):
            policy.is_loaded_in_4bit = False  # type: ignore[assignment]
        try:
            super().__init__(*args, **kwargs)
        finally:
            if isinstance(policy, PeftModel):
                # The base model's own value counts again.
                del policy.is_loaded_in_4bit
        if self.args.bf16 or self.args.fp16:
            # PEFT would cast every input to its weights' float32, only for autocast to cast it back to half precision.
            assert self.model is not None
            for layer in self.model.modules():
                if isinstance(layer, LoraLayer) and not any(layer.use_dora.values()):
                    layer.cast_input_dtype_enabled = False

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> torch.utils.data.Sampler[int] | None:
        sampler: torch.utils.data.Sampler[int] | None = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            return LengthGroupedByEpoch(sampler.batch_size, sampler.lengths, self.args.seed)
        return sampler

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Create the schedule of the learning rate. A warm-up as long as the run is cut, so that one step has the full rate.

        transformers rounds the warm-up up, and its first step has the rate 0: a run of one step would train nothing.
        """
        wanted = self.args.get_warmup_steps(num_training_steps)
        if wanted >= num_training_steps > 0:
            self.args.warmup_steps = num_training_steps - 1
            logger.warning(
                "A warm-up of %d steps would leave no step of %d with the full learning rate: it is cut to %d",
                *(wanted, num_training_steps, num_training_steps - 1),
            )
        return super().create_scheduler(num_training_steps, optimizer)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # After a checkpoint of the last step, transformers would train one more step if the last step is inside an epoch.
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        assert self.model is not None
        is_adapter, weights = isinstance(self.model, PeftModel), Path(resume_from_checkpoint, f"{FSDP_MODEL_NAME}.bin")
        # transformers reads a checkpoint of FSDP only with FSDP. It has whole weights.
        was_sharded = weights.is_file() and not self.is_fsdp_enabled
        if not was_sharded:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        elif not is_adapter:
            self.model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        # If a checkpoint has adapters in subfolders, transformers loads only these. It would load the reference but not
        # the policy, and the policy would silently start over.
        if isinstance(self.model, PeftModel) and (was_sharded or len(self.model.peft_config) > 1):
            self.model.load_adapter(resume_from_checkpoint, "default", is_trainable=True)
            self.model.set_adapter("default")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the state of the optimiser and the scheduler, also that of shards into whole weights."""
        if checkpoint is None or self.is_fsdp_enabled or not Path(checkpoint, SHARDED_STATE).is_file():
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        assert self.model is not None
        assert self.lr_scheduler is not None
        state = torch.load(Path(checkpoint, SHARDED_STATE), map_location="cpu", weights_only=True)
        # accelerate's optimiser, around that of torch.
        optimiser: Any = self.optimizer
        options = StateDictOptions(full_state_dict=True)
        set_optimizer_state_dict(self.model, optimiser.optimizer, state, options=options)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True))

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._writing or super()._get_output_dir(trial))

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Compare with the best validation loss so far; with `load_best`, save the step that has a better one.

        transformers saves only multiples of `save_steps`. It would end with an older checkpoint if the best step is none.
        """
        is_best = super()._determine_best_metric(metrics, trial)
        if is_best and self.args.load_best_model_at_end:
            self.control.should_save = True
        return is_best

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Write the checkpoint under a temporary name, and rename it when it is complete and on the disk."""
        with self.work.timed("save"):
            self._write_checkpoint(model, trial)

    def _write_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        assert self.args.output_dir is not None
        folder = Path(self.args.output_dir)
        final = folder / f"checkpoint-{self.state.global_step}"
        partial = folder / PARTIAL
        # On every machine: what a killed process left here would be collected with the new files.
        if ranks.is_first_here():
            shutil.rmtree(partial, ignore_errors=True)
        if ranks.is_main():
            folder.mkdir(parents=True, exist_ok=True)
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
        # Gathering waits for all processes, so after it all of them have written their files.
        window = self._window()
        if ranks.several_machines():
            transfer.collect(written)
        if ranks.is_main():
            if is_best:
                self.state.save_to_json(str(written / "trainer_state.json"))
            (written / _WINDOW_FILE).write_text(json.dumps(window), encoding="utf-8")
            publish(written, final, self.identity)
            partial.rmdir()
            rotate_checkpoints(
                output_dir=str(folder),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )
        ranks.wait()
        # Delete only now: if the machines share a disk, the main process has published its checkpoint from this folder.
        if ranks.is_first_here():
            shutil.rmtree(partial, ignore_errors=True)

    def _needed_bytes(self, folder: Path) -> int:
        earlier = sort_checkpoints(str(folder))
        if earlier:
            return size(Path(earlier[-1]))
        assert self.model is not None
        trained = sum(int(p.nbytes) for p in self.model.parameters() if p.requires_grad)
        return _COPIES * trained + _SMALL_FILES_BYTES

    def _window(self) -> dict[str, Any]:
        """The sums since the last log entry. transformers does not store them in a checkpoint."""
        return {
            "losses": ranks.gathered(self._tr_loss.item()),
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "tokens": self._total_train_tokens,
            "metrics": self._metrics["train"],
            "recent_losses": self._watch.recent,
            "highest_median": self._watch.highest_median,
            "flops": self.total_flops(),
        }

    def restore_window(self, checkpoint: Path) -> dict[str, Any]:
        """Restore the sums since the last log entry, so that the log equals that of an uninterrupted run.

        Returns:
            What the checkpoint has stored of `_window`.
        """
        window: dict[str, Any] = json.loads((checkpoint / _WINDOW_FILE).read_text(encoding="utf-8"))
        losses = window["losses"]
        # Another number of processes goes on with the mean, which is all that the log shows.
        is_same = len(losses) == ranks.world_size()
        self._tr_loss.fill_(losses[ranks.rank()] if is_same else sum(losses) / len(losses))
        self._total_loss_scalar = window["total_loss"]
        self._globalstep_last_logged = window["last_logged"]
        self._total_train_tokens = window["tokens"]
        self._metrics["train"].update(window["metrics"])
        self._watch.recent = window["recent_losses"]
        self._watch.highest_median = window["highest_median"]
        self.earlier_flops = window["flops"]
        return window

    def total_flops(self) -> float:
        """Operations of all processes since the start of the run, also before it was interrupted. All processes call this."""
        return self.earlier_flops + float(ranks.total(torch.tensor(self.work.flops, dtype=torch.float64)))

    def summary(self) -> dict[str, Any]:
        """Entries that a stage adds to the training summary."""
        return {}

    def count(
        self, lengths: Sequence[int], trained_tokens: int, computed_tokens: int, shared: Sequence[int] = ()
    ) -> int:
        """Add a batch to `work`.

        Args:
            lengths: lengths of the batch's rows, in tokens without padding.
            trained_tokens: tokens with a label.
            computed_tokens: tokens with padding.
            shared: lengths of the prompts that are computed once for two rows.

        Returns:
            Tokens of the batch without padding, summed over all processes.
        """
        tokens, computed = ranks.total(torch.tensor([sum(lengths), computed_tokens])).tolist()
        self.work.tokens += int(tokens)
        self.work.computed_tokens += int(computed)
        # Not summed: MFU compares it with the peak of this process's own GPU.
        self.work.flops += self.flops.step(lengths, trained_tokens, self.forwards) - self.flops.step(
            shared, 0, self.forwards
        )
        return int(tokens)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The batches of a step. The time spent here is waiting for data."""
        with self.work.timed("data"):
            return super().get_batch_samples(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate the validation split, and add the time to `work`."""
        with self.work.timed("eval"):
            return super().evaluate(*args, **kwargs)

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run forward and backward of one batch, and check the loss before the optimiser's step.

        Raises:
            WorkError: the loss is not finite or has exploded. The message names the rows. All processes raise it.
        """
        if self._step_ended:
            self._batches, self._broken, self._step_loss = [], [], 0.0
        # The loss may remove entries of a batch. The prompts that get completions are a list of rows.
        self._batches.append(dict(inputs) if isinstance(inputs, dict) else inputs)
        with self.work.timed("forward_backward"):
            loss: torch.Tensor = super().training_step(model, inputs, *args, **kwargs)
            # On a GPU, item() waits until the result is computed.
            self._step_loss += loss.item()
        if not math.isfinite(self._step_loss) and not self._broken:
            self._broken = self._batches[-1:]
        self._step_ended = self.accelerator.sync_gradients
        if self._step_ended:
            # The mean over processes is not finite if the loss of one process is not.
            step_loss = ranks.total(torch.tensor(self._step_loss, dtype=torch.float64)).item() / ranks.world_size()
            problem = self._watch.problem(step_loss)
            if problem:
                self._stop(problem, self._batches if math.isfinite(step_loss) else self._broken)
        return loss

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[no-untyped-call]
        # The fp16 scaler tries scales that overflow, and skips the steps in which they do.
        if self.accelerator.scaler is None and norm is not None and not math.isfinite(norm):
            self._stop(f"the norm of the gradient is {float(norm)}", self._batches)
        return norm

    def _stop(self, problem: str, batches: list[Batch]) -> None:
        named = ", ".join(filter(None, ranks.gathered(named_rows(batches, self.rows))))
        # DeepSpeed updates the weights in the backward pass. No checkpoint has these weights.
        unchanged = "" if self.is_deepspeed_enabled else " The weights were not changed by this step."
        raise WorkError(
            f"Training stopped in step {self.state.global_step + 1}: {problem}. The batch has these rows of the "
            f"training split: {named}. Look at them in the dataset; if nothing is wrong with them, lower learning_rate."
            f"{unchanged}"
        )


class ByEpoch:
    """Mixin for a sampler, so that its order depends only on the seed and the epoch. It must come before the sampler's class.

    The samplers of transformers and TRL draw from one generator, whose state differs in a resumed run: some rows would be
    trained twice, and others never.
    """

    generator: Any
    seed: Any
    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch. accelerate calls it before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self.seed + self.epoch)
        yield from super().__iter__()  # type: ignore[misc]


class LengthGroupedByEpoch(ByEpoch, LengthGroupedSampler):
    """transformers' length-grouped sampler, with an order for each epoch."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed = seed


class RestoreWindow(TrainerCallback):
    """Restores the sums since the last log entry when training begins, because transformers has just reset them."""

    def __init__(self, trainer: ResumableTrainer, checkpoint: Path) -> None:
        self.trainer = trainer
        self.checkpoint = checkpoint

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Restore the sums from the checkpoint."""
        self.trainer.restore_window(self.checkpoint)
