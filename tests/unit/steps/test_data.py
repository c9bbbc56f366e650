"""The steps that make candidates: sentences as texts, and general rows beside generated ones and the user's own."""

import json
from collections import Counter
from types import SimpleNamespace

import pytest
from datasets import Dataset, DatasetDict

from llm_engineering.data.ledger import Ledger
from llm_engineering.data.rows import SPLITS, Quarantined, TextRow, instruction_row, split_of
from llm_engineering.data.storage import FEATURES, rows_dataset, to_dataset
from llm_engineering.documents.document import Document
from llm_engineering.errors import RequestError
from llm_engineering.feedback.human_rows import read_snapshot, take_snapshot
from llm_engineering.feedback.served import ServedLog, said
from llm_engineering.generation.derived.question_wordings import OTHER_WORDING
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
from llm_engineering.recipe.evaluation_blocks import ExamConfig
from llm_engineering.recipe.generation_blocks import ClientConfig, InstructionWriting, PreferenceWriting, TextWriting
from llm_engineering.recipe.model_blocks import ModelConfig
from llm_engineering.recipe.recipe_keys import DerivingSetup
from tests.tiny_models import instruction
from tools.cli import prepare_zenml

prepare_zenml()

from pipelines.promote import _unfit  # noqa: E402
from steps import data, logging  # noqa: E402 — ZenML looks for the project when steps are imported
from steps.evaluation import tokens_read  # noqa: E402

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
    monkeypatch.setattr(data, "page_facts", lambda base_model: {"Run": "a run", "Base model": base_model})
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
    alone = data.generate_instructions.entrypoint.__wrapped__(*arguments, None, None)
    assert counts(alone)["instruction"] == (2, 2)
    assert len(alone["sources"]) == 0
    made = data.generate_instructions.entrypoint.__wrapped__(*arguments, "embedded:general", "hash")
    assert counts(made)["instruction"] == (202, 202)
    assert Counter(made["rows"]["origin"])["replay"] == 200
    assert list(made["sources"]["file"]) == ["embedded:general"]
    assert facts["replay_hash"] == "hash"


def test_general_rows_are_added_to_the_users_own_instructions(facts, tmp_path):
    own = tmp_path / "own.jsonl"
    own.write_text(json.dumps({"instruction": "What falls?", "output": "Rain."}) + "\n")
    made = data.load.entrypoint("instruction", str(own), str(own), None, {}, "own", "embedded:general", "hash")
    assert counts(made) == {"instruction": (501, 501), "instruction_test": (1, 1)}
    assert Counter(made["rows"]["origin"]) == {"unknown": 1, "replay": 500}
    assert set(made["test_rows"]["origin"]) == {"unknown"}
    assert list(made["sources"]["file"]) == [str(own), "embedded:general"]
    assert facts["replay_hash"] == "hash"


def test_prompts_of_held_out_instructions_stay_held_out(settings, facts):
    rows = {name: [instruction(number) for number in range(start, start + 4)] for start, name in enumerate(SPLITS)}
    ledger = Ledger()
    ledger.record("instruction", 12, 12)
    splits = {name: rows_dataset(own, "instruction") for name, own in rows.items()}
    made = data.collect_prompts.entrypoint(DatasetDict(**splits, **ledger.datasets()))
    asked = {name: [turns[-1]["content"] for turns in made[name]["prompt"]] for name in ("rows", "test_rows")}
    assert asked["test_rows"] == [row.prompt[-1].content for row in rows["test"]]
    assert asked["rows"] == [row.prompt[-1].content for name in ("train", "validation") for row in rows[name]]
    assert made["rows"]["answers"][0] == [rows["train"][0].completion[0].content]
    assert counts(made) == {"instruction": (12, 12), "prompt": (8, 8), "prompt_test": (4, 4)}


def test_thumbs_on_a_held_out_question_are_set_aside(settings, facts, tmp_path):
    log = ServedLog(tmp_path, 1, "abc")
    for number in range(40):
        asked = [{"role": "user", "content": f"What is {number}?"}]
        log.write_answer(f"n{number}", asked, {"content": f"A number, {number}."}, "stop", None)
        log.write_feedback(f"n{number}", "up", None, None)
    human = read_snapshot(take_snapshot(said(tmp_path, "labelled"), tmp_path), "labelled", tmp_path)
    checks = DataConfig(rules=RulesConfig(near_duplicate="off"))
    alone = data.prepare.entrypoint("labelled", None, checks, None, None, None, None, human)
    trained = alone["train"][0]["prompt"][0]["content"]
    # The question of a generated row is in the split of its document.
    row = instruction(1)
    row = row.model_copy(update={"prompt": [row.prompt[-1].model_copy(update={"content": trained.upper()})]})
    instructions = DatasetDict(test=rows_dataset([row], "instruction"))
    made = data.prepare.entrypoint("labelled", None, checks, None, None, None, None, human, instructions)
    assert [(one["reason"], one["text"]) for one in made["quarantine"]] == [("held_out_question", trained)]
    assert counts(made) == {"labelled": (40, 39)}
    assert len(made["train"]) == len(alone["train"]) - 1


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


