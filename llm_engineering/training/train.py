"""The steps of a prepared training run that all stages share: resume, train, save the model, report."""

from __future__ import annotations

import gc
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import transformers
from datasets import Dataset
from peft import PeftModel
from transformers import EarlyStoppingCallback, PreTrainedModel, PrinterCallback, ProgressCallback

from llm_engineering.errors import RequestError, WorkError
from llm_engineering.formatting.labels import label_views
from llm_engineering.formatting.render import IGNORE_INDEX
from llm_engineering.models.device import choose_optimiser
from llm_engineering.progress import counted
from llm_engineering.recipe.compute_blocks import ComputeConfig
from llm_engineering.recipe.training_blocks import TrainConfig
from llm_engineering.training.arguments import device_facts, effective_batch, halved, sizes_text
from llm_engineering.training.policy import save_policy
from llm_engineering.training.processes import ranks, transfer
from llm_engineering.training.processes.job import RUN_ID, SUMMARY_FILE, TrainingResult
from llm_engineering.training.processes.ranks import Interruption, run_lock
from llm_engineering.training.processes.sharding import whole_weights
from llm_engineering.training.telemetry.flops import peak_flops
from llm_engineering.training.telemetry.tracking import Trackers
from llm_engineering.training.telemetry.work import TelemetryCallback, Work, environment, peak_memory_bytes
from llm_engineering.training.trainer.checkpoints import FINISHED, check_resumable, newest_complete
from llm_engineering.training.trainer.resumable import RestoreWindow, ResumableTrainer
from llm_engineering.training.trainer.trial import open_trial
from llm_engineering.training.training_run import TrainingRun

logger = logging.getLogger(__name__)

# Rows, or pairs with two answers each, that the report shows token by token.
_LABEL_ROWS = 3
_LABEL_PAIRS = 2

Config = TypeVar("Config", bound=TrainConfig)


def run_training(run: TrainingRun[Config], make_trainer: Callable[[Config], ResumableTrainer]) -> TrainingResult:
    """Train to the end. Resumes from the newest complete checkpoint if there is one.

    Args:
        make_trainer: loads the model and makes its trainer. The config that it gets has the batch sizes to use.

    Raises:
        RequestError: a checkpoint has another identity, or another process trains the same run.
        WorkError: the loss is not finite or has exploded, or the disk or the GPU memory is full.
        KeyboardInterrupt: Ctrl-C, SIGTERM or SIGHUP; a checkpoint was saved.
    """
    stage, config, setup, folder = run.stage, run.config, run.setup, run.folder
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    # Log the automatic choices
    optimiser, why = choose_optimiser(config.optim, run.device, setup.compute.distributed)
    for reason in (*run.device.reasons, f"optimiser {optimiser}: {why}"):
        logger.info("%s", reason)

    # Check what the run resumes from
    if ranks.several_machines() and config.load_best and setup.compute.distributed != "ddp":
        raise RequestError(
            f"{stage}.load_best reads the best checkpoint on every machine, but only the first one has it on its disk. Set "
            f"{stage}.load_best to false, or compute.distributed to ddp."
        )
    if run.resume_from is not None:
        _check_named(run.resume_from, run.identity)

    # Start the trackers
    tags = [stage, setup.model.name_or_path]
    trackers = Trackers.start(setup.tracking, run.settings, folder, tags) if ranks.is_main() else Trackers({})
    try:
        logged = {**config.model_dump(), **setup.model_dump(), **device_facts(run.device), **run.parameters}
        trackers.log_parameters(_flat(logged))
        transformers.logging.set_verbosity_error()
        with run_lock(folder) if ranks.is_main() else nullcontext():
            # Train
            trained = _train_until_it_fits(run, make_trainer, trackers)
            trainer = trained.trainer

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
    history = trainer.state.log_history
    summary = {
        "stage": stage,
        "steps": trainer.state.global_step,
        "resumed_from": trained.checkpoint.name if trained.checkpoint else None,
        "effective_batch": effective_batch(trained.config, setup.compute),
        "num_processes": setup.compute.num_processes,
        "per_device_train_batch_size": trained.config.per_device_train_batch_size,
        "train_loss": [entry["loss"] for entry in history if "loss" in entry][-1],
        **{"tokens_per_second": 0.0, "padding_share": 0.0, **trainer.work.rates(Work(), _peak(run, trainer))},
        "seconds": {**trainer.work.seconds, "total": trained.seconds},
        "flops": trainer.total_flops(),
        "peak_memory_bytes": peak_memory_bytes(),
        "environment": environment(),
        "device": device_facts(run.device),
        "device_reasons": run.device.reasons,
        "comet": places.pop("comet", {}),
        "trackers": places,
        "config": config.model_dump(),
        "history": history,
        "labels": label_views(_first_labels(run.data["train"]), run.tokenizer),
        "end_token": str(run.tokenizer.eos_token),
        **trainer.summary(),
    }
    report = folder / "report"
    if ranks.is_main():
        report.mkdir(parents=True, exist_ok=True)
        (report / SUMMARY_FILE).write_text(json.dumps(summary, indent=2), encoding="utf-8")
        # The model is saved. A pipeline still has to store it, and the disk may be full: its end removes the checkpoints.
        if RUN_ID in run.parameters:
            (folder / FINISHED).touch()
        else:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return TrainingResult(adapter, report, summary)


