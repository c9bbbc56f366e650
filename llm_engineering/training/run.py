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
from dataclasses import dataclass
from functools import cached_property
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

from llm_engineering.errors import WorkError
from llm_engineering.formatting.labels import label_views
from llm_engineering.models.device import Device, choose_optimiser
from llm_engineering.recipe.compute_blocks import ComputeConfig
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.training_blocks import TrainConfig, TrainingSetup
from llm_engineering.training import ranks
from llm_engineering.training.arguments import device_facts, effective_batch, halved, sizes_text, whole_weights
from llm_engineering.training.checkpoints import given_checkpoint, held, newest_complete
from llm_engineering.training.job import SUMMARY_FILE, Stage, TrainingResult
from llm_engineering.training.policy import save_policy
from llm_engineering.training.ranks import Interruption
from llm_engineering.training.telemetry import TelemetryCallback, Work, peak_flops, peak_memory_bytes
from llm_engineering.training.tracking import Trackers
from llm_engineering.training.trainer import RestoreWindow, ResumableTrainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingRun:
    """One run of a stage: everything that decides what it computes, and where it works.

    Attributes:
        stage: `sft` or `dpo`.
        config: the stage's block of the recipe.
        data: formatted splits, `train` and `validation` among them.
        tokenizer: with the chat template of the recipe; it is saved beside the adapter.
        label_rows: `(input_ids, labels)` of a few rows, for the label view of the report.
        parameters: what trackers get besides the hyperparameters: dataset versions, run id.
        start: hash of the trained weights that the stage starts from; empty for the base model.
        resume_from: a checkpoint to go on from, in place of the newest of this run's folder.
    """

    stage: Stage
    config: TrainConfig
    setup: TrainingSetup
    settings: Settings
    device: Device
    tokenizer: PreTrainedTokenizerBase
    data: DatasetDict
    label_rows: Sequence[tuple[list[int], list[int]]]
    parameters: Mapping[str, Any]
    start: str = ""
    resume_from: Path | None = None

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What checkpoints of this run are made from: recipe, model revision, device, data, and the start."""
        return {
            **self.setup.model_dump(mode="json", exclude={"tracking"}),
            self.stage: self.config.model_dump(mode="json"),
            "device": device_facts(self.device),
            "dataset": dataset_digests(self.data),
            "reference": self.start,
        }

    @cached_property
    def folder(self) -> Path:
        """Where this run keeps its checkpoints. Another identity has another folder: no run resumes another's."""
        digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()
        return self.settings.llm_output_dir.resolve() / "training" / f"{self.stage}-{digest[:12]}"


def dataset_digests(data: DatasetDict) -> dict[str, str]:
    """A hash of the rows of each split."""
    splits = {}
    for name in sorted(data):
        digest = hashlib.sha256()
        for row in data[name]:
            digest.update(json.dumps(row, sort_keys=True).encode())
        splits[name] = digest.hexdigest()
    return splits


