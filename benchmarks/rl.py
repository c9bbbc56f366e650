"""Tests whether GRPO and RLOO raise a reward that can be checked, on questions that they were not trained on:

    python -m benchmarks.rl [--stages grpo rloo] [--steps 12] [--write]

The embedded model explains words, at length. The rewards are for answers that end within 24 tokens, and for answers of at
most 12 tokens. Each stage trains a fresh adapter. The held-out questions are answered greedily before and after, and the
difference has a paired interval of 95 %. The tests hold that losses are those of TRL; this one, that they have the right
direction and that the rewards, the generation and the update fit together.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.machine import machine, show
from llm_engineering.data.rows import Message
from llm_engineering.evaluation.statistics import Bootstrap, Rows
from llm_engineering.formatting.render import prompt_ids
from llm_engineering.models.base_model import load_model
from llm_engineering.models.device import choose_device
from llm_engineering.models.generate import generate_ids
from llm_engineering.models.revision import pin_revision
from llm_engineering.models.tokenizer import end_token_ids, load_tokenizer
from llm_engineering.recipe.compute_blocks import ComputeConfig
from llm_engineering.recipe.model_blocks import LoraConfig, ModelConfig
from llm_engineering.recipe.online_blocks import GRPOConfig, OnlineConfig, RLOOConfig
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.training_blocks import TrackingConfig, TrainingSetup
from llm_engineering.training.rewards import Completion, open_rewards, weighted_sums
from tests.tiny_models import train

RESULTS = Path(__file__).parent / "results" / "rl.json"
LONGEST = 24
WORDS = (
    "anchor apple arrow autumn bakery basket beach bell bicycle bird blanket boat book bottle branch bread bridge broom "
    "bucket butter button cake camel camera candle castle cat chair cheese circle clock cloud coat coin comb compass corn "
    "cradle cup curtain desert desk doctor dog door dream drum eagle engine farmer feather fence flag flower forest fork fox "
    "garden glass glove goat guitar hammer harbor hat honey horse island jacket kettle key kitchen ladder lake lamp lemon "
    "letter library lion market mirror moon mountain needle ocean orange oven owl paint paper pencil piano pillow planet "
    "pocket"
)
HELD_OUT = 40
BLOCKS: dict[str, type[OnlineConfig]] = {"grpo": GRPOConfig, "rloo": RLOOConfig}


def main() -> None:
    """Train the stages and print the held-out rewards before and after; `--write` also writes them to a file."""
    parser = argparse.ArgumentParser(description="Rewards on held-out questions before and after GRPO and RLOO.")
    parser.add_argument("--stages", nargs="+", choices=tuple(BLOCKS), default=list(BLOCKS))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    arguments = parser.parse_args()

    # Load the model, and make the rows
    setup = TrainingSetup(
        model=pin_revision(ModelConfig()), max_length=128, compute=ComputeConfig(dtype="float32"),
        tracking=TrackingConfig(comet="off"), seed=42,
    )  # fmt: skip
    settings = Settings()
    tokenizer = load_tokenizer(setup.model, settings)
    words = WORDS.split()
    random.Random(1).shuffle(words)
    rows = [_row(word, tokenizer) for word in words]
    held_out, trained = rows[:HELD_OUT], rows[HELD_OUT:]
    data = DatasetDict(train=Dataset.from_list(trained), validation=Dataset.from_list(held_out[:4]))

    # Answer the held-out questions, train, and answer them again
    found: dict[str, Any] = {}
    before: list[Completion] | None = None
    for stage in arguments.stages:
        config = _config(stage, arguments.steps)
        if before is None:
            before = _answers(load_model(setup.model, settings, choose_device(setup.compute)), tokenizer, held_out)
        started, used = time.perf_counter(), time.process_time()
        result = train(data, config, setup, settings)
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - used
        base = load_model(setup.model, settings, choose_device(setup.compute))
        after = _answers(PeftModel.from_pretrained(base, str(result.adapter)), tokenizer, held_out)
        found[stage] = {
            **_compared(config, setup, settings, held_out, before, after),
            "training_reward": [round(entry["reward"], 3) for entry in result.summary["history"] if "reward" in entry],
            "seconds": round(seconds),
            "cpu_seconds": round(cpu_seconds),
            "generation_share": round(result.summary["seconds"]["generate"] / result.summary["seconds"]["total"], 2),
        }
    show({**found, "machine": machine()}, RESULTS if arguments.write else None)


def _row(word: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    messages = [
        Message(role="user", content=f"What is {'an' if word[0] in 'aeio' else 'a'} {word}? Answer in a few words.")
    ]
    prompt = [message.model_dump() for message in messages]
    return {"id": word, "prompt_ids": prompt_ids(messages, tokenizer), "prompt": prompt, "answers": []}


def _config(stage: str, steps: int) -> OnlineConfig:
    return BLOCKS[stage].model_validate({
        "rewards": [{"use": "stopped"}, {"use": "length", "longest": 12}], "num_generations": 8,
        "max_completion_length": LONGEST, "beta": 0.0, "learning_rate": 5e-4, "lr_scheduler_type": "constant",
        "warmup_ratio": 0.0, "num_train_epochs": 1, "max_steps": steps, "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 1, "eval_steps": steps + 1, "save_steps": steps,
        "lora": LoraConfig(r=8).model_dump(),
    })  # fmt: skip


def _answers(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, Any]]
) -> list[Completion]:
    ends = end_token_ids(model, tokenizer)
    with torch.inference_mode():
        found = generate_ids(model.eval(), tokenizer, [row["prompt_ids"] for row in rows], LONGEST, do_sample=False)
    return [
        Completion(str(tokenizer.decode(ids, skip_special_tokens=True)).strip(), ids[-1] in ends, len(ids))
        for ids in found
    ]


def _compared(
    config: OnlineConfig,
    setup: TrainingSetup,
    settings: Settings,
    rows: Sequence[dict[str, Any]],
    before: Sequence[Completion],
    after: Sequence[Completion],
) -> dict[str, Any]:
    """Rewards of the held-out questions, and the paired interval of their difference."""
    rewards = open_rewards(config, setup, settings)
    first, second = (weighted_sums(rewards, rows, completions)[0] for completions in (before, after))
    difference = Bootstrap(resamples=2000, confidence=0.95, seed=42).difference(Rows.of(second), Rows.of(first))
    return {
        "reward_before": round(sum(first) / len(first), 3),
        "reward_after": round(sum(second) / len(second), 3),
        "difference": [round(float(end), 3) for end in difference[:3] if end is not None],
        "stopped_before": sum(completion.stopped for completion in before),
        "stopped_after": sum(completion.stopped for completion in after),
        "held_out_questions": len(rows),
        "examples": [
            {"question": row["prompt"][-1]["content"], "before": one.text, "after": other.text}
            for row, one, other in list(zip(rows, before, after, strict=True))[:3]
        ],
    }


if __name__ == "__main__":
    main()
