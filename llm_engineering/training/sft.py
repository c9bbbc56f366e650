"""Supervised fine-tuning with TRL's SFTTrainer, on rows that are already tokenised and labelled."""

from __future__ import annotations

import logging
from typing import Any, TypeVar

import torch
import trl
from datasets import DatasetDict
from peft import PeftModel
from transformers import PreTrainedModel, Trainer
from trl import SFTTrainer

from llm_engineering.errors import RequestError
from llm_engineering.formatting.render import IGNORE_INDEX
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.stage_blocks import PackedConfig, SFTConfig
from llm_engineering.training.arguments import training_arguments
from llm_engineering.training.losses import (
    attend_by_row,
    row_lengths,
    take_loss_from_hidden_states,
    why_not_from_hidden_states,
)
from llm_engineering.training.processes.job import Job, TrainingResult
from llm_engineering.training.telemetry.flops import TrainingFlops
from llm_engineering.training.train import run_training
from llm_engineering.training.trainer.resumable import ResumableTrainer
from llm_engineering.training.training_run import TrainingRun, prepare_run
from llm_engineering.training.unsloth_policy import check_packable, check_packed

logger = logging.getLogger(__name__)

Config = TypeVar("Config", bound=PackedConfig)


def train_sft(job: Job, data: DatasetDict, settings: Settings) -> TrainingResult:
    """Train an adapter or the full model on `data["train"]`, and measure the loss on `data["validation"]` meanwhile.

    Args:
        data: splits with `input_ids` and `labels`, two lists of equal length for each row; -100 marks untrained tokens.
    """
    run = prepare_run(job, SFTConfig, data, settings)
    return run_training(run, lambda config: sft_trainer(run, run.load_policy(), config))


class FormattedSFTTrainer(ResumableTrainer, SFTTrainer):
    """TRL's SFTTrainer for labelled rows, with exact resume. It computes the loss without unused metrics.

    Attributes:
        by_row: whether the model's attention takes `row_lengths`.
        own_loss: whether this class computes the loss; otherwise unsloth's version of TRL's trainer does.
    """

    by_row: bool
    own_loss: bool

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Compute only the loss. TRL also computes entropy and accuracy from the logits of all positions, which takes
        longer than the loss."""
        mask = inputs.get("attention_mask")
        lengths = row_lengths(inputs["position_ids"]) if mask is None else mask.sum(dim=1).tolist()
        if model.training:
            trained = int((inputs["labels"] != IGNORE_INDEX).sum())
            tokens = self.count(lengths, trained, inputs["input_ids"].numel())
            if self.own_loss:
                self._total_train_tokens += tokens
                self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        if not self.own_loss:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[no-untyped-call]
        inputs.pop("_prediction_loss_only", None)
        inputs["use_cache"] = False
        if self.by_row and mask is None:
            inputs["row_lengths"] = lengths
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)


SFTTrainerT = TypeVar("SFTTrainerT", bound=FormattedSFTTrainer)


def sft_trainer(
    run: TrainingRun[Config],
    policy: PreTrainedModel | PeftModel,
    config: Config,
    trainer_class: type[SFTTrainerT] = FormattedSFTTrainer,  # type: ignore[assignment]
) -> SFTTrainerT:
    """Make TRL's trainer for tokenised and labelled rows. TRL packs the rows and changes nothing else.

    Args:
        config: the run's config, perhaps with smaller batches.

    Raises:
        RequestError: `packing` is set, and the model's attention would mix packed rows.
    """
    setup, device = run.setup, run.device

    # Find out which computations can be saved with this model
    flops, by_row, unpadded = TrainingFlops.of(policy), False, False
    if device.backend == "transformers":
        by_row = attend_by_row(policy)
        router_coefficient = config.library_arguments.get("router_aux_loss_coef")
        unpadded = run.keeps_rows_apart(policy, by_row)
        with device.autocast():
            reason = why_not_from_hidden_states(policy, setup.compute, router_coefficient)
        if reason is None:
            take_loss_from_hidden_states(policy)
        logger.info(
            "logits: %s", f"of whole batches, because {reason}" if reason else "of trained tokens only, in chunks"
        )
        if config.packing and not unpadded:
            raise RequestError(
                f"Packed rows of {setup.model.name_or_path} would see each other: its attention does not separate them "
                f"by their position ids. Use --set {run.stage}.packing=false."
            )
    elif config.packing:
        check_packable(policy.config.model_type, run.stage)

    # Set the training arguments
    arguments = trl.SFTConfig(
        **training_arguments(config, device, setup, run.folder),
        # Without packing, formatting has already cut or set aside the rows that are too long, and TRL cuts nothing.
        max_length=setup.max_length if config.packing else None,
        # Best-fit decreasing keeps every row whole. A packed batch has no attention mask: the position ids start again
        # at each row.
        packing=config.packing,
        packing_strategy="bfd",
        eval_packing=False,
        # Unpacked rows are concatenated too where the model allows it, so nothing is computed for padding.
        padding_free=unpadded,
        # TRL's default, chunked_nll, would replace the forward pass that returns only the loss.
        loss_type="nll" if device.backend == "transformers" else None,
        train_sampling_strategy=config.train_sampling_strategy,
    )

    # Make the trainer
    logging.getLogger("trl.trainer.sft_trainer").addFilter(_is_not_about_unpadded_rows)
    columns = ["input_ids", "labels"]
    trainer = trainer_class(
        model=policy,
        args=arguments,
        train_dataset=run.data["train"].select_columns(columns),
        eval_dataset=run.data["validation"].select_columns(columns),
        processing_class=run.tokenizer,
    )
    trainer.by_row, trainer.flops, trainer.own_loss = by_row, flops, device.backend == "transformers"
    if device.backend == "unsloth" and config.packing:
        check_packed(next(iter(trainer.get_train_dataloader())))
    return trainer


def _is_not_about_unpadded_rows(record: logging.LogRecord) -> bool:
    """Drop TRL's warnings about concatenated rows without FlashAttention, and about batches of one row.

    `keeps_rows_apart` has already tested that this model does not mix the rows.
    """
    return not ("Flash Attention" in str(record.msg) or "padding-free training" in str(record.msg))
