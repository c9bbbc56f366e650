"""REINFORCE leave-one-out (Ahmadian et al. 2024, arXiv:2402.14740) with TRL's RLOOTrainer."""

from __future__ import annotations

import trl
from datasets import DatasetDict
from trl import RLOOTrainer

from llm_engineering.recipe.online_blocks import RLOOConfig
from llm_engineering.recipe.settings import Settings
from llm_engineering.training.processes.job import Job, TrainingResult
from llm_engineering.training.rewards import open_rewards
from llm_engineering.training.train import run_training
from llm_engineering.training.trainer.online import OnlineTrainer, check_prompts, online_trainer
from llm_engineering.training.training_run import prepare_run


class FormattedRLOOTrainer(OnlineTrainer, RLOOTrainer):
    """TRL's RLOOTrainer with exact resume. It takes prompts that are already tokenised."""


def train_rloo(job: Job, data: DatasetDict, settings: Settings) -> TrainingResult:
    """Train a model further on its own completions of `data["train"]`. The reference is the model as it is before.

    Args:
        data: splits with `prompt_ids`, `prompt` (messages) and `answers` (accepted ones, which some rewards read).

    Raises:
        RequestError: a reward cannot be opened, or the prompts do not fit the model or the generation step.
    """
    run = prepare_run(job, RLOOConfig, data, settings)
    check_prompts(run)
    rewards = open_rewards(run.config, run.setup, settings, run.reward_model)
    classes = FormattedRLOOTrainer, trl.RLOOConfig
    return run_training(run, lambda config: online_trainer(run, run.load_policy(), config, rewards, *classes))
