"""Evaluates the base model, the trained models and the model in production on the same held-out rows."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llm_engineering.evaluation.heldout import HeldOut, draw_indices, render_for_both
from llm_engineering.evaluation.incumbent import incumbent_tokenizer, is_compatible, load_incumbent
from llm_engineering.evaluation.measures.canaries import canary_report, read_canaries
from llm_engineering.evaluation.measures.checks import Check, check_report, read_checks
from llm_engineering.evaluation.measures.exam import Exam, by_document, exam_report
from llm_engineering.evaluation.measures.judge import judge, win_rate
from llm_engineering.evaluation.measures.observation import Observation, Work, observe
from llm_engineering.evaluation.models import BASE, Models, Sample
from llm_engineering.evaluation.row_values import row_values
from llm_engineering.evaluation.statistics import TRANSFORMS, Bootstrap, compare
from llm_engineering.formatting.render import prompt_ids
from llm_engineering.generation.clients.open import open_client
from llm_engineering.models.tokenizer import load_tokenizer
from llm_engineering.recipe.evaluation_blocks import (
    INCUMBENT,
    MEASURES,
    REWARD,
    REWARD_PREFIX,
    TASK_MEASURE,
    EvaluationConfig,
    Measure,
)
from llm_engineering.recipe.reward_blocks import RewardSet
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.stages import STAGES
from llm_engineering.recipe.training_blocks import TrainingSetup
from llm_engineering.training.rewards import Completion, Reward, open_reward_model, open_rewards


class Rewarding(NamedTuple):
    """The rewards of a stage, the longest answer that it scored, in tokens, and the folder of its reward model."""

    rewards: RewardSet
    max_completion_length: int
    reward_model: Path | None = None


def evaluate(
    adapters: Mapping[str, Path],
    rows: HeldOut,
    config: EvaluationConfig,
    setup: TrainingSetup,
    settings: Settings,
    exam: Exam | None = None,
    rewarding: Rewarding | None = None,
    reward_judge: Path | None = None,
) -> dict[str, Any]:
    """Measure the base model and each trained model, and return the report as a JSON object.

    Args:
        adapters: folders of the trained models by the names of their stages, in the order of the chain, and `incumbent`
            if a model is in production. The incumbent may have another base model and another chat template.
        rows: rows that no model was trained on.
        exam: questions about the documents; None if the recipe has no exam.
        rewarding: the rewards of the last stage that trains on some; None if there is none.
        reward_judge: the folder of the reward model that judges the answers to held-out rows; None without it.

    Raises:
        RequestError: an own reward cannot be loaded; the file `evaluation.checks` or `evaluation.canaries` is missing or
            has a bad line.
        WorkError: the incumbent cannot be loaded, a task of lm-eval cannot run, or the judge does not answer.
    """
    checks = read_checks(config.checks) if config.checks is not None else []
    work, observations = _observe_all(adapters, rows, checks, exam, rewarding, config, setup, settings)
    newest = newest_of(adapters)
    bootstrap = Bootstrap(config.bootstrap_samples, config.confidence, setup.seed)
    taken = {arm: answers for found in observations.values() for arm, answers in found.exam.items()}
    measures = exam_measures(exam, taken, newest, bootstrap) if exam is not None else {}
    measures |= _measures(observations, newest, bootstrap, work.rewards)
    judged = None
    if config.judge is not None and work.indices:
        client = open_client(config.judge, setup.model, setup.compute, settings, setup.chat_template)
        texts = {name: [answer.text for answer in found.answers] for name, found in observations.items()}
        judged, measures["judge_win_rate"] = judge(
            work.asked, texts, newest, client, config.judge.max_new_tokens, bootstrap
        )
    rewards: dict[str, list[float]] = {}
    if reward_judge is not None and work.indices:
        rewards = _rewards_of_answers(observations, work, reward_judge, setup, settings)
        # 1 for a win, 0.5 for a tie, 0 for a loss
        wins = {name: (np.sign(np.subtract(rewards[newest], found)) + 1) / 2 for name, found in rewards.items()}
        del wins[newest]
        measures["reward_model_win_rate"] = win_rate(
            "reward_model_win_rate", wins, newest, by_document(work.asked), bootstrap
        )
    return {
        "models": list(observations),
        "newest": newest,
        "heldout_rows": len(work.ours.rows),
        "heldout_pairs": len(work.ours.pairs),
        "heldout_documents": len(work.ours.texts),
        "heldout_prompts": len(work.prompts),
        "left_out": work.ours.left_out,
        "generated_rows": len(work.indices),
        "confidence": config.confidence,
        "bootstrap_samples": config.bootstrap_samples,
        "seed": setup.seed,
        "metrics": {f"{key}_{name}": e["value"] for key, m in measures.items() for name, e in m["models"].items()},
        "measures": measures,
        "row_values": row_values(observations[newest], work),
        "exam": exam_report(exam, taken, newest, setup.seed) if exam is not None else None,
        "samples": _samples(observations, work, rewards)[: config.sample_answers],
        "rewards": _rewarded(observations, work, config.sample_answers) if work.rewards else None,
        "judge": judged,
        "lm_eval": _lm_eval(observations, config),
        "checks": check_report(checks, {n: o.check_answers for n, o in observations.items()}) if checks else None,
        "canaries": canary_report(
            work.canaries, {n: o.rows["canaries"].totals.tolist() for n, o in observations.items()}
        )
        if work.canaries
        else None,
    }


def _observe_all(
    adapters: Mapping[str, Path],
    rows: HeldOut,
    checks: Sequence[Check],
    exam: Exam | None,
    rewarding: Rewarding | None,
    config: EvaluationConfig,
    setup: TrainingSetup,
    settings: Settings,
) -> tuple[Work, dict[str, Observation]]:
    """Observe every model: first the base model, then the models of `adapters` in their order.

    An incumbent that does not fit this recipe's base model, vocabulary and template is loaded after the other models.
    """
    tokenizer = load_tokenizer(setup.model, settings, setup.chat_template)
    ours = theirs = rows
    adapters_of_base = dict(adapters)
    own_tokenizer = None
    if INCUMBENT in adapters:
        own_tokenizer = incumbent_tokenizer(adapters[INCUMBENT], setup, settings)
        if not is_compatible(adapters[INCUMBENT], own_tokenizer, tokenizer, setup):
            del adapters_of_base[INCUMBENT]
            ours, theirs = render_for_both(rows, own_tokenizer, setup.max_length)
    indices = draw_indices(ours.rows, config.generated_rows, setup.seed)
    newest = newest_of(adapters)
    # A model that has only read the documents was not taught to answer, and its exam takes as long as any other.
    readers = frozenset(name for name in adapters if name != newest and name in STAGES and STAGES[name].rows == "text")
    canaries = read_canaries(config.canaries) if config.canaries is not None else []
    work = Work(ours, indices, checks, exam, frozenset({BASE, newest}), readers, canaries=canaries)
    if rewarding is not None:
        work = work._replace(
            prompts=[ours.prompts[index] for index in draw_indices(ours.prompts, config.generated_rows, setup.seed)],
            rewards=open_rewards(rewarding.rewards, setup, settings, rewarding.reward_model),
            max_completion_length=rewarding.max_completion_length,
        )

    def observe_base_and_adapters() -> dict[str, Observation]:
        # A function, so that the base model's memory is freed before the incumbent's base model is loaded.
        models = Models.load(setup.model, adapters_of_base, tokenizer, config, setup.compute, settings)
        return {name: observe(models, name, name, ours, work, config, setup.seed) for name in models.names}

    observations = observe_base_and_adapters()
    if own_tokenizer is not None and INCUMBENT not in observations:
        models, name = load_incumbent(adapters[INCUMBENT], own_tokenizer, config, setup, settings)
        observations[INCUMBENT] = observe(models, name, INCUMBENT, theirs, work, config, setup.seed)
    return work, observations


def newest_of(adapters: Mapping[str, Path]) -> str:
    """The name of the model of the last stage; `base` without a trained model."""
    return [BASE, *(name for name in adapters if name != INCUMBENT)][-1]


def exam_measures(
    exam: Exam, taken: Mapping[str, Mapping[int, Sample]], newest: str, bootstrap: Bootstrap
) -> dict[str, Any]:
    """The measures of an exam. Models with retrieval have none of the general questions.

    Args:
        taken: the answers of each model by its name.
    """
    values = {name: exam.values(answers) for name, answers in taken.items()}
    return {
        key: compare(MEASURES[key], {n: v[key] for n, v in values.items() if key in v}, newest, bootstrap)
        for key in values[newest]
    }


def _measures(
    observations: Mapping[str, Observation], newest: str, bootstrap: Bootstrap, rewards: Sequence[Reward]
) -> dict[str, Any]:
    """Every measure of this evaluation, in the order of `MEASURES`, then the single rewards, then lm-eval's tasks."""
    measures: dict[str, Any] = {}
    for key, measure in MEASURES.items():
        if key in observations[newest].rows:
            values = {name: found.rows[key] for name, found in observations.items()}
            measures[key] = compare(measure, values, newest, bootstrap, TRANSFORMS.get(key))
    for reward in rewards:
        values = {name: found.rows[REWARD_PREFIX + reward.name] for name, found in observations.items()}
        measure = Measure(f"Reward: {reward.name}", "mean", "higher" if reward.weight >= 0 else "lower")
        measures[REWARD_PREFIX + reward.name] = compare(measure, values, newest, bootstrap)
    tasks = observations[newest].tasks
    if tasks is not None:
        for task in tasks.rows:
            values = {n: o.tasks.rows[task] for n, o in observations.items() if o.tasks and task in o.tasks.rows}
            # If one model has a row without a number, only lm-eval's own scores are reported.
            if len(values) == len(observations):
                measure = Measure(f"lm-eval: {task}", tasks.metrics[task], tasks.better[task])
                measures[f"{TASK_MEASURE}{task}"] = compare(measure, values, newest, bootstrap)
    return measures


