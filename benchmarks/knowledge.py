"""Measures how well a model learns the facts of documents, with one training recipe against others:

    python -m benchmarks.knowledge [--write]           # five invented worlds, hours on two cores
    python -m benchmarks.knowledge --small             # the same on a random model of two layers, about a minute

For each seed a world is invented (`knowledge_world.py`): documents, and an exam in wordings that occur in no document. The
arms are trained from the same base model on the documents of each world, with each number of tokens:

    base               no training
    base+retrieval     no training; passages of the documents before each question
    passages           one question about each passage, with the passage as its answer (sft)
    documents          sentences of the documents only (cpt)
    recipe             sentences, then questions about single facts (cpt, sft), as the recipe says
    recipe+retrieval   the model of `recipe`, with passages before each question
    swapped            as `recipe`, on documents that give each fact to another company

All arms have the settings of the recipe; the number of epochs follows from the tokens. The answers of each trained model are
stored in `--folder`, so that an interrupted run continues, and more seeds or arms can be added.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

from datasets import Dataset, DatasetDict, concatenate_datasets

from benchmarks.gate import Gate
from benchmarks.knowledge_figures import RECIPE, SWAPPED, Key, arms_table, decisions
from benchmarks.knowledge_small import TemplateWriter, small_recipe
from benchmarks.knowledge_world import COMPANIES, World, make_world
from benchmarks.machine import machine, show
from llm_engineering.data.ledger import Ledger
from llm_engineering.data.prepare import prepare
from llm_engineering.data.rows import InstructionRow, Row
from llm_engineering.data.storage import rows_dataset, work_folder
from llm_engineering.documents.document import Document
from llm_engineering.documents.general_instructions import balanced_instructions
from llm_engineering.documents.passages import chunks, cut_passages
from llm_engineering.documents.read import read_documents
from llm_engineering.documents.texts import sentence_rows
from llm_engineering.evaluation.measures.exam import RETRIEVAL, Exam, open_exam, take_exam
from llm_engineering.evaluation.models import BASE, Models
from llm_engineering.formatting.datasets import format_splits
from llm_engineering.generation.clients.open import open_client
from llm_engineering.generation.facts import ROUNDS, generate_facts
from llm_engineering.generation.instructions import generate_instructions
from llm_engineering.generation.types import Client, Completer
from llm_engineering.models.base_model import load_model
from llm_engineering.models.device import choose_device
from llm_engineering.models.revision import pin_revision
from llm_engineering.models.tokenizer import load_tokenizer
from llm_engineering.recipe.data_blocks import DocumentsConfig
from llm_engineering.recipe.evaluation_blocks import ExamConfig
from llm_engineering.recipe.generation_blocks import ClientConfig, InstructionWriting
from llm_engineering.recipe.loading import load_recipe
from llm_engineering.recipe.recipe import Recipe
from llm_engineering.recipe.settings import Settings
from tests.tiny_models import train

RESULTS = Path(__file__).parent / "results" / "knowledge.json"
ARMS = (BASE, BASE + RETRIEVAL, "passages", "documents", "recipe", "recipe" + RETRIEVAL, "swapped")
TOKENS = (20_000, 60_000, 200_000)
# Of the tokens of a chain of both stages, the share of the first one. On the handbook the recipe trains 25,000 and 55,000.
_CPT_SHARE = 0.3
# All rows are trained on, because the exam measures the models. The trainer wants some rows for its validation loss.
_VALIDATION_ROWS = 4

Writer = Callable[[Recipe, Settings], Client]


class Arm(NamedTuple):
    """What is trained: the stages with their shares of the tokens, and how instructions are written."""

    stages: Mapping[str, float]
    questions: str = "fact"
    swapped: bool = False


TRAINED = {
    "passages": Arm({"sft": 1.0}, questions="passage"),
    "documents": Arm({"cpt": 1.0}),
    RECIPE: Arm({"cpt": _CPT_SHARE, "sft": 1 - _CPT_SHARE}),
    SWAPPED: Arm({"cpt": _CPT_SHARE, "sft": 1 - _CPT_SHARE}, swapped=True),
}


@dataclass(frozen=True)
class Bench:
    """What is the same for all arms.

    Attributes:
        recipe: the recipe of the arms. Its documents and its exam are replaced by those of each world.
        folder: for worlds, questions and answers. Every recipe has its own.
        open_writer: opens the model that writes the questions.
    """

    recipe: Recipe
    folder: Path
    open_writer: Writer
    companies: int = COMPANIES

    def world(self, seed: int, swapped: bool = False) -> tuple[World, Path]:
        """The world of a seed, and the folder with its documents and its exam."""
        world = make_world(seed, self.companies)
        world = world.swapped() if swapped else world
        folder = self.folder / f"world-{seed}{'-swapped' if swapped else ''}"
        if not (folder / "exam.jsonl").is_file():
            world.write(folder)
        return world, folder

    def documents(self, seed: int, swapped: bool = False) -> list[Document]:
        """The documents of a world."""
        _, folder = self.world(seed, swapped)
        return read_documents(DocumentsConfig(path=str(folder / "documents")))[0]

    def exam(self, seed: int, with_retrieval: bool = False) -> Exam:
        """The exam of a world, with general questions."""
        assert self.recipe.exam is not None
        config = ExamConfig.model_validate(
            {**self.recipe.exam.model_dump(), "path": str(self.world(seed)[1] / "exam.jsonl")}
        )
        return open_exam(config, chunks(self.documents(seed), self._cut("passage")) if with_retrieval else [])

    def answers(self, model: str, tokens: int | None, seed: int, retrieval: bool) -> dict[str, dict[str, str]]:
        """The answers of a model, by the arm and the id of the question. They are stored, so a second call is fast.

        Args:
            model: `base`, or a key of `TRAINED`.
            retrieval: whether the model also answers with passages before each question.
        """
        arms = [model, *([model + RETRIEVAL] if retrieval else [])]
        name = f"{model}-{tokens}-seed-{seed}" if tokens else f"{model}-seed-{seed}"
        file = self.folder / "answers" / f"{name}.json"
        stored = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if not stored.keys() >= set(arms):
            print(f"Measuring {name}", file=sys.stderr, flush=True)
            stored = self._measured(model, tokens, seed, retrieval)
            _write(file, stored)
            # The weights of a finished arm are not needed again.
            shutil.rmtree(self._settings.llm_output_dir / "training", ignore_errors=True)
        return {arm: stored[arm] for arm in arms}

    def questions(self, questions: str, swapped: bool, seed: int) -> list[InstructionRow]:
        """The generated instructions of a world. They are stored, because all numbers of tokens train on the same ones."""
        file = self.folder / f"questions-{questions}-seed-{seed}{'-swapped' if swapped else ''}.json"
        if not file.is_file():
            passages, _ = cut_passages(
                self.documents(seed, swapped), self._cut("sentence" if questions == "fact" else "passage"), seed
            )
            writing = InstructionWriting.model_validate(
                {**self.recipe.generation.part(InstructionWriting).model_dump(), "questions": questions}
            )
            writer = self.open_writer(self.recipe, self._settings)
            if questions == "fact":
                rows, _, _ = generate_facts(passages, cast(Completer, writer), writing, seed=seed, rounds=ROUNDS)
            else:
                rows, _ = generate_instructions(passages, writer, writing, seed)
            _write(file, [row.model_dump() for row in rows])
        return [InstructionRow.model_validate(row) for row in json.loads(file.read_text(encoding="utf-8"))]

    @property
    def _settings(self) -> Settings:
        return Settings(llm_output_dir=self.folder)

    def _cut(self, unit: str) -> DocumentsConfig:
        return DocumentsConfig.model_validate({**self.recipe.documents.model_dump(), "unit": unit})

    def _measured(self, model: str, tokens: int | None, seed: int, retrieval: bool) -> dict[str, dict[str, str]]:
        recipe, settings = self.recipe, self._settings
        tokenizer = load_tokenizer(recipe.model, settings, recipe.formatting.chat_template)
        adapters = {}
        if tokens is not None:
            adapters[model] = self._train(TRAINED[model], tokens, seed)
        base = load_model(recipe.model, settings, choose_device(recipe.compute))
        evaluation = recipe.evaluation
        models = Models(base, adapters, tokenizer, evaluation.batch_size, evaluation.repetition_penalty)
        exam = self.exam(seed, retrieval)
        taken = take_exam(models, model, model, exam, retrieval)
        return {arm: {exam.rows[i].id: sample.text for i, sample in found.items()} for arm, found in taken.items()}

    def _train(self, arm: Arm, tokens: int, seed: int) -> Path:
        """Train the stages of an arm, and return the folder of the last adapter."""
        recipe = self.recipe
        start: Path | None = None
        setup = recipe.setup.model_copy(update={"seed": seed})
        for stage, share in arm.stages.items():
            data = self._formatted(stage, arm, seed)
            trained = sum(len(row["input_ids"]) for row in data["train"])
            update: dict[str, Any] = {"num_train_epochs": share * tokens / trained}
            if start is None:
                update |= {"method": recipe.method, "lora": recipe.lora}
            config = recipe.block(stage).model_copy(update=update)
            start = train(data, config, setup, self._settings, start=start).adapter
        assert start is not None
        return start

    def _formatted(self, stage: str, arm: Arm, seed: int) -> DatasetDict:
        """The rows of a stage as token ids, checked by the rules of the recipe."""
        recipe = self.recipe
        rows: list[Row]
        if stage == "cpt":
            kind = "text"
            passages, _ = cut_passages(self.documents(seed, arm.swapped), self._cut("sentence"), seed)
            rows = list(sentence_rows(passages))
        else:
            kind = "instruction"
            asked = self.questions(arm.questions, arm.swapped, seed)
            general = balanced_instructions(recipe.data.replay_instructions, len(asked), seed)
            rows = [*asked, *(row for row in general if isinstance(row, InstructionRow))]
        candidates = rows_dataset(rows, kind)
        prepared = prepare(candidates, kind, recipe.data.checks, Ledger(), work_folder())
        train: Dataset = concatenate_datasets([part for part in prepared.splits.values() if len(part)])
        splits = {"train": train, "validation": train.select(range(min(_VALIDATION_ROWS, len(train))))}
        tokenizer = load_tokenizer(recipe.model, self._settings, recipe.formatting.chat_template)
        # A ledger of its own, because the validation rows are counted twice here.
        ledger, rows_in_splits = Ledger(), sum(map(len, splits.values()))
        ledger.record(kind, rows_in_splits, rows_in_splits)
        return format_splits(splits, kind, tokenizer, recipe.formatting, work_folder(), ledger)[0]


def measure(bench: Bench, seeds: Sequence[int], tokens: Sequence[int], arms: Sequence[str]) -> dict[str, Any]:
    """Train and measure what is not stored yet, and return the figures.

    Args:
        arms: some of `ARMS`. The base model is measured in any case, because all arms are compared with it.
    """
    found: dict[Key, list[dict[str, str]]] = {}
    models = [BASE, *(model for model in TRAINED if {model, model + RETRIEVAL} & set(arms))]
    for seed in seeds:
        for model in models:
            for number in tokens if model in TRAINED else [None]:
                for arm, answers in bench.answers(model, number, seed, model + RETRIEVAL in arms).items():
                    if arm in arms or arm == BASE:
                        found.setdefault(Key(arm, number), []).append(answers)
    gate = Gate.of(bench.recipe)
    exams = [bench.exam(seed) for seed in seeds]
    return {
        "arms": arms_table(gate, exams, found),
        "gate": decisions(gate, exams, found),
        "swapped_facts_said": _swapped_facts(bench, seeds, found),
        "questions_also_trained": _trained_questions(bench, seeds, exams, models),
        "seeds": list(seeds),
    }


def _swapped_facts(
    bench: Bench, seeds: Sequence[int], found: Mapping[Key, Sequence[Mapping[str, str]]]
) -> dict[str, float]:
    """Share of the questions to which a model of the arm `swapped` gives the answer of its documents, by tokens."""
    shares = {}
    for key, answers in found.items():
        if key.arm == SWAPPED:
            right = [
                row.is_right(own[row.id])
                for seed, own in zip(seeds, answers, strict=True)
                for row in bench.world(seed, swapped=True)[0].exam()
                if row.kind == "single"
            ]
            shares[str(key.tokens)] = round(sum(right) / len(right), 4)
    return shares


def _trained_questions(
    bench: Bench, seeds: Sequence[int], exams: Sequence[Exam], models: Sequence[str]
) -> dict[str, int]:
    """How many questions of the exams the model that writes questions also wrote, word for word."""
    counts = {}
    for model in models:
        if model in TRAINED and "sft" in TRAINED[model].stages:
            arm, count = TRAINED[model], 0
            for seed, exam in zip(seeds, exams, strict=True):
                asked = {row.prompt[0].content.casefold() for row in bench.questions(arm.questions, arm.swapped, seed)}
                count += sum(row.question.casefold() in asked for row in exam.rows)
            counts[model] = count
    return counts


def _write(file: Path, content: object) -> None:
    """Write a file under another name first, so that an interrupted run leaves no half file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(content), encoding="utf-8")
    partial.rename(file)


