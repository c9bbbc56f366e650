"""Measures a reward model: the share of held-out pairs whose chosen answer gets the higher reward.

Chance is 0.5. The report has it under the name of the base model, which has no head to score with.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm_engineering.data.rows import PreferenceRow
from llm_engineering.errors import WorkError
from llm_engineering.evaluation.heldout import HeldOutRow
from llm_engineering.evaluation.measures.exam import by_document
from llm_engineering.evaluation.models import BASE
from llm_engineering.evaluation.statistics import Bootstrap, Estimate, Rows, entry
from llm_engineering.models.reward_model import RewardModel
from llm_engineering.models.tokenizer import load_tokenizer
from llm_engineering.recipe.evaluation_blocks import MEASURES, REWARD_MEASURE, EvaluationConfig
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.training_blocks import TrainingSetup

CHANCE = 0.5


def above_chance(share: Estimate) -> Estimate:
    """A share minus chance, which is a known number, so that the difference has the interval of the share."""
    low, high = (None if end is None else end - CHANCE for end in (share.low, share.high))
    return Estimate(share.value - CHANCE, low, high, share.n)


def evaluate_reward(
    stage: str,
    folder: Path,
    pairs: Sequence[HeldOutRow[PreferenceRow]],
    config: EvaluationConfig,
    setup: TrainingSetup,
    settings: Settings,
) -> dict[str, Any]:
    """Score both answers of each held-out pair, and return the evaluation report as a JSON object.

    Args:
        stage: the name of the stage that trained the reward model.

    Raises:
        WorkError: there is no held-out pair.
    """
    if not pairs:
        raise WorkError(
            "There is no held-out pair to measure the reward model on. Raise data.split.test_fraction, or name a file as "
            "data.test_preferences."
        )
    tokenizer = load_tokenizer(setup.model, settings, setup.chat_template)
    model = RewardModel.load(setup.model, folder, tokenizer, setup.compute, settings, config.batch_size)
    ids = [answer[0] for pair in pairs for answer in pair.answers]
    scores = model.scores(ids, "held-out answers, scored")
    chosen, rejected = scores[0::2], scores[1::2]
    measure = reward_accuracy(
        stage, pairs, chosen, rejected, Bootstrap(config.bootstrap_samples, config.confidence, setup.seed)
    )
    return {
        "models": [BASE, stage],
        "newest": stage,
        "heldout_rows": 0,
        "heldout_pairs": len(pairs),
        "heldout_documents": 0,
        "left_out": 0,
        "generated_rows": 0,
        "confidence": config.confidence,
        "bootstrap_samples": config.bootstrap_samples,
        "seed": setup.seed,
        "metrics": {f"{REWARD_MEASURE}_{name}": found["value"] for name, found in measure["models"].items()},
        "measures": {REWARD_MEASURE: measure},
        "exam": None,
        "samples": [],
        "judge": None,
        "lm_eval": None,
        "checks": None,
        "canaries": None,
        "rewards": {"chosen": chosen, "rejected": rejected},
        "pairs": [
            {
                "prompt": pair.row.prompt[-1].content,
                "chosen": {"text": pair.row.chosen[0].content, "reward": high},
                "rejected": {"text": pair.row.rejected[0].content, "reward": low},
            }
            for pair, high, low in list(zip(pairs, chosen, rejected, strict=True))[: config.sample_answers]
        ],
    }


def reward_accuracy(
    stage: str,
    pairs: Sequence[HeldOutRow[PreferenceRow]],
    chosen: Sequence[float],
    rejected: Sequence[float],
    bootstrap: Bootstrap,
) -> dict[str, Any]:
    """The measure's entry in the report.

    Args:
        chosen, rejected: the rewards of each pair's answers.
    """
    rows = Rows.of([high > low for high, low in zip(chosen, rejected, strict=True)])
    rows = rows.in_clusters(by_document([pair.row for pair in pairs]))
    found = bootstrap.estimate(rows)
    models = {BASE: Estimate(CHANCE, None, None, found.n), stage: found}
    return entry(MEASURES[REWARD_MEASURE], models, {f"{stage}-{BASE}": above_chance(found)}) | {
        "clusters": len(rows.units[0])
    }
