"""Text rows of continued pre-training: whole documents, a share of a general dataset, and the checks of both."""

import json
import logging
from collections import Counter

import pytest

from llm_engineering.data.ledger import Ledger
from llm_engineering.data.prepare import prepare
from llm_engineering.data.row_rules import check_row
from llm_engineering.data.rows import InstructionRow, Message, TextRow, split_key, split_of
from llm_engineering.data.storage import rows_dataset
from llm_engineering.documents.document import Document
from llm_engineering.documents.passages import cut_passages
from llm_engineering.documents.texts import check_replay, document_rows, replay_rows, sentence_rows
from llm_engineering.errors import RequestError
from llm_engineering.recipe.data_blocks import DataConfig, DocumentsConfig, ReplayConfig, RulesConfig

CONFIG = DataConfig.model_validate({"split": {"validation_fraction": 0.2, "test_fraction": 0.2}})
FOX = "The quick brown fox jumps over the lazy dog near the old river bank every single morning in May"


def documents(*texts):
    return [Document(id=str(i), source=f"file {i}", title="", text=text) for i, text in enumerate(texts)]


def varied(count):
    """Documents without common words, so that no two are alike."""
    return documents(*(" ".join(f"word{i}x{n}" for n in range(20)) for i in range(count)))


def general(folder, texts, name="general.jsonl"):
    """A dataset of records with a text; a record of another form stays as it is."""
    file = folder / name
    lines = [json.dumps({"text": text}) if isinstance(text, str) else json.dumps(text) for text in texts]
    file.write_text("\n".join(lines) + "\n")
    return str(file)


def prepared(rows, folder, config=CONFIG, rejected=()):
    """`prepare` on rows, after `rejected` records of a general dataset were set aside."""
    ledger = Ledger()
    ledger.record("text", len(rows) + len(rejected), len(rows), rejected)
    dataset = rows_dataset(rows, "text")
    return prepare(dataset, "text", config, ledger, folder), ledger


def test_every_text_is_kept_or_set_aside_with_its_reason(tmp_path):
    """`record` raises if kept + quarantined differs from read."""
    texts = (FOX, "Another text about something else.", FOX, "\u200b \n", FOX + "!")
    rows = [row.model_copy(update={"document": document_on("train")}) for row in document_rows(documents(*texts))]
    replayed, rejected = replay_rows(
        ReplayConfig(
            path=general(tmp_path, [{"body": 1}, "Rain fell.", {"text": " "}, "Wind blew.", "Snow."]), share=0.6
        ),
        [rows[0].model_copy(update={"text": "x" * 12})],
        CONFIG.split,
    )
    assert [row.text for row in replayed] == ["Rain fell.", "Wind blew."]
    result, ledger = prepared([*rows, *replayed], tmp_path, rejected=rejected)
    kept = sum(len(split) for split in result.splits.values())
    assert ledger.read["text"] == kept + sum(ledger.by_reason("text").values()) == 9
    assert ledger.kept["text"] == kept == 4
    assert ledger.by_reason("text") == {"no_text": 2, "exact_duplicate": 1, "empty_answer": 1, "near_duplicate": 1}


def test_the_sentences_of_a_document_are_in_its_split(tmp_path):
    texts = [
        f"The mill number{i}x of Oskby{i} grinds flour{i}. Here Rosa{i} mends winches{i} daily." for i in range(30)
    ]
    config = DocumentsConfig(unit="sentence")
    passages, _ = cut_passages(documents(*texts), config, seed=0)
    rows = sentence_rows(passages)
    assert len(rows) == 60
    assert (rows[0].text, rows[0].source) == (texts[0].partition(". ")[0] + ".", f"file 0:{passages[0].place}")
    result, _ = prepared(rows, tmp_path)
    sides: dict[str, set[str]] = {}
    for name, split in result.splits.items():
        for record in split:
            sides.setdefault(record["document"], set()).add(name)
    assert set.union(*sides.values()) == {"train", "validation", "test"}
    assert all(len(names) == 1 for names in sides.values())


def document_on(side):
    return next(f"d{i}" for i in range(1000) if split_of(f"d{i}", CONFIG.split) == side)


def test_a_document_is_in_the_split_of_its_questions(tmp_path):
    rows = document_rows(varied(40))
    result, _ = prepared(rows, tmp_path)
    assert {name for name, split in result.splits.items() if len(split)} == {"train", "validation", "test"}
    for name, split in result.splits.items():
        for record in split:
            question = InstructionRow(
                prompt=[Message(role="user", content=f"What does {record['source']} say?")],
                completion=[Message(role="assistant", content="It says much.")],
                source=f"{record['source']}, characters 0-20",
                origin="document",
                document=record["source"],
            )
            assert split_of(split_key(question), CONFIG.split) == name


