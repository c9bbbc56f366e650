"""Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290) with TRL's DPOTrainer."""

from __future__ import annotations

from typing import Any

import trl
from datasets import DatasetDict
from peft import PeftModel
from transformers import PreTrainedModel
from trl import DPOTrainer

from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.stage_blocks import DPOConfig
from llm_engineering.training.arguments import training_arguments
from llm_engineering.training.processes.job import Job, TrainingResult
from llm_engineering.training.train import run_training
from llm_engineering.training.trainer.reference import ReferenceTrainer, uncached
from llm_engineering.training.training_run import TrainingRun, prepare_run


def train_dpo(job: Job, data: DatasetDict, settings: Settings) -> TrainingResult:
    """Train a model further on `data["train"]`. The reference is the model as it is before DPO.

    Args:
        data: splits with `prompt_ids`, `chosen_ids` and `rejected_ids`; each answer ends with its end-of-turn token.
    """
    run = prepare_run(job, DPOConfig, data, settings)
    return run_training(run, lambda config: dpo_trainer(run, run.load_policy(), config))


def dpo_trainer(
    run: TrainingRun[DPOConfig], policy: PreTrainedModel | PeftModel, config: DPOConfig
) -> FormattedDPOTrainer:
    """Make TRL's trainer for tokenised pairs. The reference is `policy` as it is now.

    Args:
        policy: the model to train; its adapter, if it has one, is trainable.
        config: the run's config, perhaps with smaller batches.
    """
    arguments = trl.DPOConfig(
        **training_arguments(config, run.device, run.setup, run.folder),
        beta=config.beta,
        loss_type=[config.loss_type, *(["sft"] if config.sft_weight else [])],
        loss_weights=[1.0, *([config.sft_weight] if config.sft_weight else [])],
        label_smoothing=config.label_smoothing,
        precompute_ref_log_probs=config.precompute_ref_log_probs,
        # Formatting has already cut or set aside the pairs that are too long, and counted them. TRL cuts nothing.
        max_length=None,
    )
    columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
    with uncached():
        return FormattedDPOTrainer(
            run=run,
            config=config,
            model=policy,
            args=arguments,
            train_dataset=run.data["train"].select_columns(columns),
            eval_dataset=run.data["validation"].select_columns(columns),
        )


class FormattedDPOTrainer(ReferenceTrainer, DPOTrainer):
    """TRL's DPOTrainer with exact resume, for pairs that are already tokenised."""

    pairs = True

    def _check_start(self, inputs: dict[str, Any]) -> None:
        tokens = float(inputs["completion_mask"].sum() / len(inputs["completion_mask"]))
        self._check_reward("reward margin", self._metrics["train"]["rewards/margins"][-1], tokens)
