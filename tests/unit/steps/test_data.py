"""The steps that make candidates: sentences as texts, and general rows beside generated ones and the user's own."""

import json
from collections import Counter
from types import SimpleNamespace

import pytest
from datasets import Dataset, DatasetDict

from llm_engineering.data.ledger import Ledger
from llm_engineering.documents.document import Document
from llm_engineering.errors import RequestError
from llm_engineering.generation.types import Answer
from llm_engineering.recipe.compute_blocks import ComputeConfig
from llm_engineering.recipe.data_blocks import (
    UNFIT,
    DataConfig,
    DocumentsConfig,
    FormattingConfig,
    RulesConfig,
    SplitConfig,
)
from llm_engineering.recipe.generation_blocks import ClientConfig, InstructionWriting
from llm_engineering.recipe.training_blocks import ModelConfig
from tools.cli import prepare_zenml

prepare_zenml()

from pipelines.promote import _unfit  # noqa: E402
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


def test_rows_that_are_not_fit_are_refused_before_training(settings, facts, monkeypatch, tmp_path, tiny_model):
    monkeypatch.setenv("LLM_OUTPUT_DIR", str(tmp_path / "outputs"))
    rows = tmp_path / "rows.jsonl"
    lines = [{"instruction": f"Where does {i} stand?", "output": f"It stands after {i - 1}."} for i in range(12)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    candidates = data.load.entrypoint("instruction", str(rows), None, None, {}, "hash", None, None)
    checks = DataConfig(rules=RulesConfig(near_duplicate="off"), split=SplitConfig(test_fraction=0.3))
    dataset = data.prepare.entrypoint("instruction", candidates, checks, None, None, None)
    arguments = ("sft", "instruction", dataset, ModelConfig(name_or_path=str(tiny_model)), FormattingConfig())
    with pytest.raises(RequestError, match="not fit to train on: only 12 rows are left, and at least 20"):
        data.format_rows.entrypoint(*arguments, False)
    assert (tmp_path / "outputs" / "unfit_data" / "sft" / "report.html").exists()
    assert UNFIT not in facts
    formatted, _ = data.format_rows.entrypoint(*arguments, True)
    assert sum(map(len, formatted.values())) == 12
    assert facts[UNFIT].startswith("only 12 rows are left")


def test_a_model_version_names_the_stages_whose_data_is_not_fit():
    def step(**metadata):
        return SimpleNamespace(outputs={"data_report": [SimpleNamespace(run_metadata=metadata)], "formatted": []})

    steps = {"format_sft": step(train=4, unfit_data="only 4 rows"), "format_dpo": step(train=40), "train_sft": None}
    assert _unfit(SimpleNamespace(steps=steps)) == {"sft": "only 4 rows"}