@pytest.mark.parametrize("rule", ["personal_data", "secret"])
def test_private_data_is_masked_in_the_text(rule, tmp_path):
    private = {"personal_data": "jane.doe@company.com", "secret": "ghp_" + "k3Jd8sLq0ZxW9vTn2RbY5mHc7PfGa1EuDi4o"}[rule]
    config = DataConfig.model_validate({**CONFIG.model_dump(), "rules": {rule: "mask"}})
    result, _ = prepared(document_rows(documents(f"Write to {private} for the plans of the bridge.")), tmp_path, config)
    (record,) = [record for split in result.splits.values() for record in split]
    assert private not in record["text"]
    assert record["text"].startswith("Write to ")
    assert record["text"].endswith(" for the plans of the bridge.")
    assert [(finding["rule"], finding["detail"][:7]) for finding in result.findings] == [(rule, "masked:")]


def test_rules_about_answers_do_not_touch_texts():
    """The same words in an answer are a refusal, and are cut off."""
    text = "I'm sorry, but I cannot help with that. As an AI language model, I must say that the passage above is"
    rules = RulesConfig(refusal="drop", truncated_answer="drop", mentions_passage="drop")
    answer = InstructionRow(
        prompt=[Message(role="user", content="Why?")],
        completion=[Message(role="assistant", content=text)],
        source="s",
        origin="document",
    )
    assert check_row(answer, rules).reason == "refusal"
    assert check_row(answer, RulesConfig(refusal="off", truncated_answer="drop")).reason == "truncated_answer"
    checked = check_row(TextRow(text=text, source="s", origin="document"), rules)
    assert (checked.reason, checked.findings) == ("", [])


def test_texts_of_replay_are_only_trained_on(tmp_path):
    texts = [" ".join(f"general{i}x{n}" for n in range(20)) for i in range(60)]
    rows = document_rows(varied(20))
    replayed, _ = replay_rows(ReplayConfig(path=general(tmp_path, texts), share=0.7), rows, CONFIG.split)
    # By their texts some of them would be held out.
    assert {split_of(split_key(row), CONFIG.split) for row in replayed} == {"train", "validation", "test"}
    result, _ = prepared([*rows, *replayed], tmp_path)
    origins = {name: Counter(split["origin"]) for name, split in result.splits.items()}
    assert origins["train"]["replay"] == len(replayed)
    assert set(origins["validation"]) == set(origins["test"]) == {"document"}


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_replay_is_the_share_of_the_characters_that_are_trained_on(share, tmp_path):
    rows = document_rows(varied(60))
    texts = ["Rain fell in the hills."] * 2000
    replayed, _ = replay_rows(ReplayConfig(path=general(tmp_path, texts), share=share), rows, CONFIG.split)
    trained = sum(len(row.text) for row in rows if split_of(split_key(row), CONFIG.split) == "train")
    assert 0 < trained < sum(len(row.text) for row in rows)
    characters = sum(len(row.text) for row in replayed)
    # The last row crosses the share.
    assert (characters - len(texts[0])) / (characters - len(texts[0]) + trained) < share
    assert characters / (characters + trained) >= share


def test_a_general_dataset_that_is_too_short_is_used_whole_with_a_warning(tmp_path, caplog):
    rows = [row.model_copy(update={"document": document_on("train")}) for row in document_rows(documents("x" * 90))]
    config = ReplayConfig(path=general(tmp_path, ["short text"]), share=0.5)
    with caplog.at_level(logging.WARNING):
        replayed, _ = replay_rows(config, rows, CONFIG.split)
    assert [row.text for row in replayed] == ["short text"]
    assert "data.replay has text for a share of 10.0 % only" in caplog.text
    caplog.clear()
    replay_rows(config.model_copy(update={"share": 0.1}), rows, CONFIG.split)
    assert caplog.text == ""


def test_a_dataset_without_a_column_text_is_refused(tmp_path):
    config = ReplayConfig(path=general(tmp_path, [{"body": "Rain fell."}]))
    with pytest.raises(RequestError, match=r"cannot be used: general.jsonl:.*no_text.*columns body.*column `text`"):
        check_replay(config)
    with pytest.raises(RequestError, match="has no row with a column `text`; the first problem: general.jsonl"):
        replay_rows(config, document_rows(varied(3)), CONFIG.split)
    check_replay(ReplayConfig(path=general(tmp_path, ["Rain fell."], "good.jsonl")))
    with pytest.raises(RequestError, match="There is no file"):
        check_replay(ReplayConfig(path=str(tmp_path / "nowhere.jsonl")))


def test_no_model_wrote_a_text_of_replay(tmp_path):
    """The rules with `drop_generated` report the text of replay and do not drop it."""
    config = DataConfig.model_validate({**CONFIG.model_dump(), "rules": {"exact_duplicate": "drop_generated"}})
    replayed = [TextRow(text=FOX, source=str(i), origin="replay") for i in range(2)]
    result, ledger = prepared(replayed, tmp_path, config)
    assert ledger.by_reason("text") == {}
    assert [finding["rule"] for finding in result.findings] == ["exact_duplicate"]
