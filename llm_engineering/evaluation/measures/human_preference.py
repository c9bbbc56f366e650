"""The measure of blind comparisons: how often people preferred the answers of this very model."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import DatasetDict

from llm_engineering.data.rows import SPLITS, Message, folded
from llm_engineering.evaluation.measures.reward_accuracy import above_chance
from llm_engineering.evaluation.models import BASE
from llm_engineering.evaluation.statistics import Bootstrap, Rows, entry
from llm_engineering.feedback.agreement import JudgedQuestion
from llm_engineering.models.base_model import weights_hash
from llm_engineering.recipe.evaluation_blocks import HUMAN_MEASURE, MEASURES
from llm_engineering.recipe.model_blocks import ModelConfig


def identities(base: ModelConfig, folders: Mapping[str, Path]) -> dict[str, str]:
    """What tells models apart in comparisons, whatever their versions are: the base model's revision, and hashes of weights.

    Args:
        folders: the trained models by name. The base model's name is `base`.
    """
    revision = base.revision or weights_hash(Path(base.name_or_path))
    return {BASE: f"{base.name_or_path}@{revision}"} | {name: weights_hash(folder) for name, folder in folders.items()}


def human_win_rate(
    judged: Sequence[JudgedQuestion],
    models: Mapping[str, str],
    newest: str,
    trained: Collection[str],
    bootstrap: Bootstrap,
) -> dict[str, Any] | None:
    """The measure's entry in the report; None if nobody has compared the newest model.

    Each question counts once, with the mean over its verdicts; a tie is half a win. The differences are the newest model's
    share minus 0.5.

    Args:
        models: the identities of the models by name.
        trained: the folded questions that the models were trained on, which do not count.
    """
    own = models[newest]
    scores = {
        name: [
            one.of(own)
            for one in judged
            if {one.first, one.second} == {own, other} and own != other and one.question not in trained
        ]
        for name, other in models.items()
    }
    found = {name: Rows.of(values) for name, values in scores.items() if values}
    if not found:
        return None
    shares = {name: bootstrap.share_won(Rows.of(1 - rows.totals)) for name, rows in found.items()}
    shares[newest] = bootstrap.share_won(Rows.of([score for rows in found.values() for score in rows.totals]))
    return entry(
        MEASURES[HUMAN_MEASURE],
        shares,
        {f"{newest}-{name}": above_chance(bootstrap.share_won(rows)) for name, rows in found.items()},
    ) | {"clusters": shares[newest].n}


def trained_questions(splits: DatasetDict) -> Iterator[str]:
    """The folded questions of a dataset that training reads, with those that choose its best checkpoint; none for texts."""
    if "prompt" in splits["train"].column_names:
        for name in SPLITS[:2]:
            for prompt in splits[name]["prompt"]:
                yield folded([Message.model_validate(message) for message in prompt])
