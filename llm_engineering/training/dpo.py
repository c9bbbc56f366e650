"""Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290) with TRL's DPOTrainer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import DatasetDict, disable_caching, enable_caching, is_caching_enabled
from peft import PeftModel
from transformers import PreTrainedModel
from trl import DPOTrainer

from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.stage_blocks import DPOConfig
from llm_engineering.recipe.training_blocks import TrainingSetup
from llm_engineering.training.arguments import training_arguments
from llm_engineering.training.processes.job import Job, TrainingResult
from llm_engineering.training.telemetry.flops import TrainingFlops
from llm_engineering.training.telemetry.work import TelemetryCallback
from llm_engineering.training.train import run_training
from llm_engineering.training.trainer.reference import ReferenceTrainer, complete_reference, frozen_copy, savings
from llm_engineering.training.training_run import TrainingRun, prepare_run


def train_dpo(
    data: DatasetDict,
    start: Path | None,
    config: DPOConfig,
    setup: TrainingSetup,
    settings: Settings,
    parameters: Mapping[str, Any] | None = None,
    resume_from: Path | None = None,
) -> TrainingResult:
    """Train a model further on `data["train"]`. The reference is the model as it is before DPO.

    Args:
        data: splits with `prompt_ids`, `chosen_ids` and `rejected_ids`; each answer ends with its end-of-turn token.
        start: folder of the adapter, or of the full model, to train; None for the base model.
        parameters: logged by the trackers beside the hyperparameters.
        resume_from: checkpoint folder to resume from; the default is the newest complete one of the same run.

    Raises:
        RequestError: this machine cannot train with this method or optimiser.
        WorkError: an answer is empty or has no end of turn (`check_labels`), or training fails.
    """
    # Choose the device, load the tokenizer, check the labels
    run = prepare_run("dpo", data, config, setup, settings, start, parameters, resume_from)

    # Load the model, and make its trainer
    def make_trainer(config: DPOConfig, telemetry: TelemetryCallback) -> FormattedDPOTrainer:
        return dpo_trainer(run, run.load_policy(), config, telemetry)

    # Train, save the model, write the report
    return run_training(run, make_trainer)


def train_dpo_job(job: Job, data: DatasetDict, settings: Settings) -> TrainingResult:
    """Run `train_dpo` for a job in this process, which may be one of several."""
    config = DPOConfig.model_validate(job.config)
    return train_dpo(data, job.start, config, job.setup, settings, job.parameters, job.resume_from)


def dpo_trainer(
    run: TrainingRun[DPOConfig],
    policy: PreTrainedModel | PeftModel,
    config: DPOConfig,
    telemetry: TelemetryCallback | None = None,
) -> FormattedDPOTrainer:
    """Make TRL's trainer for tokenised pairs. The reference is `policy` as it is now.

    Args:
        policy: the model to train; its adapter, if it has one, is trainable.
        config: the run's config, perhaps with smaller batches.
    """
    # Make the reference, and find out which computations can be saved with this model
    precomputed = config.precompute_ref_log_probs
    reference = frozen_copy(policy, needed=not precomputed)
    flops = TrainingFlops.of(policy)
    by_row, unpadded = savings(run, policy, reference, config)

    # Set the training arguments
    arguments = trl.DPOConfig(
        **training_arguments(config, run.device, run.setup, run.folder),
        beta=config.beta,
        loss_type=[config.loss_type, *(["sft"] if config.sft_weight else [])],
        loss_weights=[1.0, *([config.sft_weight] if config.sft_weight else [])],
        label_smoothing=config.label_smoothing,
        precompute_ref_log_probs=precomputed,
        # Formatting has already cut or set aside the pairs that are too long, and counted them. TRL cuts nothing.
        max_length=None,
    )

    # Make the trainer. With caching, TRL would write precomputed log-probabilities into the dataset's folder. This
    # folder is an artifact of another step, so it must not change.
    columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
    caching = is_caching_enabled()
    disable_caching()
    try:
        trainer = FormattedDPOTrainer(
            model=policy,
            ref_model=reference,
            args=arguments,
            train_dataset=run.data["train"].select_columns(columns),
            eval_dataset=run.data["validation"].select_columns(columns),
            processing_class=run.tokenizer,
            callbacks=[telemetry] if telemetry else [],
            unpadded=unpadded,
            by_row=by_row,
        )
    finally:
        if caching:
            enable_caching()

    complete_reference(policy)
    trainer.flops = flops
    trainer.forwards = 0 if precomputed else 1
    return trainer


class FormattedDPOTrainer(ReferenceTrainer, DPOTrainer):
    """TRL's DPOTrainer with exact resume, for pairs that are already tokenised."""

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
        """Compute TRL's loss, and check in the first step that the policy is still equal to the reference.

        Raises:
            WorkError: their log-probabilities differ.
        """
        training = model.training
        if training:
            self._count_batch(inputs)
        result = super()._compute_loss(model, inputs, return_outputs)  # type: ignore[no-untyped-call]
        if self.use_liger_kernel:
            self._metrics["train" if training else "eval"].pop("entropy", None)
        if training and self.state.global_step == 0:
            tokens = float(inputs["completion_mask"].sum() / len(inputs["completion_mask"]))
            self._check_reward("dpo", "reward margin", self._metrics["train"]["rewards/margins"][-1], tokens)
        return result