def run_training(
    run: TrainingRun, build: Callable[[TrainConfig, TelemetryCallback], ResumableTrainer]
) -> TrainingResult:
    """Train to the end, from the newest complete checkpoint if there is one.

    Args:
        build: makes the trainer with the given batch sizes and callback.

    Raises:
        RequestError: a checkpoint was made from something else, or another process trains this very run.
        WorkError: the loss is not a number or has exploded, the disk or the card's memory is full.
        KeyboardInterrupt: Ctrl-C or SIGTERM; a checkpoint was saved.
    """
    stage, config, setup, folder = run.stage, run.config, run.setup, run.folder
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    optimiser, why = choose_optimiser(config.optim, run.device, setup.compute.distributed)
    for reason in (*run.device.reasons, f"optimiser {optimiser}: {why}"):
        logger.info("%s", reason)
    if run.resume_from is not None:
        given_checkpoint(run.resume_from, run.identity)

    # Start the trackers
    tags = [stage, setup.model.name_or_path]
    trackers = Trackers.start(setup.tracking, run.settings, folder, tags) if ranks.is_main() else Trackers({})
    try:
        logged = {**config.model_dump(), **setup.model_dump(), **device_facts(run.device), **run.parameters}
        trackers.log_parameters(_flat(logged))
        transformers.logging.set_verbosity_error()
        with held(folder) if ranks.is_main() else nullcontext():
            # Train
            trained = _train_until_it_fits(run, build, trackers)
            trainer, telemetry = trained.trainer, trained.telemetry
            history = trainer.state.log_history
            losses = [entry["loss"] for entry in history if "loss" in entry]
            if not losses or not math.isfinite(losses[-1]):
                raise WorkError(
                    f"The {stage} loss is {losses[-1] if losses else 'missing'} after {trainer.state.global_step} steps. "
                    f"Lower {stage}.learning_rate, or look for broken rows in the data report."
                )

            # Save the model and its tokenizer
            adapter = folder / "adapter"
            weights = whole_weights(trainer, setup.compute)
            if ranks.is_main():
                shutil.rmtree(adapter, ignore_errors=True)
                assert isinstance(trainer.model, PreTrainedModel | PeftModel)
                save_policy(trainer.model, setup.model, adapter, weights)
                run.tokenizer.save_pretrained(str(adapter))
    finally:
        places = trackers.end()

    # Write the summary
    summary = {
        "stage": stage,
        "steps": trainer.state.global_step,
        "resumed_from": trained.checkpoint.name if trained.checkpoint else None,
        "effective_batch": effective_batch(trained.config, setup.compute),
        "num_processes": setup.compute.num_processes,
        "per_device_train_batch_size": trained.config.per_device_train_batch_size,
        "train_loss": losses[-1],
        **{"tokens_per_second": 0.0, "padding_share": 0.0, **telemetry.work.rates(Work(), telemetry.peak_flops)},
        "seconds": {**telemetry.work.seconds, "total": trained.seconds},
        "peak_memory_bytes": peak_memory_bytes(),
        "device": device_facts(run.device),
        "device_reasons": run.device.reasons,
        "comet": places.pop("comet", {}),
        "trackers": places,
        "config": config.model_dump(),
        "history": history,
        "labels": label_views(run.label_rows, run.tokenizer),
        "end_token": str(run.tokenizer.eos_token),
    }
    report = folder / "report"
    if ranks.is_main():
        report.mkdir(parents=True, exist_ok=True)
        (report / SUMMARY_FILE).write_text(json.dumps(summary, indent=2), encoding="utf-8")
        # The adapter is complete: what was kept to resume from has done its work.
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return TrainingResult(adapter, report, summary)


class _Trained(NamedTuple):
    """A training that came to its end: with which batch sizes, from which checkpoint, and in how many seconds."""

    trainer: ResumableTrainer
    config: TrainConfig
    telemetry: TelemetryCallback
    checkpoint: Path | None
    seconds: float


def _train_until_it_fits(
    run: TrainingRun, build: Callable[[TrainConfig, TelemetryCallback], ResumableTrainer], trackers: Trackers
) -> _Trained:
    """Train with the recipe's batch; where the card's memory does not suffice, with half of it, and so on."""
    stage, setup = run.stage, run.setup
    checkpoints = run.folder / "checkpoints"
    used = run.config
    newest = newest_complete(checkpoints, run.identity) if ranks.is_main() and not run.resume_from else None
    checkpoint = run.resume_from or ranks.from_main(newest)
    while True:
        telemetry = TelemetryCallback(stage, trackers)
        # Before the adapter is made: its first weights are random, and the trainer sets its seed only later.
        transformers.set_seed(setup.seed)
        trainer = build(used, telemetry)
        trainer.identity, trainer.rows = run.identity, run.data["train"]
        telemetry.work, telemetry.peak_flops = trainer.work, peak_flops(trainer.args.device, run.device.dtype)
        started = time.perf_counter()
        if _train(trainer, used, setup.compute, telemetry, checkpoint):
            return _Trained(trainer, used, telemetry, checkpoint, time.perf_counter() - started)
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
        checkpoint = newest_complete(checkpoints, run.identity) or run.resume_from


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


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """One level of names and values; a list is one value, as text, which Comet would take apart."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = ", ".join(map(str, value)) if isinstance(value, list) else value
    return flat
