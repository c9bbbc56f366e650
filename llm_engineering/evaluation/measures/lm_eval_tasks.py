"""Runs tasks of lm-eval, EleutherAI's harness for published benchmarks."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import logging
from pathlib import Path
from typing import Any, Literal

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_engineering.errors import RequestError, WorkError
from llm_engineering.evaluation.statistics import Rows
from llm_engineering.recipe.evaluation_blocks import LmEvalConfig

_BETTER: dict[bool | None, Literal["higher", "lower"]] = {True: "higher", False: "lower"}


def check_tasks(config: LmEvalConfig) -> None:
    """Check before anything runs that lm-eval finds every task.

    Raises:
        RequestError: lm-eval is not installed, `include_path` is not a folder, or lm-eval does not know a task.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise RequestError(
            "evaluation.lm_eval needs the package lm-eval, which is not installed: "
            "pip install 'llm-engineering[eval]'. Or remove the block from the recipe."
        )
    if config.include_path is not None and not Path(config.include_path).expanduser().is_dir():
        raise RequestError(f"evaluation.lm_eval.include_path {config.include_path}: there is no such folder.")
    manager = _task_manager(config)
    # Compared by whole names, because simple_evaluate does not expand patterns such as `mmlu_*`.
    unknown = [task for task in config.tasks if task not in manager.all_tasks]
    if unknown:
        where = f" or in {config.include_path}" if config.include_path else ""
        raise RequestError(
            f"evaluation.lm_eval.tasks: lm-eval knows no task {', '.join(unknown)}{where}. "
            "`lm-eval ls tasks` lists its own tasks; each YAML file in include_path adds a task of yours."
        )


def tasks_hash(config: LmEvalConfig) -> str | None:
    """The hash of all files in `include_path`; None if it is not set."""
    if config.include_path is None:
        return None
    folder = Path(config.include_path).expanduser()
    digest = hashlib.sha256()
    for file in sorted(f for f in folder.rglob("*") if f.is_file()):
        digest.update(str(file.relative_to(folder)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


class TaskResults:
    """One model's results on lm-eval's tasks.

    Attributes:
        scores: each task's metrics and standard errors, as lm-eval reports them.
        rows: each task's first metric on each row. Only for tasks whose score is the mean of these values.
        metrics: the name of that metric, by task.
        better: whether `higher` or `lower` is better, by task; None if the task does not define it.
    """

    def __init__(self, results: dict[str, Any]) -> None:
        self.scores: dict[str, dict[str, Any]] = {
            task: {name: value for name, value in metrics.items() if name not in ("alias", "name") and value != "N/A"}
            for task, metrics in results["results"].items()
        }
        self.rows: dict[str, Rows] = {}
        self.metrics: dict[str, str] = {}
        self.better: dict[str, Literal["higher", "lower"] | None] = {}
        for task, samples in results["samples"].items():
            metric = str(results["configs"][task]["metric_list"][0]["metric"])
            # If a task has several filters, lm-eval returns one sample per row and filter. Only the samples of the
            # first filter are used.
            first_filter = samples[0].get("filter") if samples else None
            samples = [sample for sample in samples if sample.get("filter") == first_filter]
            values = [sample[metric] for sample in samples if _is_number(sample.get(metric))]
            reported = self.scores[task].get(f"{metric},{first_filter}")
            # Some metrics are not a mean over rows, e.g. corpus BLEU. These have only the score that lm-eval computes.
            if (
                len(values) == len(samples) > 0
                and _is_number(reported)
                and abs(sum(values) / len(values) - reported) < 1e-6
            ):
                self.rows[task] = Rows.of(values)
                self.metrics[task] = metric
                self.better[task] = _BETTER.get(results["higher_is_better"].get(task, {}).get(metric))


def run_tasks(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    config: LmEvalConfig,
    batch_size: int,
    seed: int,
) -> TaskResults:
    """Run the tasks on one model.

    Raises:
        WorkError: a task's data cannot be loaded.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    try:
        results = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=list(config.tasks),
            task_manager=_task_manager(config),
            limit=config.limit,
            num_fewshot=config.num_fewshot,
            apply_chat_template=config.apply_chat_template,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
            # The report computes its own intervals.
            bootstrap_iters=0,
        )
    except (OSError, ValueError) as error:
        raise WorkError(f"lm-eval could not run {', '.join(config.tasks)}: {error}") from error
    assert results is not None
    return TaskResults(results)


def _task_manager(config: LmEvalConfig) -> Any:
    from lm_eval.tasks import TaskManager

    folder = config.include_path and str(Path(config.include_path).expanduser())
    return TaskManager(include_path=folder)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)