class _Trained(NamedTuple):
    """A finished training: the batch sizes that it used, the checkpoint that it resumed from, and its seconds."""

    trainer: ResumableTrainer
    config: TrainConfig
    checkpoint: Path | None
    seconds: float


def _check_named(checkpoint: Path, identity: Mapping[str, Any]) -> None:
    """Raise in all processes the RequestError of `check_resumable` on the machine of the main process."""
    problem = None
    if ranks.is_main():
        try:
            check_resumable(checkpoint, identity)
        except RequestError as error:
            problem = str(error)
    problem = ranks.from_main(problem)
    if problem is not None:
        raise RequestError(problem)


@contextmanager
def _on_this_machine(checkpoint: Path | None, folder: Path) -> Iterator[Path | None]:
    """A checkpoint of the main process. On another machine that lacks it, a copy in the run's folder, removed at the end."""
    if checkpoint is None or not ranks.several_machines():
        yield checkpoint
        return
    copy = folder / "fetched" / checkpoint.name
    here = transfer.fetch(checkpoint, copy)
    try:
        yield here
    finally:
        if here == copy and ranks.is_first_here():
            shutil.rmtree(copy.parent)


def _train_until_it_fits(
    run: TrainingRun[Config],
    make_trainer: Callable[[Config], ResumableTrainer],
    trackers: Trackers,
) -> _Trained:
    """Train with the recipe's batch size, and halve the batch size each time that the memory is full."""
    stage, setup = run.stage, run.setup
    checkpoints = run.folder / "checkpoints"
    config = run.config
    newest = newest_complete(checkpoints, run.identity) if ranks.is_main() and not run.resume_from else None
    checkpoint = run.resume_from or ranks.from_main(newest)
    trial = open_trial(stage)
    if trial is not None:
        trial.check_rows(run.identity["dataset"]["validation"])
    while True:
        # Make the trainer
        # Set the seed before the adapter is created: its first weights are random, and the trainer sets its own seed
        # only later.
        transformers.set_seed(setup.seed)
        trainer = make_trainer(config)
        trainer.identity, trainer.rows = run.identity, run.data["train"]
        trainer.add_callback(TelemetryCallback(stage, trackers, trainer.work, _peak(run, trainer)))

        # Train
        started = time.perf_counter()
        before = _weight_sums(trainer, setup.compute)
        if trial is not None:
            trainer.add_callback(trial)
        with _on_this_machine(checkpoint, run.folder) as here:
            is_trained = _train(stage, trainer, config, setup.compute, here)
        if is_trained:
            if trial is not None:
                trial.end(stage, str(checkpoints), trainer.state.max_steps)
            _check_trained(stage, trainer, before, setup.compute)
            return _Trained(trainer, config, checkpoint, time.perf_counter() - started)

        # Out of memory: halve the batch
        assert trainer.model is not None
        smaller = halved(config, training=trainer.model.training)
        sizes = [sizes_text(tried, setup.compute) for tried in (config, smaller)]
        if ranks.world_size() > 1:
            # The other processes wait for this one in the middle of a step, so none of them can start again.
            raise WorkError(
                f"Out of memory in process {ranks.rank()} of {ranks.world_size()} with {sizes[0]}. Training in several "
                f"processes does not halve the batch automatically: use {sizes[1]} in the recipe's {stage}, "
                f"and per_device_eval_batch_size {smaller.per_device_eval_batch_size}."
            )
        logger.warning("%s: out of memory with %s; trying %s", stage, *sizes)
        config = smaller
        del trainer
        gc.collect()
        torch.cuda.empty_cache()
        checkpoint = newest_complete(checkpoints, run.identity) or run.resume_from


