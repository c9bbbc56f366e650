"""Checks before any work that an evaluation has its files, its lm-eval tasks and its judge."""

from __future__ import annotations

import hashlib
from pathlib import Path

from llm_engineering.errors import RequestError
from llm_engineering.evaluation.checks import read_checks
from llm_engineering.evaluation.judge import JSON_FIELD
from llm_engineering.evaluation.lm_eval_tasks import check_tasks, tasks_hash
from llm_engineering.generation.open import check_access
from llm_engineering.recipe.evaluation_blocks import EvaluationConfig
from llm_engineering.recipe.settings import Settings


def check_requirements(config: EvaluationConfig, settings: Settings) -> str | None:
    """Check everything that the evaluation needs, and return `files_hash`.

    Raises:
        RequestError: the file of checks is missing or has a bad line, lm-eval or one of the tasks is missing, or the
            judge cannot be reached.
    """
    if config.lm_eval is not None:
        check_tasks(config.lm_eval)
    files = files_hash(config)
    if config.judge is not None:
        try:
            check_access(config.judge, settings, config.judge.max_new_tokens, JSON_FIELD)
        except RequestError as error:
            raise RequestError(f"evaluation.judge (read generation.* as evaluation.judge.*): {error}") from error
    return files


def files_hash(config: EvaluationConfig) -> str | None:
    """The hash of the files that the evaluation reads; None if it reads none.

    Raises:
        RequestError: the file of checks is missing or has a bad line.
    """
    hashes = []
    if config.checks is not None:
        read_checks(config.checks)
        hashes.append(hashlib.sha256(Path(config.checks).expanduser().read_bytes()).hexdigest()[:12])
    if config.lm_eval is not None:
        hashes.append(tasks_hash(config.lm_eval) or "no-folder")
    return "-".join(hashes) or None
