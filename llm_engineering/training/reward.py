"""Reward models with TRL's RewardTrainer, on pairs that are already tokenised.

The model before gets a head that scores in place of the one that predicts tokens, and is trained further.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import peft
import torch
import trl
from datasets import DatasetDict
from peft import PeftModel, prepare_model_for_kbit_training
from transformers import PreTrainedModel
from trl import RewardTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference

from llm_engineering.models.base_model import load_model
from llm_engineering.models.fit import lora_config
from llm_engineering.models.reward_model import head_in_float32, padding_token, with_reward_adapter
from llm_engineering.recipe.model_blocks import LoraConfig
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.stage_blocks import RewardConfig
from llm_engineering.training.arguments import training_arguments
from llm_engineering.training.policy import forget_base, full_model, in_float32, remember_start
from llm_engineering.training.processes.job import Job, TrainingResult
from llm_engineering.training.telemetry.flops import TrainingFlops
from llm_engineering.training.train import run_training
from llm_engineering.training.trainer.resumable import ResumableTrainer
from llm_engineering.training.training_run import TrainingRun, prepare_run


def train_reward(job: Job, data: DatasetDict, settings: Settings) -> TrainingResult:
    """Train a reward model on `data["train"]`, and measure the loss on `data["validation"]` meanwhile.

    Args:
        data: splits with `prompt_ids`, `chosen_ids` and `rejected_ids`; each answer ends with its end-of-turn token.
    """
    run = prepare_run(job, RewardConfig, data, settings)
    return run_training(run, lambda config: reward_trainer(run, load_start(run), config))


def load_start(run: TrainingRun[RewardConfig]) -> PreTrainedModel | PeftModel:
    """Load the model of the stage before, or the base model, with a head of random weights, which follow from the seed."""
    model, device, start = run.setup.model, run.device, run.start
    if run.method == "full":
        return full_model(model, start, run.settings, device, scores=True)
    lora = run.config.lora or LoraConfig()
    config = peft.LoraConfig.from_pretrained(str(start)) if start else lora_config(lora)
    assert isinstance(config, peft.LoraConfig)
    base = load_model(model, run.settings, device, four_bits=run.method == "qlora", scores=True)
    in_float32(base, config.modules_to_save)
    head_in_float32(base)
    if run.method == "qlora":
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    policy = with_reward_adapter(base, config, start)
    forget_base(policy, model)
    if start is None and lora.moves_base_weights:
        remember_start(policy)
    return policy


def reward_trainer(
    run: TrainingRun[RewardConfig], model: PreTrainedModel | PeftModel, config: RewardConfig
) -> FormattedRewardTrainer:
    """Make TRL's trainer for tokenised pairs.

    Args:
        model: gives one number for each row; its adapter, if it has one, is trainable.
        config: the run's config, perhaps with smaller batches.
    """
    # Set the training arguments
    arguments = trl.RewardConfig(
        **training_arguments(config, run.device, run.setup, run.folder),
        center_rewards_coefficient=config.center_rewards_coefficient,
        # Formatting has already cut or set aside the pairs that are too long, and counted them. TRL drops nothing.
        max_length=None,
    )

    # Make the trainer. TRL and transformers take the model's padding token from the tokenizer, also when training begins.
    tokenizer = copy.deepcopy(run.tokenizer)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(padding_token(tokenizer))
    columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
    trainer = FormattedRewardTrainer(
        model=model,
        args=arguments,
        data_collator=PairCollator(pad_token_id=tokenizer.pad_token_id),
        train_dataset=run.data["train"].select_columns(columns),
        eval_dataset=run.data["validation"].select_columns(columns),
        processing_class=tokenizer,
    )
    trainer.flops = TrainingFlops.of(model)
    return trainer


@dataclass
class PairCollator(DataCollatorForPreference):
    """TRL's collator, for pairs that have their prompt in a column of its own."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Stack the chosen rows above the rejected ones, each a prompt with its answer, padded on the right."""
        rows = [{name: row["prompt_ids"] + row[name] for name in ("chosen_ids", "rejected_ids")} for row in examples]
        return super().torch_call(rows)


class FormattedRewardTrainer(ResumableTrainer, RewardTrainer):
    """TRL's RewardTrainer with exact resume."""

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns: Any = ["prompt_ids", "chosen_ids", "rejected_ids"]

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Compute TRL's loss, and count the tokens of the batch."""
        if model.training:
            mask = inputs["attention_mask"]
            # No position predicts a token, so none takes an output matrix.
            self.count(mask.sum(dim=1).tolist(), 0, mask.numel())
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[no-untyped-call]
