"""Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv:2402.01306) with TRL's KTOTrainer."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset, DatasetDict, disable_caching, enable_caching, is_caching_enabled
from peft import PeftModel
from transformers import PreTrainedModel
from trl import KTOTrainer

from llm_engineering.errors import RequestError, WorkError
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.stage_blocks import KTOConfig
from llm_engineering.recipe.training_blocks import TrainingSetup
from llm_engineering.training.arguments import training_arguments
from llm_engineering.training.processes import ranks
from llm_engineering.training.processes.job import Job, TrainingResult
from llm_engineering.training.telemetry.flops import TrainingFlops
from llm_engineering.training.telemetry.work import TelemetryCallback
from llm_engineering.training.train import run_training
from llm_engineering.training.trainer.reference import ReferenceTrainer, complete_reference, frozen_copy, savings
from llm_engineering.training.training_run import TrainingRun, prepare_run

logger = logging.getLogger(__name__)

# Weighted good answers to weighted bad ones (arXiv:2402.01306, equation 8).
LEAST, MOST = 1.0, 4 / 3


def train_kto(
    data: DatasetDict,
    start: Path | None,
    config: KTOConfig,
    setup: TrainingSetup,
    settings: Settings,
    parameters: Mapping[str, Any] | None = None,
    resume_from: Path | None = None,
) -> TrainingResult:
    """Train a model further on `data["train"]`. The reference is the model as it is before KTO.

    Args:
        data: splits with `prompt_ids`, `completion_ids` and `label`; each completion ends with its end-of-turn token.
        start: folder of the adapter, or of the full model, to train; None for the base model.
        parameters: logged by the trackers beside the hyperparameters.
        resume_from: checkpoint folder to resume from; the default is the newest complete one of the same run.

    Raises:
        RequestError: this machine cannot train with this method or optimiser, or all answers have the same label.
        WorkError: a completion is empty or has no end of turn (`check_labels`), or training fails.
    """
    # Choose the device, load the tokenizer, check the labels
    run = prepare_run("kto", data, config, setup, settings, start, parameters, resume_from)

    # Print the balance of good and bad answers
    if ranks.is_main():
        good = sum(data["train"]["label"])
        line, warning = balance(good, len(data["train"]) - good, config)
        logger.info("%s", line)
        if warning:
            logger.warning("%s", warning)

    # Load the model, and make its trainer
    def make_trainer(config: KTOConfig, telemetry: TelemetryCallback) -> FormattedKTOTrainer:
        return kto_trainer(run, run.load_policy(), config, telemetry)

    # Train, save the model, write the report
    return run_training(run, make_trainer)


def train_kto_job(job: Job, data: DatasetDict, settings: Settings) -> TrainingResult:
    """Run `train_kto` for a job in this process, which may be one of several."""
    config = KTOConfig.model_validate(job.config)
    return train_kto(data, job.start, config, job.setup, settings, job.parameters, job.resume_from)


def balance(good: int, bad: int, config: KTOConfig) -> tuple[str, str]:
    """The balance of the rows of the training split, and a warning that is empty if it is between 1:1 and 4:3.

    Raises:
        RequestError: there are no good or no bad answers.
    """
    if not good or not bad:
        missing = "good" if not good else "bad"
        raise RequestError(
            f"The training split has no {missing} answer, and KTO learns from both kinds: add rows whose label is "
            f"{'true' if missing == 'good' else 'false'}, or train with sft on the good ones alone."
        )
    ratio = good * config.desirable_weight / (bad * config.undesirable_weight)
    line = (
        f"kto: {good} good × weight {config.desirable_weight:g} to {bad} bad × weight {config.undesirable_weight:g} answers, "
        f"{ratio:.2f} to 1"
    )
    # The bounds are those of the weights, so rounding must not warn of them.
    if config.loss_type != "kto" or LEAST - 1e-3 <= ratio <= MOST + 1e-3:
        return line, ""
    lowest, highest = (bound * bad * config.undesirable_weight / good for bound in (LEAST, MOST))
    least, most = (good * config.desirable_weight / bad / bound for bound in (MOST, LEAST))
    return line, (
        f"kto: the weighted numbers of good and bad answers are {ratio:.2f} to 1, outside 1:1 to 4:3, which the authors of KTO "
        f"advise. Set kto.desirable_weight between {lowest:.4g} and {highest:.4g}, or kto.undesirable_weight between "
        f"{least:.4g} and {most:.4g}."
    )


def kto_trainer(
    run: TrainingRun[KTOConfig],
    policy: PreTrainedModel | PeftModel,
    config: KTOConfig,
    telemetry: TelemetryCallback | None = None,
) -> FormattedKTOTrainer:
    """Make TRL's trainer for tokenised answers with labels. The reference is `policy` as it is now.

    Args:
        policy: the model to train; its adapter, if it has one, is trainable.
        config: the run's config, perhaps with smaller batches.

    Raises:
        WorkError: the batch was halved to one row, which gives no estimate of the KL divergence.
    """
    size, estimates = config.per_device_train_batch_size, config.loss_type == "kto"
    if estimates and size == 1:
        raise WorkError(
            "Out of memory with two rows at a time, and KTO needs at least two to estimate the KL divergence. Lower "
            "formatting.max_length, set kto.gradient_checkpointing, or set kto.loss_type to apo_zero_unpaired."
        )

    # Make the reference, and find out which computations can be saved with this model
    precomputed = config.precompute_ref_log_probs
    reference = frozen_copy(policy, needed=not precomputed)
    flops = TrainingFlops.of(policy)
    by_row, unpadded = savings(run, policy, reference, config)

    # Set the training arguments
    arguments = trl.KTOConfig(
        **training_arguments(config, run.device, run.setup, run.folder),
        beta=config.beta,
        loss_type=config.loss_type,
        desirable_weight=config.desirable_weight,
        undesirable_weight=config.undesirable_weight,
        precompute_ref_log_probs=precomputed,
        # Formatting has already cut or set aside the rows that are too long, and counted them. TRL cuts nothing.
        max_length=None,
    )

    # Make the trainer. With caching, shuffled rows and precomputed log-probabilities would be written into the dataset's
    # folder. This folder is an artifact of another step, so it must not change.
    caching = is_caching_enabled()
    disable_caching()
    try:
        train, validation = (
            batched(run.data[split], size, run.setup.seed, estimates) for split in ("train", "validation")
        )
        trainer = FormattedKTOTrainer(
            model=policy,
            ref_model=reference,
            args=arguments,
            train_dataset=train,
            eval_dataset=validation,
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
    # The reference, and the policy and the reference on the answers that estimate the KL divergence.
    trainer.forwards = (0 if precomputed else 1) * (2 if estimates else 1) + (1 if estimates else 0)
    return trainer


def batched(rows: Dataset, size: int, seed: int, estimates: bool) -> Dataset:
    """Shuffle the rows, and give each one the completion of the row before it in its batch of `size` rows.

    As in TRL, these completions estimate the KL divergence of a batch, so the trainer must not shuffle again. Answers to
    one question stand next to each other until they are shuffled.

    Args:
        estimates: whether the loss needs the estimate.
    """
    rows = rows.select_columns(["prompt_ids", "completion_ids", "label"]).shuffle(seed=seed)

    def rotated(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {"KL_completion_ids": [*batch["completion_ids"][-1:], *batch["completion_ids"][:-1]]}

    return rows.map(rotated, batched=True, batch_size=size) if estimates else rows


class FormattedKTOTrainer(ReferenceTrainer, KTOTrainer):
    """TRL's KTOTrainer with exact resume, for answers that are already tokenised and in the order of their batches."""

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
            tokens = float(inputs["completion_mask"].sum(dim=1).max())
            for name in ("chosen", "rejected"):
                # A batch may have only good or only bad answers.
                for reward in self._metrics["train"].get(f"rewards/{name}", [])[-1:]:
                    self._check_reward("kto", f"reward of the {name} answers", reward, tokens)
        return result
