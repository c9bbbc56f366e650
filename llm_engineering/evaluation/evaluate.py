"""Evaluates base, SFT, DPO and the model in production on the same held-out rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_engineering.evaluation.checks import Check, check_report, read_checks
from llm_engineering.evaluation.heldout import HeldOut, drawn, rendered_for_both
from llm_engineering.evaluation.incumbent import INCUMBENT, incumbent_tokenizer, is_like_ours, load_incumbent
from llm_engineering.evaluation.judge import Question, judge
from llm_engineering.evaluation.lm_eval_tasks import lm_eval_version
from llm_engineering.evaluation.measures import Models
from llm_engineering.evaluation.observation import Observation, Work, observe
from llm_engineering.evaluation.statistics import TRANSFORMS, Bootstrap, compare, flat
from llm_engineering.generation.open import open_client
from llm_engineering.models.device import choose_device
from llm_engineering.models.loading import load_model
from llm_engineering.models.tokenizer import load_tokenizer
from llm_engineering.recipe.evaluation_blocks import MEASURES, TASK_MEASURE, EvaluationConfig, Measure
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.training_blocks import TrainingSetup


def evaluate(
    adapters: Mapping[str, Path],
    rows: HeldOut,
    config: EvaluationConfig,
    setup: TrainingSetup,
    settings: Settings,
) -> dict[str, Any]:
    """Measure the base model and each adapter; returns the report as JSON takes it.

    Args:
        adapters: folders by name: `sft`, perhaps `dpo`, and perhaps `incumbent`, the model in production, which may
            have another base model and another chat template.
        rows: held out from training.

    Raises:
        RequestError: `evaluation.checks` is no file of checks.
        WorkError: the incumbent cannot be loaded, a task of lm-eval cannot run, or the judge does not answer.
    """
    checks = read_checks(config.checks) if config.checks is not None else []
    work, seen = _observe_all(adapters, rows, checks, config, setup, settings)
    newest = [name for name in seen if name != INCUMBENT][-1]
    bootstrap = Bootstrap(config.bootstrap_samples, config.confidence, setup.seed)
    measures = _measures(seen, newest, bootstrap)
    judged = None
    if config.judge is not None:
        client = open_client(config.judge, setup.model, setup.compute, settings, setup.chat_template)
        texts = {name: [answer.text for answer in found.answers] for name, found in seen.items()}
        judged, measures["judge_win_rate"] = judge(
            _questions(work), texts, newest, client, config.judge.max_new_tokens, bootstrap
        )
    return {
        "models": list(seen),
        "newest": newest,
        "heldout_rows": len(work.ours.rows),
        "heldout_pairs": len(work.ours.pairs),
        "left_out": work.ours.left_out,
        "generated_rows": len(work.places),
        "confidence": config.confidence,
        "bootstrap_samples": config.bootstrap_samples,
        "seed": setup.seed,
        "metrics": flat(measures),
        "measures": measures,
        "samples": _samples(seen, work)[: config.sample_answers],
        "judge": judged,
        "lm_eval": _lm_eval(seen, config),
        "checks": check_report(checks, {n: found.check_answers for n, found in seen.items()}) if checks else None,
    }


def _observe_all(
    adapters: Mapping[str, Path],
    rows: HeldOut,
    checks: Sequence[Check],
    config: EvaluationConfig,
    setup: TrainingSetup,
    settings: Settings,
) -> tuple[Work, dict[str, Observation]]:
    """What every model did, in the order base, then as in `adapters`."""
    tokenizer = load_tokenizer(setup.model, settings, setup.chat_template)
    ours = theirs = rows
    beside = dict(adapters)
    own_tokenizer = None
    if INCUMBENT in adapters:
        own_tokenizer = incumbent_tokenizer(adapters[INCUMBENT], settings)
        if not is_like_ours(adapters[INCUMBENT], own_tokenizer, tokenizer, setup):
            del beside[INCUMBENT]
            ours, theirs = rendered_for_both(rows, own_tokenizer)
    work = Work(ours, drawn(ours.rows, config.generated_rows, setup.seed), checks)

    def observe_beside() -> dict[str, Observation]:
        # A function of its own, so that the memory is free again before another base model is loaded.
        base = load_model(setup.model, settings, choose_device(setup.compute))
        models = Models(base, beside, tokenizer, config.batch_size, config.repetition_penalty)
        return {name: observe(models, name, name, ours, work, config, setup.seed) for name in models.names}

    seen = observe_beside()
    if own_tokenizer is not None and INCUMBENT not in seen:
        models, name = load_incumbent(adapters[INCUMBENT], own_tokenizer, config, setup, settings)
        seen[INCUMBENT] = observe(models, name, INCUMBENT, theirs, work, config, setup.seed)
    return work, seen


def _measures(seen: Mapping[str, Observation], newest: str, bootstrap: Bootstrap) -> dict[str, Any]:
    """Every measure that was taken, in the order of the table of measures, then lm-eval's tasks."""
    measures = {
        key: compare(
            what, {name: found.rows[key] for name, found in seen.items()}, newest, bootstrap, TRANSFORMS.get(key)
        )
        for key, what in MEASURES.items()
        if key in seen[newest].rows
    }
    tasks = seen[newest].tasks
    if tasks is not None:
        for task in tasks.rows:
            values = {
                name: found.tasks.rows[task] for name, found in seen.items() if found.tasks and task in found.tasks.rows
            }
            if len(values) < len(seen):
                # A metric that is no number on a row of one model compares no models: lm-eval's own scores stand alone.
                continue
            what = Measure(f"lm-eval: {task}", tasks.metrics[task], tasks.better[task])
            measures[f"{TASK_MEASURE}{task}"] = compare(what, values, newest, bootstrap)
    return measures


def _samples(seen: Mapping[str, Observation], work: Work) -> list[dict[str, Any]]:
    return [
        {
            "prompt": row.prompt[-1].content,
            "reference": row.completion[0].content,
            "answers": {
                name: {"text": found.answers[number].text, "stopped": found.answers[number].stopped}
                for name, found in seen.items()
            },
        }
        for number, row in enumerate(work.asked)
    ]


def _questions(work: Work) -> list[Question]:
    """What the judge is shown of each row; of a conversation, all turns with their roles."""
    return [
        Question(
            row.prompt[0].content
            if len(row.prompt) == 1
            else "\n\n".join(f"{message.role}: {message.content}" for message in row.prompt),
            row.completion[0].content,
        )
        for row in work.asked
    ]


def _lm_eval(seen: Mapping[str, Observation], config: EvaluationConfig) -> dict[str, Any] | None:
    if config.lm_eval is None:
        return None
    return {
        "version": lm_eval_version(),
        **config.lm_eval.model_dump(exclude={"include_path"}),
        "scores": {name: found.tasks.scores for name, found in seen.items() if found.tasks is not None},
    }
