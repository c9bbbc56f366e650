"""The steps that make candidates: sentences as texts, and general rows beside generated ones and the user's own."""

import json
from collections import Counter

import pytest
from datasets import Dataset, DatasetDict

from llm_engineering.data.ledger import Ledger
from llm_engineering.documents.document import Document
from llm_engineering.generation.types import Answer
from llm_engineering.recipe.compute_blocks import ComputeConfig
from llm_engineering.recipe.data_blocks import DocumentsConfig, SplitConfig
from llm_engineering.recipe.generation_blocks import ClientConfig, InstructionWriting
from llm_engineering.recipe.training_blocks import ModelConfig
from tools.cli import prepare_zenml

prepare_zenml()

from steps import data  # noqa: E402 — ZenML looks for the project when steps are imported

TEXT = "The Heron Pump is made in Quessby. It is blue. The Otter Gate is built of larch."


class Writer:
    """A client that asks about the first words of every passage."""

    identity = "writer"
    temperature = 0.0
    writes_json = False

    def answer(self, requests, sampling, what):
        subjects = ["Heron Pump" if "Heron" in request[0]["content"] else "Otter Gate" for request in requests]
        return [Answer(f"What is known about the {subject}?") for subject in subjects]


@pytest.fixture
def facts(settings, monkeypatch):
    """What the steps log."""
    logged = {}
    monkeypatch.setattr(data, "log_rows", lambda *arguments, **facts: logged.update(facts))
    return logged


@pytest.fixture
def documents(settings):
    ledger = Ledger()
    ledger.record("document", 1, 1)
    read = Document(id="1", source="guide.md", title="guide", text=TEXT)
    return DatasetDict(documents=Dataset.from_list([read.model_dump()]), **ledger.datasets())


def counts(made):
    return {count["stage"]: (count["read"], count["kept"]) for count in made["counts"]}


@pytest.mark.parametrize(
    ("unit", "texts", "read"),
    [
        ("passage", [TEXT], {"document": (1, 1), "text": (1, 1)}),
        (
            "sentence",
            ["The Heron Pump is made in Quessby.", "The Otter Gate is built of larch."],
            {"document": (1, 1), "passage": (3, 2), "text": (2, 2)},
        ),
    ],
)
def test_texts_are_documents_or_sentences(unit, texts, read, documents, facts):
    made = data.collect_texts.entrypoint(documents, DocumentsConfig(unit=unit), 1, None, SplitConfig(), None)
    assert list(made["rows"]["text"]) == texts
    assert set(made["rows"]["document"]) == {"guide.md"}
    assert counts(made) == read


def test_general_rows_are_added_to_generated_instructions(documents, facts, monkeypatch):
    monkeypatch.setattr(data, "open_client", lambda *_: Writer())
    writing = InstructionWriting(question_max_new_tokens=20, styles={"question": 1})
    arguments = (
        documents, DocumentsConfig(unit="sentence"), ModelConfig(), None, ComputeConfig(), ClientConfig(), writing, 1
    )  # fmt: skip
    alone = data.generate_instructions.entrypoint(*arguments, None, None)
    assert counts(alone)["instruction"] == (2, 2)
    assert len(alone["sources"]) == 0
    made = data.generate_instructions.entrypoint(*arguments, "embedded:general", "hash")
    assert counts(made)["instruction"] == (152, 152)
    assert Counter(made["rows"]["origin"])["replay"] == 150
    assert list(made["sources"]["file"]) == ["embedded:general"]
    assert facts["replay_hash"] == "hash"


def test_general_rows_are_added_to_the_users_own_instructions(facts, tmp_path):
    own = tmp_path / "own.jsonl"
    own.write_text(json.dumps({"instruction": "What falls?", "output": "Rain."}) + "\n")
    made = data.load.entrypoint("instruction", str(own), str(own), None, {}, "own", "embedded:general", "hash")
    assert counts(made) == {"instruction": (151, 151), "instruction_test": (1, 1)}
    assert Counter(made["rows"]["origin"]) == {"unknown": 1, "replay": 150}
    assert set(made["test_rows"]["origin"]) == {"unknown"}
    assert list(made["sources"]["file"]) == [str(own), "embedded:general"]
    assert facts["replay_hash"] == "hash"
