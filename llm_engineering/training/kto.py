"""Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv:2402.01306) with TRL's KTOTrainer."""

from __future__ import annotations

import logging
from typing import Any

import trl
from datasets import Dataset, DatasetDict
from peft import PeftModel
from transformers import PreTrainedModel
from trl import KTOTrainer

from llm_engineering.errors import RequestError, WorkError
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.stage_blocks import KTOConfig
from llm_engineering.training.arguments import training_arguments
from llm_engineering.training.processes import ranks
from llm_engineering.training.processes.job import Job, TrainingResult
from llm_engineering.training.train import run_training
from llm_engineering.training.trainer.reference import ReferenceTrainer, uncached
from llm_engineering.training.training_run import TrainingRun, prepare_run

logger = logging.getLogger(__name__)

# Weighted good answers to weighted bad ones (arXiv:2402.01306, equation 8).
LEAST, MOST = 1.0, 4 / 3


def train_kto(job: Job, data: DatasetDict, settings: Settings) -> TrainingResult:
    """Train a model further on `data["train"]`. The reference is the model as it is before KTO.

    Args:
        data: splits with `prompt_ids`, `completion_ids` and `label`; each completion ends with its end-of-turn token.

    Raises:
        RequestError: all answers have the same label.
    """
    run = prepare_run(job, KTOConfig, data, settings)
    if ranks.is_main():
        good = sum(data["train"]["label"])
        line, warning = balance(good, len(data["train"]) - good, run.config)
        logger.info("%s", line)
        if warning:
            logger.warning("%s", warning)
    return run_training(run, lambda config: kto_trainer(run, run.load_policy(), config))


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
    run: TrainingRun[KTOConfig], policy: PreTrainedModel | PeftModel, config: KTOConfig
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

    arguments = trl.KTOConfig(
        **training_arguments(config, run.device, run.setup, run.folder),
        beta=config.beta,
        loss_type=config.loss_type,
        desirable_weight=config.desirable_weight,
        undesirable_weight=config.undesirable_weight,
        precompute_ref_log_probs=config.precompute_ref_log_probs,
        # Formatting has already cut or set aside the rows that are too long, and counted them. TRL cuts nothing.
        max_length=None,
    )
    with uncached():
        train, validation = (
            batched(run.data[split], size, run.setup.seed, estimates) for split in ("train", "validation")
        )
        trainer = FormattedKTOTrainer(
            run=run, config=config, model=policy, args=arguments, train_dataset=train, eval_dataset=validation
        )
    if estimates:
        # The policy and the reference also read the answers that estimate the KL divergence.
        trainer.forwards = 2 * trainer.forwards + 1
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

    def _check_start(self, inputs: dict[str, Any]) -> None:
        tokens = float(inputs["completion_mask"].sum(dim=1).max())
        for name in ("chosen", "rejected"):
            # A batch may have only good or only bad answers.
            for reward in self._metrics["train"].get(f"rewards/{name}", [])[-1:]:
                self._check_reward(f"reward of the {name} answers", reward, tokens)