def _rewards_of_answers(
    observations: Mapping[str, Observation], work: Work, folder: Path, setup: TrainingSetup, settings: Settings
) -> dict[str, list[float]]:
    """The reward of each model's answers to the held-out rows, by the model's name.

    Every answer is encoded again from its text, because a model in production may have other tokens.
    """
    tokenizer = load_tokenizer(setup.model, settings, setup.chat_template)
    score = open_reward_model(folder, setup, settings)
    prompts = [{"prompt_ids": prompt_ids(row.prompt, tokenizer)} for row in work.asked]
    return {
        name: score(prompts, [Completion(answer.text, answer.stopped, len(answer.ids)) for answer in found.answers])
        for name, found in observations.items()
    }


def _samples(
    observations: Mapping[str, Observation], work: Work, rewards: Mapping[str, Sequence[float]]
) -> list[dict[str, Any]]:
    return [
        {
            "prompt": row.prompt[-1].content,
            "reference": row.completion[0].content,
            "answers": {
                name: {
                    "text": found.answers[number].text,
                    "stopped": found.answers[number].stopped,
                    "cut": found.answers[number].cut,
                    **({"reward": rewards[name][number]} if rewards else {}),
                }
                for name, found in observations.items()
            },
        }
        for number, row in enumerate(work.asked)
    ]


def _rewarded(observations: Mapping[str, Observation], work: Work, shown: int) -> dict[str, Any]:
    """The report's `rewards`: their weights, and the first answers with the scores of each."""
    return {
        "weights": {reward.name: reward.weight for reward in work.rewards},
        "rows": [
            {
                "prompt": row.prompt[-1].content,
                "accepted": row.accepted,
                "answers": {
                    name: {
                        "text": found.rewarded[number].text,
                        "stopped": found.rewarded[number].stopped,
                        "reward": float(found.rows[REWARD].totals[number]),
                        "scores": {
                            r.name: float(found.rows[REWARD_PREFIX + r.name].totals[number]) for r in work.rewards
                        },
                    }
                    for name, found in observations.items()
                },
            }
            for number, (row, _) in enumerate(work.prompts[:shown])
        ],
    }


def _lm_eval(observations: Mapping[str, Observation], config: EvaluationConfig) -> dict[str, Any] | None:
    if config.lm_eval is None:
        return None
    return {
        "version": importlib.metadata.version("lm-eval"),
        **config.lm_eval.model_dump(exclude={"include_path"}),
        "scores": {name: found.tasks.scores for name, found in observations.items() if found.tasks is not None},
    }
