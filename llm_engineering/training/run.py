"""The part of a training run that SFT and DPO share: resume, train, save the adapter, report."""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
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
)

from llm_engineering.compute.device import Device, choose_optimiser
from llm_engineering.config import ComputeConfig, TrainConfig, TrainingSetup
from llm_engineering.errors import WorkError
from llm_engineering.settings import Settings
from llm_engineering.tracking import Trackers
from llm_engineering.training import ranks
from llm_engineering.training.checkpoints import given_checkpoint, held, newest_complete
from llm_engineering.training.distributed import (
    distributed_arguments,
    effective_batch,
    halved,
    sizes_text,
    whole_weights,
)
from llm_engineering.training.flops import peak_flops
from llm_engineering.training.interruption import Interruption
from llm_engineering.training.policy import save_policy
from llm_engineering.training.report import write_training_report
from llm_engineering.training.resumable import RestoreWindow, ResumableTrainer
from llm_engineering.training.telemetry import TelemetryCallback, Work, peak_memory_bytes

logger = logging.getLogger(__name__)


class TrainingResult(NamedTuple):
    """Two folders, `adapter` and `report`, and the summary that the report holds as JSON."""

    adapter: Path
    report: Path
    summary: dict[str, Any]


def run_identity(
    stage: str,
    config: TrainConfig,
    setup: TrainingSetup,
    device: Device,
    data: DatasetDict,
    reference: str = "",
) -> dict[str, Any]:
    """All that decides what this run computes: recipe, model revision, device, data, and the model it starts from."""
    return {
        **setup.model_dump(mode="json", exclude={"tracking"}),
        stage: config.model_dump(mode="json"),
        "device": device_facts(device),
        "dataset": dataset_digests(data),
        "reference": reference,
    }


def dataset_digests(data: DatasetDict) -> dict[str, str]:
    """A hash of the rows of each split."""
    splits = {}
    for name in sorted(data):
        digest = hashlib.sha256()
        for row in data[name]:
            digest.update(json.dumps(row, sort_keys=True).encode())
        splits[name] = digest.hexdigest()
    return splits