def _peak(run: TrainingRun[Config], trainer: ResumableTrainer) -> float | None:
    return peak_flops(trainer.args.device, run.device.dtype)


def _train(
    stage: str, trainer: ResumableTrainer, config: TrainConfig, compute: ComputeConfig, checkpoint: Path | None
) -> bool:
    """Train to the end; False if the memory was full."""
    for printer in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printer)
    if config.early_stopping_patience is not None:
        trainer.add_callback(EarlyStoppingCallback(config.early_stopping_patience))
    rows = len(trainer.train_dataset)  # type: ignore[arg-type]
    logger.info("%s: %s to train on, %s", stage, rows_text(trainer.train_dataset), sizes_text(config, compute))
    repeated = -rows % (config.per_device_train_batch_size * compute.num_processes)
    if compute.num_processes > 1 and repeated:
        logger.info(
            "%s: the last step of each epoch repeats %s, so that every process has a full batch",
            stage,
            counted(repeated, "row"),
        )
    if checkpoint is not None:
        logger.info("%s: resuming from %s", stage, checkpoint)
        trainer.add_callback(RestoreWindow(trainer, checkpoint))
    with Interruption() as interruption:
        trainer.add_callback(interruption)
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except torch.OutOfMemoryError:
            return False
        interruption.agree()
    if interruption.agreed is not None:
        raise KeyboardInterrupt(f"{interruption.agreed.name} in step {trainer.state.global_step}")
    return True


def _weight_sums(trainer: ResumableTrainer, compute: ComputeConfig) -> list[float]:
    """The sum of each trained weight matrix; empty if the weights are sharded.

    Sums take no memory. A copy to compare with would double that of a full fine-tune.
    """
    assert trainer.model is not None
    if compute.distributed != "ddp":
        return []
    with torch.no_grad():
        return [float(p.sum(dtype=torch.float64)) for p in trainer.model.parameters() if p.requires_grad]


def _check_trained(stage: str, trainer: ResumableTrainer, before: list[float], compute: ComputeConfig) -> None:
    """Raise a WorkError if all trained weights are what they were before training."""
    if not before or _weight_sums(trainer, compute) != before:
        return
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    raise WorkError(
        f"{stage} trained nothing: after {trainer.state.global_step} steps all weights are those of the start, and the highest "
        f"learning rate was {max(rates, default=0.0):g}. Raise {stage}.learning_rate, or train more steps; with load_best, "
        "the best checkpoint may be one from before the first change."
    )


def rows_text(dataset: Dataset) -> str:
    """The number of rows, e.g. `112 rows, packed into 28,`."""
    if "seq_lengths" not in dataset.column_names:
        return counted(len(dataset), "row")
    # TRL's packing notes the lengths of the rows that it has put into one.
    rows = sum(map(len, dataset["seq_lengths"]))
    return f"{counted(rows, 'row')}, packed into {len(dataset)},"


def _first_labels(split: Dataset) -> list[tuple[list[int], list[int]]]:
    """`(input_ids, labels)` of the first rows, and of each answer of the first pairs. Prompts alone have no labels."""
    if "answers" in split.column_names:
        return []
    if "prompt_ids" not in split.column_names:
        return [(row["input_ids"], row["labels"]) for row in split.take(min(_LABEL_ROWS, len(split)))]
    is_pair = "chosen_ids" in split.column_names
    answers, count = (("chosen_ids", "rejected_ids"), _LABEL_PAIRS) if is_pair else (("completion_ids",), _LABEL_ROWS)
    return [
        (row["prompt_ids"] + row[name], [IGNORE_INDEX] * len(row["prompt_ids"]) + row[name])
        for row in split.take(min(count, len(split)))
        for name in answers
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values under dotted names. A list becomes one text, because Comet would log each item separately."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = ", ".join(map(str, value)) if isinstance(value, list) else value
    return flat
