"""Checks before any work that an evaluation has its files, its exam, its lm-eval tasks and its judge."""

from __future__ import annotations

import hashlib
from pathlib import Path

from llm_engineering.errors import RequestError
from llm_engineering.evaluation.measures.checks import read_checks
from llm_engineering.evaluation.measures.exam import exam_hash, read_exam
from llm_engineering.evaluation.measures.judge import JSON_FIELD
from llm_engineering.generation.clients.open import check_access
from llm_engineering.recipe.evaluation_blocks import EXAM_MEASURES, EvaluationConfig
from llm_engineering.recipe.recipe import Recipe
from llm_engineering.recipe.settings import Settings


def check_requirements(config: EvaluationConfig, settings: Settings) -> str | None:
    """Check everything that the evaluation needs, and return `files_hash`.

    Raises:
        RequestError: the file of checks is missing or has a bad line, lm-eval or one of the tasks is missing, or the
            judge cannot be reached.
    """
    # These modules take seconds to import, so they are imported only for a recipe that has their block.
    if config.lm_eval is not None:
        from llm_engineering.evaluation.measures.lm_eval_tasks import check_tasks

        check_tasks(config.lm_eval)
    files = files_hash(config)
    if config.judge is not None:
        try:
            check_access(config.judge, settings, config.judge.max_new_tokens, JSON_FIELD)
        except RequestError as error:
            raise RequestError(f"evaluation.judge (read generation.* as evaluation.judge.*): {error}") from error
    return files


def check_exam(recipe: Recipe) -> str | None:
    """Check that the exam can be read and has the questions that the gate asks for, and return `exam_hash`.

    Raises:
        RequestError: a file is missing or has a wrong line, or a rule names a kind of questions that it has none of.
    """
    if recipe.exam is None:
        return None
    asked = {row.measure for row in read_exam(recipe.exam)}
    if recipe.exam.is_generated:
        asked |= {EXAM_MEASURES["single"], EXAM_MEASURES["unanswerable"]}
    for rule in recipe.promotion.all_rules():
        if rule.run in recipe.chain and rule.measure in EXAM_MEASURES.values() and rule.measure not in asked:
            kind = next(kind for kind, measure in EXAM_MEASURES.items() if measure == rule.measure)
            raise RequestError(
                f"promotion.{rule.path} names {rule.measure}, and exam.path {recipe.exam.path} has no question of the kind "
                f"{kind}: add some, or remove the rule."
            )
    return exam_hash(recipe.exam)


def files_hash(config: EvaluationConfig) -> str | None:
    """The hash of the files that the evaluation reads; None if it reads none.

    Raises:
        RequestError: the file of checks or of canaries is missing or has a bad line.
    """
    hashes = []
    if config.checks is not None:
        read_checks(config.checks)
    if config.canaries is not None:
        from llm_engineering.evaluation.measures.canaries import read_canaries

        read_canaries(config.canaries)
    files = filter(None, (config.checks, config.canaries))
    hashes += [hashlib.sha256(Path(file).expanduser().read_bytes()).hexdigest()[:12] for file in files]
    if config.lm_eval is not None:
        from llm_engineering.evaluation.measures.lm_eval_tasks import tasks_hash

        hashes.append(tasks_hash(config.lm_eval) or "no-folder")
    return "-".join(hashes) or None
