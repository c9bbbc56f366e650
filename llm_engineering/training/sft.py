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

from llm_engineering.compute.device import Device, check_training, choose_device
from llm_engineering.config import SFTConfig, TrainConfig, TrainingSetup
from llm_engineering.formatting.labels import check_labels
from llm_engineering.formatting.render import IGNORE_INDEX
from llm_engineering.models import load_tokenizer
from llm_engineering.settings import Settings
from llm_engineering.training.flops import TrainingFlops
from llm_engineering.training.packed_attention import attend_by_row, row_lengths
from llm_engineering.training.policy import new_policy
from llm_engineering.training.resumable import ResumableTrainer
from llm_engineering.training.run import (
    TrainingResult,
    run_identity,
    run_training,
    training_arguments,
    work_folder,
)
from llm_engineering.training.telemetry import TelemetryCallback
from llm_engineering.training.token_log_probs import take_loss_from_hidden_states, why_not_from_hidden_states

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
    device = choose_device(setup.compute)
    tokenizer = load_tokenizer(setup.model, settings, setup.chat_template)
    check_training("sft", config.method, config.optim, device)
    check_labels(data, tokenizer, setup.train_on_prompt)
    identity = run_identity("sft", config, setup, device, data)
    folder = work_folder("sft", identity, settings)

    def build(used: TrainConfig, telemetry: TelemetryCallback) -> FormattedSFTTrainer:
        assert isinstance(used, SFTConfig)
        policy = new_policy(setup.model, config.lora, settings, device, config.method)
        return sft_trainer(policy, tokenizer, data, used, setup, device, folder, telemetry)

    first = data["train"].select(range(min(LABEL_ROWS, len(data["train"]))))
    return run_training(
        "sft",
        build,
        folder=folder,
        identity=identity,
        config=config,
        setup=setup,
        device=device,
        tokenizer=tokenizer,
        settings=settings,
        data=data,
        parameters=parameters or {},
        label_rows=[(row["input_ids"], row["labels"]) for row in first],
        resume_from=resume_from,
    )


class FormattedSFTTrainer(ResumableTrainer, SFTTrainer):
    """TRL's trainer for rows that are labelled already; one that resumes, and computes no more than it needs."""

    by_row = False

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The loss alone. TRL's also measures entropy and accuracy over the logits of all positions, which takes
        longer than the loss itself."""
        inputs.pop("_prediction_loss_only", None)
        inputs["use_cache"] = False
        if "position_ids" in inputs and self.by_row:
            inputs["row_lengths"] = row_lengths(inputs["position_ids"])
        if model.training:
            mask = inputs.get("attention_mask")
            lengths = row_lengths(inputs["position_ids"]) if mask is None else mask.sum(dim=1).tolist()
            trained = int((inputs["labels"] != IGNORE_INDEX).sum())
            self._total_train_tokens += self.count(lengths, trained, inputs["input_ids"].numel())
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
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
    """TRL's trainer for rows that are tokenised and labelled already; TRL packs them and changes nothing else."""
    reason = why_not_from_hidden_states(policy)
    if reason is None:
        take_loss_from_hidden_states(policy)
    logger.info("logits: %s", f"of whole batches, because {reason}" if reason else "of trained tokens alone, in chunks")
    by_row, flops = attend_by_row(policy), TrainingFlops.of(policy)
    arguments = trl.SFTConfig(
        **training_arguments(config, device, setup.seed, folder),
        # Without packing, over-long rows were set aside or cut before, and TRL cuts nothing.
        max_length=setup.max_length if config.packing else None,
        # Best-fit-decreasing keeps every row whole. Packed rows do not see each other: position ids restart, there
        # is no attention mask, and TRL runs the model with use_cache=False. Attention that reads an attention mask
        # alone would leak from row to row: the recipe can name none (config.ComputeConfig).
        packing=config.packing,
        packing_strategy="bfd",
        # The rows of a batch lie one behind another too: nothing is computed for padding.
        padding_free=True,
        eval_packing=False,
    )
    # It warns of every attention but FlashAttention where rows lie one behind another; here they are kept apart by
    # row, or by a mask made from their position ids, and tests compare them with each row alone.
    logging.getLogger("trl.trainer.sft_trainer").setLevel(logging.ERROR)
    columns = ["input_ids", "labels"]
    trainer = FormattedSFTTrainer(
        model=policy,
        args=arguments,
        train_dataset=data["train"].select_columns(columns),
        eval_dataset=data["validation"].select_columns(columns),
        processing_class=tokenizer,
        callbacks=[telemetry] if telemetry else [],
    )
    trainer.by_row, trainer.flops = by_row, flops
    return trainer
