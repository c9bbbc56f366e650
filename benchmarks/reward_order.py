"""Measures whether a reward model orders pairs that it was not trained on:

    python -m benchmarks.reward_order [--write]        # about seven minutes on one core

The pairs are made of the general questions that come with the project, and not of an exam. The right answer is chosen, and the
answer of another question is rejected. Every answer is chosen in one pair and rejected in another one, so a model that scores the
answers alone, without their questions, is right in about half of the pairs. The questions of the test pairs, and their answers,
are in no training pair.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.machine import machine, show
from llm_engineering.data.ledger import Ledger
from llm_engineering.data.rows import InstructionRow, Message, PreferenceRow
from llm_engineering.data.storage import rows_dataset
from llm_engineering.documents.general_instructions import replayed_instructions
from llm_engineering.evaluation.heldout import held_out
from llm_engineering.evaluation.measures.reward_accuracy import evaluate_reward
from llm_engineering.formatting.datasets import format_splits
from llm_engineering.models.revision import pin_revision
from llm_engineering.models.tokenizer import load_tokenizer
from llm_engineering.recipe.compute_blocks import ComputeConfig
from llm_engineering.recipe.data_blocks import EMBEDDED_GENERAL, FormattingConfig
from llm_engineering.recipe.evaluation_blocks import REWARD_MEASURE, EvaluationConfig
from llm_engineering.recipe.model_blocks import EMBEDDED_MODEL, LoraConfig, ModelConfig
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.stage_blocks import RewardConfig
from llm_engineering.recipe.training_blocks import TrackingConfig, TrainingSetup
from tests.tiny_models import train

RESULTS = Path(__file__).parent / "results" / "reward_order.json"
SEED = 42
ROWS = {"train": 280, "validation": 20, "test": 120}
# The rate of QLoRA's adapters at this size; the head starts from random weights and needs no lower one.
CONFIG = RewardConfig(
    learning_rate=5e-4, num_train_epochs=2, per_device_train_batch_size=10, gradient_accumulation_steps=1,
    per_device_eval_batch_size=10, eval_strategy="epoch", save_strategy="epoch", center_rewards_coefficient=0.01,
    lora=LoraConfig.model_validate({"r": 16, "lora_alpha": 16, "target_modules": "all-linear"}),
)  # fmt: skip


def main() -> None:
    """Train and measure; `--write` also writes the figures to a file."""
    parser = argparse.ArgumentParser(description="The share of held-out pairs that a reward model orders rightly.")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    arguments = parser.parse_args()
    settings = Settings()
    setup = TrainingSetup(
        model=pin_revision(ModelConfig(name_or_path=EMBEDDED_MODEL)),
        max_length=256,
        chat_template="chatml",
        compute=ComputeConfig(),
        tracking=TrackingConfig(comet="off"),
        seed=SEED,
    )
    with tempfile.TemporaryDirectory() as scratch:
        figures = _measured(setup, settings, Path(scratch))
    figures["machine"] = machine()
    show(figures, RESULTS if arguments.write else None)


def _measured(setup: TrainingSetup, settings: Settings, folder: Path) -> dict[str, Any]:
    splits = {name: rows_dataset(rows, "preference") for name, rows in _pairs().items()}
    ledger = Ledger()
    ledger.record("preference", sum(ROWS.values()), sum(ROWS.values()))
    tokenizer = load_tokenizer(setup.model, settings, setup.chat_template)
    formatted, _ = format_splits(
        splits,
        "preference",
        tokenizer,
        FormattingConfig(max_length=setup.max_length, chat_template="chatml"),
        folder,
        ledger,
    )
    trained = train(formatted, CONFIG, setup, settings)
    pairs = held_out({"preference": formatted["test"]}, {"preference": splits["test"]}).pairs
    report = evaluate_reward("reward", trained.adapter, pairs, EvaluationConfig(batch_size=32), setup, settings)
    measure = report["measures"][REWARD_MEASURE]
    accuracy = measure["models"]["reward"]
    return {
        "model": setup.model.name_or_path,
        "pairs": ROWS,
        "steps": trained.summary["steps"],
        "accuracy": accuracy,
        "above_chance": measure["differences"]["reward-base"],
        "confidence": report["confidence"],
        "better_than_chance": accuracy["low"] > 0.5,
        "losses": [entry["eval_loss"] for entry in trained.summary["history"] if "eval_loss" in entry],
    }


def _pairs() -> dict[str, list[PreferenceRow]]:
    """The pairs of each split. Within a split, the rejected answer of a pair is the chosen one of the next pair."""
    rows = [row for row in replayed_instructions(EMBEDDED_GENERAL) if isinstance(row, InstructionRow)]
    # Two questions with the same answer would make a pair of equal answers.
    unique = list({row.completion[0].content: row for row in rows}.values())
    drawn = random.Random(SEED).sample(unique, sum(ROWS.values()))
    pairs, start = {}, 0
    for name, count in ROWS.items():
        part = drawn[start : start + count]
        pairs[name] = [_pair(row, part[(index + 1) % count]) for index, row in enumerate(part)]
        start += count
    return pairs


def _pair(row: InstructionRow, other: InstructionRow) -> PreferenceRow:
    return PreferenceRow(
        prompt=row.prompt,
        chosen=row.completion,
        rejected=[Message(role="assistant", content=other.completion[0].content)],
        source=row.source,
        origin="the answer of another question is rejected",
    )


if __name__ == "__main__":
    main()
