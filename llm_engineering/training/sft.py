"""Supervised fine-tuning with TRL's SFTTrainer on rows whose labels were made and checked before."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import DatasetDict
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from trl import SFTTrainer

from llm_engineering.errors import RequestError
from llm_engineering.formatting.labels import check_labels
from llm_engineering.formatting.render import IGNORE_INDEX
from llm_engineering.models.device import Device, check_training, choose_backend, choose_device
from llm_engineering.models.tokenizer import load_tokenizer
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.training_blocks import SFTConfig, TrainConfig, TrainingSetup
from llm_engineering.training.arguments import training_arguments
from llm_engineering.training.job import Job, TrainingResult
from llm_engineering.training.losses import (
    attend_by_row,
    keeps_rows_apart,
    row_lengths,
    take_loss_from_hidden_states,
    why_not_from_hidden_states,
)
from llm_engineering.training.policy import new_policy
from llm_engineering.training.run import TrainingRun, run_training
from llm_engineering.training.telemetry import TelemetryCallback, TrainingFlops
from llm_engineering.training.trainer import ResumableTrainer
from llm_engineering.training.unsloth_policy import Loading, check_packable, check_packed

logger = logging.getLogger(__name__)

LABEL_ROWS = 3


def train_sft(
    data: DatasetDict,
    config: SFTConfig,
    setup: TrainingSetup,
    settings: Settings,
    parameters: Mapping[str, Any] | None = None,
    resume_from: Path | None = None,
) -> TrainingResult:
    """Train an adapter or the full model on `data["train"]`, with the loss on `data["validation"]` along the way.

    Args:
        data: splits with `input_ids` and `labels`, lists of a row's length; -100 where nothing is trained.
        resume_from: a checkpoint folder to go on from; without it, the newest complete one of the same run.

    Raises:
        RequestError: this machine lacks what the method or the optimiser needs.
        WorkError: a row's labels are wrong (`check_labels`), or training fails.
    """
    device = choose_backend(choose_device(setup.compute), setup.compute, config.method, use_dora=config.lora.use_dora)
    tokenizer = load_tokenizer(setup.model, settings, setup.chat_template)
    check_training("sft", config.method, config.optim, device)
    check_labels(data, tokenizer, setup.train_on_prompt)
    first = data["train"].select(range(min(LABEL_ROWS, len(data["train"]))))
    label_rows = [(row["input_ids"], row["labels"]) for row in first]
    run = TrainingRun(
        "sft", config, setup, settings, device, tokenizer, data, label_rows, parameters or {}, resume_from=resume_from
    )

    def build(used: TrainConfig, telemetry: TelemetryCallback) -> FormattedSFTTrainer:
        assert isinstance(used, SFTConfig)
        loading = Loading(setup.max_length, used.gradient_checkpointing, setup.seed)
        policy = new_policy(setup.model, config.lora, settings, device, config.method, loading)
        return sft_trainer(policy, tokenizer, data, used, setup, device, run.folder, telemetry)

    return run_training(run, build)


def train_sft_job(job: Job, data: DatasetDict, settings: Settings) -> TrainingResult:
    """`train_sft` for a job, in this process, which may be one of several."""
    config = SFTConfig.model_validate(job.config)
    return train_sft(data, config, job.setup, settings, job.parameters, job.resume_from)


def _is_not_about_unpadded_rows(record: logging.LogRecord) -> bool:
    """TRL warns of every attention but FlashAttention where rows lie one behind another, and of one row a batch;
    whether the model keeps them apart was tried before."""
    return not ("Flash Attention" in str(record.msg) or "padding-free training" in str(record.msg))


class FormattedSFTTrainer(ResumableTrainer, SFTTrainer):
    """TRL's trainer for rows that are labelled already; one that resumes, and computes no more than it needs.

    Attributes:
        by_row: whether the attention takes `row_lengths`.
        own_loss: whether the loss is computed here, and not by what unsloth put into TRL's trainer.
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
        """The loss alone. TRL's also measures entropy and accuracy over the logits of all positions, which takes
        longer than the loss itself."""
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


def sft_trainer(
    policy: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    data: DatasetDict,
    config: SFTConfig,
    setup: TrainingSetup,
    device: Device,
    folder: Path,
    telemetry: TelemetryCallback | None = None,
) -> FormattedSFTTrainer:
    """TRL's trainer for rows that are tokenised and labelled already; TRL packs them and changes nothing else.

    Raises:
        RequestError: packed rows of this model would see each other.
    """
    flops, by_row, unpadded = TrainingFlops.of(policy), False, False
    if device.backend == "transformers":
        by_row = attend_by_row(policy)
        unpadded = keeps_rows_apart(policy, by_row)
        reason = why_not_from_hidden_states(policy, setup.compute)
        if reason is None:
            take_loss_from_hidden_states(policy)
        logger.info("logits: %s", f"of whole batches, for {reason}" if reason else "of trained tokens alone, in chunks")
        if config.packing and not unpadded:
            raise RequestError(
                f"Packed rows of {setup.model.name_or_path} would see each other: its attention does not tell them apart "
                "by their position ids. Use --set sft.packing=false."
            )
    elif config.packing:
        check_packable(policy.config.model_type)
    arguments = trl.SFTConfig(
        **training_arguments(config, device, setup, folder),
        # Without packing, over-long rows were set aside or cut before, and TRL cuts nothing.
        max_length=setup.max_length if config.packing else None,
        # Best-fit-decreasing keeps every row whole. Packed rows are told apart by their position ids, which restart:
        # there is no attention mask.
        packing=config.packing,
        packing_strategy="bfd",
        eval_packing=False,
        # The rows of a batch lie one behind another too, where that can be: nothing is computed for padding.
        padding_free=unpadded,
        # TRL's own default, chunked_nll, would take the place of the forward pass that returns the loss alone.
        loss_type="nll" if device.backend == "transformers" else None,
        train_sampling_strategy=config.train_sampling_strategy,
    )
    logging.getLogger("trl.trainer.sft_trainer").addFilter(_is_not_about_unpadded_rows)
    columns = ["input_ids", "labels"]
    trainer = FormattedSFTTrainer(
        model=policy,
        args=arguments,
        train_dataset=data["train"].select_columns(columns),
        eval_dataset=data["validation"].select_columns(columns),
        processing_class=tokenizer,
        callbacks=[telemetry] if telemetry else [],
    )
    trainer.by_row, trainer.flops, trainer.own_loss = by_row, flops, device.backend == "transformers"
    if device.backend == "unsloth" and config.packing:
        check_packed(next(iter(trainer.get_train_dataloader())))
    return trainer
