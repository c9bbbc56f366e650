"""Makes the models whose answers the benchmark of the gate judges: small ones that learn a few facts, and untrained adapters."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from datasets import DatasetDict, disable_progress_bars

from llm_engineering.data.ledger import Ledger
from llm_engineering.data.rows import InstructionRow, Message
from llm_engineering.data.storage import rows_dataset
from llm_engineering.evaluation.measures.exam import Exam, ExamRow, take_exam
from llm_engineering.evaluation.models import BASE, Models
from llm_engineering.formatting.datasets import format_splits
from llm_engineering.models.base_model import load_model
from llm_engineering.models.device import choose_device
from llm_engineering.models.revision import pin_revision
from llm_engineering.models.tokenizer import load_tokenizer
from llm_engineering.recipe.data_blocks import FormattingConfig
from llm_engineering.recipe.model_blocks import LoraConfig
from llm_engineering.recipe.recipe import Recipe
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.stage_blocks import SFTConfig
from llm_engineering.training.policy import new_policy, save_policy
from tests.tiny_models import train, training_setup, write_model

# What the rows of a small model say: the right answers, those of another fact, answers in random order; or no training.
ARMS = ("right", "swapped_facts", "shuffled_answers", "untrained")
FACTS, GENERAL = range(10, 50), range(50, 110)
PLACES = ("north", "south", "east", "west")
WORDINGS = ("Where is {}?", "At what place is {}?")
# 20 passes teach none of the facts and 100 all of them. With 75 the accuracy of different seeds has a standard deviation of 0.02, as
# the default recipe has 0.03. With 45 it has 0.13: a model that knows more than another one is then rightly promoted.
EPOCHS = 75


def small_exam() -> Exam:
    """Two questions about the place of each of 40 numbers, 40 unanswerable questions, and 60 general ones."""
    places = random.Random(0)
    facts = {number: places.choice(PLACES) for number in FACTS}
    rows = [
        ExamRow(id=f"{number}-{wording}", question=text.format(number), answers=[place], facts=[str(number)])
        for number, place in facts.items()
        for wording, text in enumerate(WORDINGS)
    ]
    rows += [ExamRow(id=f"maker-{n}", question=f"Who made {n}?", kind="unanswerable") for n in FACTS]
    rows += [
        ExamRow(
            id=f"general-{n}", question=f"Is {n} odd or even?", answers=["odd" if n % 2 else "even"], kind="control"
        )
        for n in GENERAL
    ]
    return Exam(rows, [[] for _ in rows], max_new_tokens=6)


def answers_of_small_models(arm: str, seeds: Sequence[int], folder: Path) -> list[dict[str, str]]:
    """Train a model of two layers from each seed, and return its answers by the id of the question.

    Answers are stored in `folder`, so a second call does not train again.

    Args:
        arm: one of `ARMS`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found: list[dict[str, str]] = []
    for seed in seeds:
        file = folder / f"{arm}-{seed}.json"
        if not file.is_file():
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps(_answers(arm, seed)), encoding="utf-8")
            partial.rename(file)
        found.append(json.loads(file.read_text(encoding="utf-8")))
    return found


def _answers(arm: str, seed: int) -> dict[str, str]:
    exam = small_exam()
    disable_progress_bars()
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model", "qwen3")
        setup = training_setup(folder / "model", max_length=64, chat_template=None)
        setup = setup.model_copy(update={"seed": seed})
        settings = Settings(llm_output_dir=folder / "outputs")
        tokenizer = load_tokenizer(setup.model, settings)
        adapters = {}
        if arm != "untrained":
            rows = _rows(exam.rows, arm, seed)
            splits = {"train": rows_dataset(rows, "instruction"), "validation": rows_dataset(rows[:4], "instruction")}
            ledger = Ledger()
            ledger.record("instruction", len(rows) + 4, len(rows) + 4)
            (folder / "formatted").mkdir()
            formatting = FormattingConfig(max_length=64)
            data = format_splits(splits, "instruction", tokenizer, formatting, folder / "formatted", ledger)[0]
            adapters["sft"] = train(DatasetDict(data), _CONFIG, setup, settings).adapter
        base = load_model(setup.model, settings, choose_device(setup.compute))
        models = Models(base, adapters, tokenizer, batch_size=32)
        return _taken(exam, models, models.names[-1])


_CONFIG = SFTConfig(
    method="full", lora=None, learning_rate=5e-3, num_train_epochs=EPOCHS, per_device_train_batch_size=16,
    gradient_accumulation_steps=1, packing=False, eval_steps=1000, save_steps=1000, logging_steps=50,
)  # fmt: skip


def _rows(questions: Sequence[ExamRow], arm: str, seed: int) -> list[InstructionRow]:
    """The rows that a small model learns. Their wordings are those of the exam, because it has no room for others."""
    about = [row for row in questions if row.kind == "single"]
    answers = {row.id: row.answers[0] for row in about}
    if arm == "swapped_facts":
        # The neighbour's fact, for both wordings. Some neighbours are at the same place.
        ids, step = list(answers), len(WORDINGS)
        answers = {one: answers[other] for one, other in zip(ids, ids[step:] + ids[:step], strict=True)}
    if arm == "shuffled_answers":
        mixed = list(answers.values())
        random.Random(seed).shuffle(mixed)
        answers = dict(zip(answers, mixed, strict=True))
    return [
        InstructionRow(
            prompt=[Message(role="user", content=row.question)],
            completion=[Message(role="assistant", content=answers[row.id])],
            source="facts",
            origin="benchmark",
        )
        for row in about
    ]


def answers_of_untrained_adapter(recipe: Recipe, exam: Exam) -> dict[str, dict[str, str]]:
    """The answers of the recipe's base model, and of this model with a fresh adapter, by model and question."""
    settings = Settings()
    model, device = pin_revision(recipe.model), choose_device(recipe.compute)
    tokenizer = load_tokenizer(model, settings, recipe.formatting.chat_template)
    with TemporaryDirectory() as name:
        torch.manual_seed(recipe.seed)
        policy = new_policy(model, LoraConfig(), settings, device)
        save_policy(policy, model, Path(name))
        base = load_model(model, settings, device)
        evaluation = recipe.evaluation
        models = Models(base, {"sft": Path(name)}, tokenizer, evaluation.batch_size, evaluation.repetition_penalty)
        return {model: _taken(exam, models, model) for model in (BASE, "sft")}


def _taken(exam: Exam, models: Models, name: str) -> dict[str, str]:
    taken = take_exam(models, name, name, exam, with_retrieval=False)[name]
    return {exam.rows[index].id: sample.text for index, sample in taken.items()}
