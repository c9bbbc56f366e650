"""The step that writes an exam, and what the steps after it do with the exam."""

import json

import pytest
from datasets import Dataset, DatasetDict

from llm_engineering.data.ledger import Ledger
from llm_engineering.data.rows import InstructionRow, Message, normalised
from llm_engineering.data.storage import rows_dataset
from llm_engineering.evaluation.measures.exam import exam_hash, read_exam, with_written
from llm_engineering.generation.types import Answer
from llm_engineering.recipe.data_blocks import DataConfig, DocumentsConfig, SplitConfig
from llm_engineering.recipe.evaluation_blocks import ExamConfig
from llm_engineering.recipe.generation_blocks import ClientConfig, InstructionWriting, PreferenceWriting
from llm_engineering.recipe.model_blocks import ModelConfig
from steps.materializers import Directory
from tests.tiny_models import CPU
from tools.cli import prepare_zenml

prepare_zenml()

from steps import data, written_exam  # noqa: E402 — ZenML looks for the project when steps are imported

TOWNS = ("Alba", "Brano", "Corvo", "Delmo", "Elvas", "Fanto", "Gavro", "Holma", "Istra", "Jorvo", "Kelda", "Lomna")
WORDINGS = ("Where was the bell of {} cast?", "Which town made the oldest bell of {}?", "Who rings {}?", "Who sees {}?")
GENERATED = ExamConfig(path="generated", control=None)
UNIT = DocumentsConfig(unit="sentence")


class Writer:
    """Continues with the last word of the sentence, and knows nothing without one."""

    identity = "scripted"

    def __init__(self, reads=True):
        self.reads = reads

    def complete(self, prompts, sampling, what, banned=()):
        asked = [prompt.rpartition("\n\n")[2].splitlines()[0] for prompt in prompts]
        known = [self.reads and one.startswith("Sentence: ") for one in asked]
        return [Answer(one.split()[-1].rstrip(".") if k else "Nowhere") for one, k in zip(asked, known, strict=True)]

    def answer(self, requests, sampling, what):
        return [Answer("Nowhere") for _ in requests]


@pytest.fixture
def documents(settings):
    ledger = Ledger()
    ledger.record("document", 12, 12)
    made = [
        {"id": town, "source": f"{town}.txt", "title": town, "text": f"The old bell of {town} was cast in {town}burg."}
        for town in TOWNS
    ]
    return DatasetDict(documents=Dataset.from_list([{**one, "parts": []} for one in made]), **ledger.datasets())


@pytest.fixture
def candidates(settings):
    rows = [
        InstructionRow(
            prompt=[Message(role="user", content=wording.format(town))],
            completion=[Message(role="assistant", content=f"{town}burg" if number < 2 else "nobody")],
            source=f"{town}.txt:characters 0-{len(f'The old bell of {town} was cast in {town}burg.')}",
            origin="fact",
            document=f"{town}.txt",
        )
        for town in TOWNS
        for number, wording in enumerate(WORDINGS)
    ]
    ledger = Ledger()
    ledger.record("instruction", len(rows), len(rows))
    return DatasetDict(rows=rows_dataset(rows, "instruction"), **ledger.datasets())


@pytest.fixture
def write(documents, candidates, monkeypatch):
    """A function that writes an exam, and the facts that the steps log."""
    logged = {}
    for module in (written_exam, data):
        monkeypatch.setattr(module, "open_client", lambda *arguments: Writer(reads))
    monkeypatch.setattr(written_exam, "log_artifact", lambda name, **facts: logged.update(facts))
    monkeypatch.setattr(data, "log_rows", lambda *arguments, **facts: logged.update(facts))
    reads = True

    def run(can_read=True):
        nonlocal reads
        reads = can_read
        return written_exam.write_exam.entrypoint.__wrapped__(
            candidates, documents, UNIT, ModelConfig(), None, CPU, ClientConfig(), InstructionWriting(questions="fact"),
            GENERATED, SplitConfig(validation_fraction=1e-9, test_fraction=1e-9), 1,
        )  # fmt: skip

    return run, logged


def prepared(candidates, written):
    # By the hashes of their names, Istra is for the test and Alba for validation.
    checks = DataConfig(split=SplitConfig(validation_fraction=0.05, test_fraction=0.27)).checks
    return data.prepare.entrypoint("instruction", candidates, checks, None, GENERATED, "", written)


def test_the_written_exam_is_a_file_in_the_format_of_a_user_and_training_asks_none_of_it(write, candidates):
    run, logged = write
    written = run()
    assert {name: logged[name] for name in ("single", "unanswerable")} == {"single": 12, "unanswerable": 2}
    file = written.path / "exam.jsonl"
    rows = read_exam(ExamConfig(path=str(file), control=None))
    assert len(rows) == 14
    assert rows[0].evidence.endswith(f"{rows[0].answers[0]}.")
    # What a run reads is this file, and its hash is that of its contents.
    own = with_written(GENERATED, written.path)
    assert read_exam(own) == rows
    before = exam_hash(own)
    assert len(before) == 12
    made = prepared(candidates, written)
    assert logged["exam_hash"] == before
    asked = {normalised(row.question) for row in rows}
    trained = [normalised(record["prompt"][0]["content"]) for record in made["train"]]
    assert trained
    assert not asked & set(trained)
    counts = {count["stage"]: (count["read"], count["kept"]) for count in made["counts"]}
    assert counts["exam"] == (14, 14)
    # The other wording of each fact is still trained.
    held_out = [record["document"] for split in ("validation", "test") for record in made[split]]
    for row in rows[:12]:
        answers = [record["completion"][0]["content"] for record in made["train"]]
        assert row.answers[0] in answers or row.documents[0] in held_out
    file.write_text(file.read_text().replace("bell", "gong"))
    assert exam_hash(own) != before


def test_questions_that_fail_the_check_are_counted_and_go_back_to_training(write, candidates):
    run, logged = write
    written = run(can_read=False)
    assert (written.path / "exam.jsonl").read_text() == ""
    assert logged["set_aside"] == {"not_answered_with_passage": 24}
    assert with_written(GENERATED, written.path) == GENERATED
    assert read_exam(GENERATED) == []
    assert exam_hash(GENERATED) == ""
    made = prepared(candidates, written)
    counts = {count["stage"]: (count["read"], count["kept"]) for count in made["counts"]}
    assert counts["exam"] == (24, 0)
    assert not [row for row in made["quarantine"] if row["reason"] == "contaminated"]


def test_pairs_without_an_answer_are_not_those_of_the_exam(write, candidates, documents):
    run, _ = write
    written = run()
    made = prepared(candidates, written)
    file = written.path / "exam.jsonl"
    arguments = (made, documents, ModelConfig(), None, CPU, ClientConfig(), PreferenceWriting(unanswerable=10), 1, UNIT)
    questions = InstructionWriting(questions="fact")

    def without_answer(folder):
        pairs = data.generate_preferences.entrypoint.__wrapped__(*arguments, questions, None, folder)["rows"]
        return [pair["prompt"][0]["content"] for pair in pairs if "no document answers it" in pair["origin"]]

    usual = without_answer(None)
    assert len(usual) == 10
    lines = [{"question": question, "kind": "unanswerable"} for question in usual]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert not set(usual) & set(without_answer(Directory(path=written.path)))