def work_folder(stage: str, identity: Mapping[str, Any], settings: Settings) -> Path:
    """Where this very run keeps its checkpoints: a run with other settings or other data has another folder,
    so nothing is ever resumed that is not the same run."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return settings.llm_output_dir.resolve() / "training" / f"{stage}-{digest[:12]}"


def training_arguments(config: TrainConfig, device: Device, setup: TrainingSetup, folder: Path) -> dict[str, Any]:
    """The arguments that transformers.TrainingArguments takes for both stages."""
    return {
        **distributed_arguments(setup.compute),
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
        # unsloth turned its own on when it loaded the model.
        "gradient_checkpointing": config.gradient_checkpointing and device.backend == "transformers",
        "optim": choose_optimiser(config.optim, device, setup.compute.distributed)[0],
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
        "seed": setup.seed,
        "report_to": "none",
        "disable_tqdm": True,
    }


def run_training(
    stage: str,
    build: Callable[[TrainConfig, TelemetryCallback], ResumableTrainer],
    *,
    folder: Path,
    identity: Mapping[str, Any],
    config: TrainConfig,
    setup: TrainingSetup,
    device: Device,
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    data: DatasetDict,
    parameters: Mapping[str, Any],
    label_rows: Sequence[tuple[list[int], list[int]]],
    resume_from: Path | None = None,
) -> TrainingResult:
    """Train to the end, from the newest complete checkpoint if there is one.

    Args:
        stage: `sft` or `dpo`.
        build: makes the trainer with the given batch sizes and callback.
        identity: what checkpoints of this run are made from.
        parameters: what Comet gets besides the hyperparameters: dataset versions, run id.
        label_rows: `(input_ids, labels)` of a few rows, for the label view of the report.
        resume_from: a checkpoint to go on from, and not the newest of this run's folder.

    Raises:
        RequestError: a checkpoint was made from something else, or another process trains this very run.
        WorkError: the loss is not a number or has exploded, the disk or the card's memory is full.
        KeyboardInterrupt: Ctrl-C or SIGTERM; a checkpoint was saved.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    optimiser, why = choose_optimiser(config.optim, device, setup.compute.distributed)
    for reason in (*device.reasons, f"optimiser {optimiser}: {why}"):
        logger.info("%s", reason)
    checkpoints = folder / "checkpoints"
    if resume_from is not None:
        given_checkpoint(resume_from, identity)
    tags = [stage, setup.model.name_or_path]
    trackers = Trackers.start(setup.tracking, settings, folder, tags) if ranks.is_main() else Trackers({})
    try:
        logged = {**config.model_dump(), **setup.model_dump(), **device_facts(device), **parameters}
        trackers.log_parameters(_flat(logged))
        transformers.logging.set_verbosity_error()
        with held(folder) if ranks.is_main() else nullcontext():
            used = config
            newest = newest_complete(checkpoints, identity) if ranks.is_main() and not resume_from else None
            checkpoint = resume_from or ranks.from_main(newest)
            while True:
                telemetry = TelemetryCallback(stage, trackers)
                # Before the adapter is made: its first weights are random, and the trainer sets its seed only later.
                transformers.set_seed(setup.seed)
                trainer = build(used, telemetry)
                trainer.identity, trainer.rows = identity, data["train"]
                telemetry.work, telemetry.peak_flops = trainer.work, peak_flops(trainer.args.device, device.dtype)
                started = time.perf_counter()
                if _train(trainer, used, setup.compute, telemetry, checkpoint):
                    break
                assert trainer.model is not None
                smaller = halved(used, training=trainer.model.training)
                sizes = [sizes_text(tried, setup.compute) for tried in (used, smaller)]
                if ranks.world_size() > 1:
                    # The others wait for this process in the middle of a step, and cannot be asked to start it anew.
                    raise WorkError(
                        f"Out of memory in process {ranks.rank()} of {ranks.world_size()} with {sizes[0]}. With several "
                        f"processes the batch is not made smaller by itself: use {sizes[1]} in the recipe's {stage}, "
                        f"and per_device_eval_batch_size {smaller.per_device_eval_batch_size}."
                    )
                logger.warning("%s: out of memory with %s; trying %s", stage, *sizes)
                used = smaller
                del trainer
                gc.collect()
                torch.cuda.empty_cache()
                checkpoint = newest_complete(checkpoints, identity) or resume_from
            seconds = time.perf_counter() - started
            history = trainer.state.log_history
            losses = [entry["loss"] for entry in history if "loss" in entry]
            if not losses or not math.isfinite(losses[-1]):
                raise WorkError(
                    f"The {stage} loss is {losses[-1] if losses else 'missing'} after {trainer.state.global_step} steps. "
                    f"Lower {stage}.learning_rate, or look for broken rows in the data report."
                )
            adapter = folder / "adapter"
            weights = whole_weights(trainer, setup.compute)
            if ranks.is_main():
                shutil.rmtree(adapter, ignore_errors=True)
                assert isinstance(trainer.model, PreTrainedModel | PeftModel)
                save_policy(trainer.model, setup.model, adapter, weights)
                tokenizer.save_pretrained(str(adapter))
    finally:
        places = trackers.end()
    summary = {
        "stage": stage,
        "steps": trainer.state.global_step,
        "resumed_from": checkpoint.name if checkpoint else None,
        "effective_batch": effective_batch(used, setup.compute),
        "num_processes": setup.compute.num_processes,
        "per_device_train_batch_size": used.per_device_train_batch_size,
        "train_loss": losses[-1],
        **{"tokens_per_second": 0.0, "padding_share": 0.0, **telemetry.work.rates(Work(), telemetry.peak_flops)},
        "seconds": {**telemetry.work.seconds, "total": seconds},
        "peak_memory_bytes": peak_memory_bytes(),
        "device": device_facts(device),
        "device_reasons": device.reasons,
        "comet": places.pop("comet", {}),
        "trackers": places,
        "config": config.model_dump(),
        "history": history,
    }
    report = folder / "report"
    if ranks.is_main():
        write_training_report(report, summary, tokenizer, label_rows)
        # The adapter is complete: what was kept to resume from has done its work.
        shutil.rmtree(checkpoints, ignore_errors=True)
    return TrainingResult(adapter, report, summary)


def _train(
    trainer: ResumableTrainer,
    config: TrainConfig,
    compute: ComputeConfig,
    telemetry: TelemetryCallback,
    checkpoint: Path | None,
) -> bool:
    """Train to the end; False if the memory did not suffice."""
    for printer in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printer)
    if config.early_stopping_patience is not None:
        trainer.add_callback(EarlyStoppingCallback(config.early_stopping_patience))
    rows = len(trainer.train_dataset)  # type: ignore[arg-type]
    logger.info("%s: %d rows to train on, %s", telemetry.stage, rows, sizes_text(config, compute))
    repeated = -rows % (config.per_device_train_batch_size * compute.num_processes)
    if compute.num_processes > 1 and repeated:
        logger.info(
            "%s: the last step of each epoch repeats %d of them, so that every process has a batch",
            telemetry.stage,
            repeated,
        )
    if checkpoint is not None:
        logger.info("%s: going on from %s", telemetry.stage, checkpoint)
        trainer.add_callback(RestoreWindow(trainer, checkpoint))
    with Interruption() as interruption:
        trainer.add_callback(interruption)
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except torch.OutOfMemoryError:
            return False
        interruption.agree()
    if interruption.received is not None:
        raise KeyboardInterrupt(f"{interruption.received.name} in step {trainer.state.global_step}")
    return True


def device_facts(device: Device) -> dict[str, str]:
    """Device, precision, attention and backend as text."""
    return {
        "device": device.name,
        "dtype": str(device.dtype).removeprefix("torch."),
        "attn_implementation": device.attn_implementation,
        "backend": device.backend,
    }


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """One level of names and values; a list is one value, as text, which Comet would take apart."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = ", ".join(map(str, value)) if isinstance(value, list) else value
    return flat
