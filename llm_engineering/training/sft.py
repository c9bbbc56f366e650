"""Supervised fine-tuning with TRL's SFTTrainer on rows whose labels were made and checked before."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import trl
from datasets import DatasetDict
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTTrainer

from llm_engineering.compute.device import Device, check_training, choose_backend, choose_device
from llm_engineering.config import SFTConfig, TrainConfig, TrainingSetup
from llm_engineering.formatting.labels import check_labels
from llm_engineering.models import load_tokenizer
from llm_engineering.settings import Settings
from llm_engineering.training.job import Job
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
from llm_engineering.training.unsloth_policy import Loading, check_packable, check_packed

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
    identity = run_identity("sft", config, setup, device, data)
    folder = work_folder("sft", identity, settings)

    def build(used: TrainConfig, telemetry: TelemetryCallback) -> ResumableSFTTrainer:
        assert isinstance(used, SFTConfig)
        loading = Loading(setup.max_length, used.gradient_checkpointing, setup.seed)
        policy = new_policy(setup.model, config.lora, settings, device, config.method, loading)
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


def train_sft_job(job: Job, data: DatasetDict, settings: Settings) -> TrainingResult:
    """`train_sft` for a job, in this process, which may be one of several."""
    config = SFTConfig.model_validate(job.config)
    return train_sft(data, config, job.setup, settings, job.parameters, job.resume_from)


class ResumableSFTTrainer(ResumableTrainer, SFTTrainer):
    """TRL's trainer, whose runs cannot be lost."""


def sft_trainer(
    policy: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    data: DatasetDict,
    config: SFTConfig,
    setup: TrainingSetup,
    device: Device,
    folder: Path,
    telemetry: TelemetryCallback | None = None,
) -> ResumableSFTTrainer:
    """TRL's trainer for rows that are tokenised and labelled already; TRL packs them and changes nothing else."""
    arguments = trl.SFTConfig(
        **training_arguments(config, device, setup, folder),
        max_length=setup.max_length,
        # Best-fit-decreasing keeps every row whole. Packed rows do not see each other: position ids restart, there
        # is no attention mask, and TRL runs the model with use_cache=False. Attention that reads an attention mask
        # alone would leak from row to row: the recipe can name none (config.ComputeConfig).
        packing=config.packing,
        packing_strategy="bfd",
        eval_packing=False,
        # unsloth would turn it on where it is not set.
        padding_free=False,
        train_sampling_strategy=config.train_sampling_strategy,
    )
    columns = ["input_ids", "labels"]
    packed_by_unsloth = device.backend == "unsloth" and config.packing
    if packed_by_unsloth:
        check_packable(policy.config.model_type)
    trainer = ResumableSFTTrainer(
        model=policy,
        args=arguments,
        train_dataset=data["train"].select_columns(columns),
        eval_dataset=data["validation"].select_columns(columns),
        processing_class=tokenizer,
        callbacks=[telemetry] if telemetry else [],
    )
    if packed_by_unsloth:
        check_packed(next(iter(trainer.get_train_dataloader())))
    return trainer