def open_bench(config: str, folder: Path) -> Bench:
    """The benchmark with a recipe, in a folder of its own for this recipe."""
    # The worlds have no held-out rows, so the gate judges the exam alone.
    recipe = load_recipe(config, ["tracking.comet=off", "promotion.sft.better_than.base.heldout_loss=null"])
    recipe = recipe.model_copy(update={"model": pin_revision(recipe.model)})
    digest = hashlib.sha256((recipe.model_dump_json() + str(make_world(1).documents())).encode()).hexdigest()[:12]

    def open_writer(recipe: Recipe, settings: Settings) -> Client:
        client, template = recipe.generation.part(ClientConfig), recipe.formatting.chat_template
        return open_client(client, recipe.model, recipe.compute, settings, template)

    return Bench(recipe, folder / digest, open_writer)


def open_small_bench(folder: Path) -> Bench:
    """The benchmark with a random model of two layers, few companies, and questions that a template writes."""
    return Bench(small_recipe(folder), folder, lambda _recipe, _settings: TemplateWriter(), companies=3)


def main() -> None:
    """Print the figures; `--write` also writes them to a file."""
    parser = argparse.ArgumentParser(description="How well a model learns the facts of documents.")
    parser.add_argument("--config", default="configs/local.yaml")
    parser.add_argument("--seeds", type=int, help="number of invented worlds (default: 5, small: 1)")
    parser.add_argument("--tokens", type=int, nargs="+", help=f"to train on (default: {TOKENS}, small: 1500)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="(default: all)")
    parser.add_argument("--folder", type=Path, default=Settings().llm_output_dir / "knowledge", help="for answers")
    parser.add_argument("--small", action="store_true", help="try everything on a random model of two layers")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    arguments = parser.parse_args()
    if arguments.small and arguments.write:
        parser.error("--small measures a random model, so --write would store figures that say nothing")
    bench = (
        open_small_bench(arguments.folder / "small")
        if arguments.small
        else open_bench(arguments.config, arguments.folder)
    )
    seeds = range(1, (arguments.seeds or (1 if arguments.small else 5)) + 1)
    tokens = arguments.tokens or ([1500] if arguments.small else TOKENS)
    figures = measure(bench, seeds, tokens, arguments.arms)
    show({**figures, "machine": machine()}, RESULTS if arguments.write else None)


if __name__ == "__main__":
    main()
