"""REINFORCE leave-one-out (Ahmadian et al. 2024, arXiv:2402.14740) with TRL's RLOOTrainer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import trl
from datasets import DatasetDict
from peft import PeftModel
from transformers import PreTrainedModel
from trl import RLOOTrainer

from llm_engineering.recipe.online_blocks import RLOOConfig
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.training_blocks import TrainingSetup
from llm_engineering.training.processes.job import Job, TrainingResult
from llm_engineering.training.rewards import Reward, open_rewards
from llm_engineering.training.telemetry.work import TelemetryCallback
from llm_engineering.training.train import run_training
from llm_engineering.training.trainer.online import OnlineTrainer, check_prompts, online_arguments
from llm_engineering.training.trainer.reference import frozen_copy
from llm_engineering.training.training_run import TrainingRun, prepare_run


def train_rloo(
    data: DatasetDict,
    start: Path | None,
    config: RLOOConfig,
    setup: TrainingSetup,
    settings: Settings,
    parameters: Mapping[str, Any] | None = None,
    resume_from: Path | None = None,
    reward_model: Path | None = None,
) -> TrainingResult:
    """Train a model further on its own completions of `data["train"]`. The reference is the model as it is before.

    Args:
        data: splits with `prompt_ids`, `prompt` (messages) and `answers` (accepted ones, which some rewards read).
        start: folder of the adapter, or of the full model, to train; None for the base model.
        parameters: logged by the trackers beside the hyperparameters.
        resume_from: checkpoint folder to resume from; the default is the newest complete one of the same run.
        reward_model: folder of the model of the reward `reward_model`; None without this reward.

    Raises:
        RequestError: this machine cannot train with this method or optimiser, a reward cannot be opened, or the prompts
            do not fit the model or the generation step.
        WorkError: the rewards have no differences to learn from, or training fails.
    """
    # Choose the device, load the tokenizer, check the prompts, open the rewards
    run = prepare_run("rloo", data, config, setup, settings, start, parameters, resume_from, reward_model)
    check_prompts(run)
    rewards = open_rewards(config, setup, settings, reward_model)

    # Load the model, and make its trainer
    def make_trainer(config: RLOOConfig, telemetry: TelemetryCallback) -> FormattedRLOOTrainer:
        return rloo_trainer(run, run.load_policy(), config, rewards, telemetry)

    # Train, save the model, write the report
    return run_training(run, make_trainer)


def train_rloo_job(job: Job, data: DatasetDict, settings: Settings) -> TrainingResult:
    """Run `train_rloo` for a job in this process, which may be one of several."""
    config = RLOOConfig.model_validate(job.config)
    return train_rloo(data, job.start, config, job.setup, settings, job.parameters, job.resume_from, job.reward_model)


class FormattedRLOOTrainer(OnlineTrainer, RLOOTrainer):
    """TRL's RLOOTrainer with exact resume. It takes prompts that are already tokenised."""


def rloo_trainer(
    run: TrainingRun[RLOOConfig],
    policy: PreTrainedModel | PeftModel,
    config: RLOOConfig,
    rewards: list[Reward],
    telemetry: TelemetryCallback | None = None,
) -> FormattedRLOOTrainer:
    """Make TRL's trainer for tokenised prompts. The reference is `policy` as it is now.

    Args:
        policy: the model to train; its adapter, if it has one, is trainable.
        config: the run's config, perhaps with smaller batches.
    """
    return FormattedRLOOTrainer(
        stage=run.stage,
        rewards=rewards,
        reference=frozen_copy(policy, needed=config.beta > 0),
        model=policy,
        args=trl.RLOOConfig(**online_arguments(run, config)),
        train_dataset=run.data["train"],
        eval_dataset=run.data["validation"],
        processing_class=run.tokenizer,
        callbacks=[telemetry] if telemetry else [],
    )
