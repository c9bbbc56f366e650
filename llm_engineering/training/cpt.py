"""Continued pre-training with TRL's SFTTrainer, on texts of which every token is trained."""

from __future__ import annotations

from typing import Any

import torch
from datasets import DatasetDict
from peft import PeftModel
from torch import nn

from llm_engineering.errors import RequestError
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.stage_blocks import CPTConfig
from llm_engineering.training.processes.job import Job, TrainingResult
from llm_engineering.training.sft import FormattedSFTTrainer, sft_trainer
from llm_engineering.training.train import run_training
from llm_engineering.training.training_run import prepare_run


def train_cpt(job: Job, data: DatasetDict, settings: Settings) -> TrainingResult:
    """Train an adapter or the full model on the texts of `data["train"]`.

    Args:
        data: splits with `input_ids` and `labels`, which are equal, because every token is trained.

    Raises:
        RequestError: no embedding is trained although `embedding_learning_rate` is set.
    """
    setup = job.setup.model_copy(update={"train_on_prompt": True})
    run = prepare_run(job.model_copy(update={"setup": setup}), CPTConfig, data, settings)

    def make_trainer(config: CPTConfig) -> TextTrainer:
        trainer = sft_trainer(run, run.load_policy(), config, TextTrainer)
        trainer.embedding_rate = config.embedding_learning_rate
        return trainer

    return run_training(run, make_trainer)


class TextTrainer(FormattedSFTTrainer):
    """The trainer of SFT, with an own learning rate for trained embeddings.

    Attributes:
        embedding_rate: learning rate of input and output embeddings; None if it is that of all weights.
    """

    embedding_rate: float | None = None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimiser, and move the embeddings to parameter groups with their own learning rate.

        Raises:
            RequestError: no embedding is trained.
        """
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if self.embedding_rate is None:
            return optimizer
        trained_model = self.model if model is None else model
        assert isinstance(trained_model, nn.Module)
        embeddings = embedding_parameters(trained_model)
        for group in list(optimizer.param_groups):
            own = [parameter for parameter in group["params"] if id(parameter) in embeddings]
            if own:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in embeddings]
                optimizer.add_param_group({**group, "params": own, "lr": self.embedding_rate})
        check_trained_embeddings(trained_model)
        return optimizer


def check_trained_embeddings(model: nn.Module) -> None:
    """Raise a RequestError if no embedding is trained, although `embedding_learning_rate` is set."""
    if not embedding_parameters(model):
        raise RequestError(
            "cpt.embedding_learning_rate is set, and no embedding of this model is trained. Add the names of its "
            "embeddings to lora.modules_to_save, or remove the key."
        )


def embedding_parameters(model: nn.Module) -> dict[int, str]:
    """The trained weights of the input and output embeddings: their names by `id`.

    PEFT keeps the trained copy of an embedding inside a wrapper, so names are compared: `embed_tokens` covers
    `embed_tokens.modules_to_save.default.weight`.
    """
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    ends = [inner.get_input_embeddings(), inner.get_output_embeddings()]
    prefixes = tuple(
        f"{name.partition('.modules_to_save')[0].removesuffix('.base_layer')}."
        for name, module in model.named_modules()
        if any(module is end for end in ends)
    )
    return {
        id(parameter): name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and name.startswith(prefixes)
    }
