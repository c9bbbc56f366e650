"""The part of a training run that SFT and DPO share: resume, train, save the adapter, report."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from datasets import DatasetDict
from peft import PeftModel
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
)

from llm_engineering.compute.device import Device, choose_optimiser
from llm_engineering.config import TrainConfig, TrainingSetup
from llm_engineering.errors import WorkError
from llm_engineering.settings import Settings
from llm_engineering.tracking import CometRun
from llm_engineering.training.checkpoints import newest_complete
from llm_engineering.training.policy import save_policy
from llm_engineering.training.report import write_training_report
from llm_engineering.training.telemetry import TelemetryCallback, peak_memory_bytes

logger = logging.getLogger(__name__)


class TrainingResult(NamedTuple):
    """Two folders, `adapter` and `report`, and the summary that the report holds as JSON."""

    adapter: Path
    report: Path
    summary: dict[str, Any]


def work_folder(
    stage: str,
    config: TrainConfig,
    setup: TrainingSetup,
    device: Device,
    settings: Settings,
    data: DatasetDict,
    reference: str = "",
) -> Path:
    """Where this very run keeps its checkpoints: a run with other settings or other data has another folder,
    so nothing is ever resumed that is not the same run."""
    parts = [config.model_dump(), setup.model_dump(exclude={"tracking"}), device_facts(device), reference]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    for name in sorted(data):
        digest.update(name.encode())
        for row in data[name]:
            digest.update(json.dumps(row, sort_keys=True).encode())
    return settings.llm_output_dir.resolve() / "training" / f"{stage}-{digest.hexdigest()[:12]}"


def training_arguments(config: TrainConfig, device: Device, seed: int, folder: Path) -> dict[str, Any]:
    """The arguments that transformers.TrainingArguments takes for both stages."""
    return {
        "output_dir": str(folder / "checkpoints"),
        "learning_rate": config.learning_rate,
        "num_train_epochs": config.num_train_epochs,
        "max_steps": config.max_steps,
        "per_device_train_batch_size": config.per_device_train_batch_size,
        "per_device_eval_batch_size": config.per_device_eval_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "lr_scheduler_type": config.lr_scheduler_type,
        # transformers takes a share of the steps under this name, when it is below 1.
        "warmup_steps": config.warmup_ratio,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "gradient_checkpointing": config.gradient_checkpointing,
        "optim": choose_optimiser(config.optim, device)[0],
        "load_best_model_at_end": config.load_best,
        "metric_for_best_model": "eval_loss",
        "logging_steps": config.logging_steps,
        "logging_first_step": True,
        "eval_strategy": "steps",
        "eval_steps": config.eval_steps,
        "save_steps": config.save_steps,
        "save_total_limit": 2,
        # TRL turns bf16 on by itself, also where it is slower.
        "bf16": device.dtype == torch.bfloat16,
        "fp16": device.dtype == torch.float16,
        "use_cpu": device.name == "cpu",
        "dataloader_pin_memory": device.name == "cuda",
        "seed": seed,
        "report_to": "none",
        "disable_tqdm": True,
    }


def run_training(
    stage: str,
    build: Callable[[TelemetryCallback], Trainer],
    *,
    folder: Path,
    config: TrainConfig,
    setup: TrainingSetup,
    device: Device,
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    parameters: Mapping[str, Any],
    label_rows: Sequence[tuple[list[int], list[int]]],
) -> TrainingResult:
    """Train to the end, from the newest complete checkpoint if there is one.

    Args:
        stage: `sft` or `dpo`.
        build: makes the TRL trainer with the given callback.
        parameters: what Comet gets besides the hyperparameters: dataset versions, run id.
        label_rows: `(input_ids, labels)` of a few rows, for the label view of the report.

    Raises:
        WorkError: the loss is not a number.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    optimiser, why = choose_optimiser(config.optim, device)
    for reason in (*device.reasons, f"optimiser {optimiser}: {why}"):
        logger.info("%s", reason)
    comet = CometRun.start(setup.tracking, settings, name=folder.name, tags=[stage, setup.model.name_or_path])
    telemetry = TelemetryCallback(stage, comet)
    try:
        # Before the adapter is made: its first weights are random, and the trainer sets its seed only later.
        transformers.set_seed(setup.seed)
        trainer = build(telemetry)
        for printer in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(printer)
        if config.early_stopping_patience is not None:
            trainer.add_callback(EarlyStoppingCallback(config.early_stopping_patience))
        batch = config.per_device_train_batch_size * config.gradient_accumulation_steps
        logger.info(
            "%s: %d rows to train on, effective batch %d = %d per device × %d accumulated",
            stage,
            len(trainer.train_dataset),  # type: ignore[arg-type]
            batch,
            config.per_device_train_batch_size,
            config.gradient_accumulation_steps,
        )
        logged = {**config.model_dump(), **setup.model_dump(), **device_facts(device), **parameters}
        comet.log_parameters(_flat(logged))
        checkpoint = newest_complete(folder / "checkpoints")
        if checkpoint is not None:
            logger.info("%s: going on from %s", stage, checkpoint)
        transformers.logging.set_verbosity_error()
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        history = trainer.state.log_history
        losses = [entry["loss"] for entry in history if "loss" in entry]
        if not losses or not math.isfinite(losses[-1]):
            raise WorkError(
                f"The {stage} loss is {losses[-1] if losses else 'missing'} after {trainer.state.global_step} steps. "
                f"Lower {stage}.learning_rate, or look for broken rows in the data report."
            )
        adapter = folder / "adapter"
        shutil.rmtree(adapter, ignore_errors=True)
        assert isinstance(trainer.model, PreTrainedModel | PeftModel)
        save_policy(trainer.model, setup.model, adapter)
        tokenizer.save_pretrained(str(adapter))
    finally:
        place = comet.end()
    summary = {
        "stage": stage,
        "steps": trainer.state.global_step,
        "resumed_from": checkpoint.name if checkpoint else None,
        "effective_batch": batch,
        "train_loss": losses[-1],
        "tokens_per_second": telemetry.tokens_per_second,
        "peak_memory_bytes": peak_memory_bytes(),
        "device": device_facts(device),
        "device_reasons": device.reasons,
        "comet": place,
        "config": config.model_dump(),
        "history": history,
    }
    report = folder / "report"
    write_training_report(report, summary, tokenizer, label_rows)
    # The adapter is complete: what was kept to resume from has done its work.
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return TrainingResult(adapter, report, summary)


def device_facts(device: Device) -> dict[str, str]:
    """Device, precision and attention as text."""
    return {
        "device": device.name,
        "dtype": str(device.dtype).removeprefix("torch."),
        "attn_implementation": device.attn_implementation,
    }


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