def test_other_wordings_are_rows_for_training_alone(settings, facts, tmp_path):
    rows, exam = tmp_path / "rows.jsonl", tmp_path / "exam.jsonl"
    lines = [{"instruction": f"Where is lamp {'i' * i} located?", "output": f"Hall {i}"} for i in range(30)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = [f"What is the location of lamp {'i' * i}?" for i in range(30)]
    exam_rows = [{"id": f"{i}", "question": q, "answers": ["Hall"], "facts": [f"{i}"]} for i, q in enumerate(asked)]
    exam.write_text("".join(json.dumps(line) + "\n" for line in exam_rows))
    candidates = data.load.entrypoint("instruction", str(rows), None, None, {}, "hash", None, None)
    checks = DataConfig(rules=RulesConfig(near_duplicate="off"), split=SplitConfig(test_fraction=0.3), wordings=2)
    made = data.prepare.entrypoint("instruction", candidates, checks, None, ExamConfig(path=str(exam)), "hash")
    trained = 30 - len(made["validation"]) - len(made["test"])
    assert Counter(origin.startswith(OTHER_WORDING) for origin in made["train"]["origin"]) == {
        False: trained,
        True: trained,
    }
    assert not any(
        origin.startswith(OTHER_WORDING) for name in ("validation", "test") for origin in made[name]["origin"]
    )
    questions = {prompt[0]["content"] for prompt in made["train"]["prompt"]}
    assert len(questions) == 2 * trained
    assert not questions & set(asked)
    assert counts(made) == {"instruction": (30 + trained, 30 + trained)}


def test_no_pair_is_made_of_other_wordings(settings, facts, monkeypatch):
    monkeypatch.setattr(data, "open_client", lambda *arguments: Writer())
    shared = {"completion": [{"role": "assistant", "content": "A. Pump"}], "source": "a.md"}
    rows = [
        instruction_row({**shared, "prompt": [{"role": "user", "content": question}], "origin": origin})
        for question, origin in (("Who made it?", "human"), ("Which person made it?", f"{OTHER_WORDING}: human"))
    ]
    empty = rows_dataset([], "instruction")
    dataset = DatasetDict(train=rows_dataset(rows, "instruction"), validation=empty, test=empty, **Ledger().datasets())
    arguments = (ModelConfig(), None, ComputeConfig(), ClientConfig(), PreferenceWriting(), 1)
    made = data.generate_preferences.entrypoint.__wrapped__(dataset, None, *arguments)
    assert [prompt[0]["content"] for prompt in made["rows"]["prompt"]] == ["Who made it?"]


def test_a_model_version_names_the_stages_whose_data_is_not_fit():
    def step(**metadata):
        return SimpleNamespace(outputs={"data_report": [SimpleNamespace(run_metadata=metadata)], "formatted": []})

    steps = {"format_sft": step(train=4, unfit_data="only 4 rows"), "format_dpo": step(train=40), "train_sft": None}
    assert _unfit(SimpleNamespace(steps=steps)) == {"sft": "only 4 rows"}


def test_rewritings_are_text_rows_beside_the_sentences(documents, facts, monkeypatch):
    split = SplitConfig(test_fraction=0.01, validation_fraction=0.01)
    setup = DerivingSetup(
        writing=TextWriting(rewritings=["list"]),
        client=ClientConfig(),
        model=ModelConfig(),
        compute=ComputeConfig(),
        formatting=FormattingConfig(),
        tokens=None,
        epochs={"text": 1, "instruction": 1},
    )
    arguments = (documents, DocumentsConfig(unit="sentence"), 1, None, split, None)
    made = data.collect_texts.entrypoint(*arguments, setup)
    assert counts(made)["text"] == (3, 3)
    assert made["rows"]["text"][2] == (
        "guide\n- The Heron Pump is made in Quessby.\n- The Otter Gate is built of larch."
    )
    assert made["rows"]["origin"] == ["document", "document", "list by rule"]
    assert facts["diversity"]["rewritings_list"] == 1

    # A writer that claims what no passage says: its rows are set aside, and nothing else.
    client = ClientConfig(client="openai", model="m")
    wrong = SimpleNamespace(identity="w", writes_json=True, temperature=0.0)
    wrong.answer = lambda requests, *_: [Answer("It was built by Odo Renn in 1900.") for _ in requests]
    monkeypatch.setattr(data, "open_client", lambda *_: wrong)
    made = data.collect_texts.entrypoint(*arguments, setup.model_copy(update={"client": client}))
    assert counts(made)["text"] == (4, 2)
    aside = [(row["reason"], row["stage"]) for row in made["quarantine"] if row["stage"] == "text"]
    assert aside == [("claim_not_in_passage", "text")] * 2


def test_a_rewriting_with_a_question_of_the_exam_is_set_aside(settings, facts, tmp_path):
    exam = tmp_path / "exam.jsonl"
    exam.write_text(json.dumps({"question": "Where is the Heron Pump made?", "answers": ["Quessby"]}) + "\n")
    texts = [(f"Row {number} is about {'rain' * number}.", "document") for number in range(40)]
    asked = "Pumps\n\nWhere is the Heron Pump made?\nQuessby."
    # The text of a document may be a question of the exam; what is written for training may not.
    texts += [(asked, "faq by rule"), (asked + " So it is.", "document")]
    rows = [
        TextRow(text=text, source="s", origin=origin, document=f"{number}.md").record()
        for number, (text, origin) in enumerate(texts)
    ]
    ledger = Ledger()
    ledger.record("text", len(rows), len(rows))
    candidates = DatasetDict(rows=to_dataset(rows, FEATURES["text"]), **ledger.datasets())
    # The split of the rewriting's document is the training split.
    checks = DataConfig(rules=RulesConfig(near_duplicate="off"), split=SplitConfig(test_fraction=0.1))
    assert split_of("40.md", checks.split) == "train"
    made = data.prepare.entrypoint("text", candidates, checks, None, ExamConfig(path=str(exam)), "hash")
    assert [(row["reason"], row["source"]) for row in made["quarantine"]] == [("contaminated", "s")]
    assert sum(len(made[name]) for name in ("train", "validation", "test")) == 41


def test_the_data_report_has_the_tokens_to_train_on_by_what_rows_are(settings, facts, tmp_path, tiny_model):
    rows = [
        TextRow(
            text=f"Row {number} is {'long ' * number}.", source="s", origin=origin, document=f"{number}.md"
        ).record()
        for number, origin in enumerate(["document"] * 40 + ["faq by rule"] * 20 + ["replay"] * 5)
    ]
    ledger = Ledger()
    ledger.record("text", len(rows), len(rows))
    candidates = DatasetDict(rows=to_dataset(rows, FEATURES["text"]), **ledger.datasets())
    checks = DataConfig(rules=RulesConfig(near_duplicate="off"), split=SplitConfig(test_fraction=0.1))
    dataset = data.prepare.entrypoint("text", candidates, checks, None, None, None)
    formatted, report = data.format_rows.entrypoint(
        "cpt", "text", dataset, ModelConfig(name_or_path=str(tiny_model)), FormattingConfig(), False, 3.0
    )
    found = json.loads((report.path / "report.json").read_text())
    trained = found["trained"]
    assert set(trained) == {"documents", "faq", "general"}
    assert sum(one["rows"] for one in trained.values()) == len(formatted["train"])
    tokens = sum(map(len, formatted["train"]["input_ids"]))
    assert sum(one["tokens"] for one in trained.values()) == tokens
    assert (found["epochs"], found["tokens_to_train"], facts["tokens_to_train"]) == (3.0, 3 * tokens, 3 * tokens)
    assert f"{3 * tokens:,} tokens in 3 epochs" in (report.path / "report.html").read_text()
    # What training read of the documents is without general rows.
    assert tokens_read(formatted["train"], dataset["train"], 3.0) == 3 * (tokens - trained["general"]["tokens"])


def test_the_logged_numbers_are_those_of_one_stage(monkeypatch):
    ledger = Ledger()
    for stage, kept in (("document", 2), ("text", 1)):
        left_out = [Quarantined(stage=stage, reason="empty", source="a", place="", detail="")] * (3 - kept)
        ledger.record(stage, 3, kept, left_out)
    monkeypatch.setattr(logging, "collected", {})
    logging.log_rows("texts", ledger, "text")
    assert logging.collected == {"texts": {"read": 3, "rows": 1, "quarantined": 2}}
