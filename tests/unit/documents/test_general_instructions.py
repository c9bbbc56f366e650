"""General instruction rows, which are added to the instructions and only trained on."""

import json
from collections import Counter

import pytest

from llm_engineering.data.ledger import Ledger
from llm_engineering.data.load import load_rows
from llm_engineering.data.prepare import prepare
from llm_engineering.data.rows import Quarantined, split_key, split_of
from llm_engineering.data.storage import rows_dataset
from llm_engineering.documents.general_instructions import (
    balanced_instructions,
    check_replayed_instructions,
    replayed_instructions,
)
from llm_engineering.documents.read import HANDBOOK
from llm_engineering.errors import RequestError
from llm_engineering.recipe.data_blocks import DataConfig

CONFIG = DataConfig.model_validate({"split": {"validation_fraction": 0.2, "test_fraction": 0.2}})


def written(file, records):
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


def questions(name, count):
    return [{"instruction": f"What is {name}{i} of {name}x{i}?", "output": f"It is {name}y{i}."} for i in range(count)]


def test_the_embedded_rows_are_general_questions_that_no_exam_asks():
    rows = list(replayed_instructions("embedded:general"))
    assert len(rows) == 500
    assert {row.origin for row in rows} == {"replay"}
    assert rows[0].prompt[0].content == "What is the capital of Portugal?"
    assert rows[0].completion[0].content == "Lisbon"
    asked = {row.prompt[0].content.casefold() for row in rows}
    for exam in ("control.jsonl", "exam.jsonl"):
        lines = (HANDBOOK / exam).read_text().splitlines()
        assert not asked & {json.loads(line)["question"].casefold() for line in lines}


@pytest.mark.parametrize(("questions", "drawn"), [(10, 200), (300, 300), (900, 500)])
def test_there_are_not_many_more_embedded_rows_than_questions(questions, drawn):
    rows = balanced_instructions("embedded:general", questions, seed=1)
    assert len({row.prompt[0].content for row in rows}) == drawn
    assert rows == balanced_instructions("embedded:general", questions, seed=1)


def test_no_embedded_row_is_dropped_or_held_out(tmp_path):
    rows = list(replayed_instructions("embedded:general"))
    assert {split_of(split_key(row), CONFIG.split) for row in rows} == {"train", "validation", "test"}
    ledger = Ledger()
    result = prepare(rows_dataset(rows, "instruction"), "instruction", CONFIG, ledger, tmp_path)
    assert {name: len(split) for name, split in result.splits.items()} == {"train": 500, "validation": 0, "test": 0}


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "What falls?", "output": "Rain."},
        {"messages": [{"role": "user", "content": "What falls?"}, {"role": "assistant", "content": "Rain."}]},
        {"prompt": "What falls?", "completion": "Rain.", "origin": "human"},
    ],
    ids=["alpaca", "messages", "prompt-completion"],
)
def test_rows_of_every_format_have_the_origin_replay(record, tmp_path):
    (row,) = replayed_instructions(written(tmp_path / "general.jsonl", [record]))
    assert (row.prompt[0].content, row.completion[0].content, row.origin) == ("What falls?", "Rain.", "replay")


def test_a_file_that_has_no_instructions_is_refused(tmp_path):
    file = written(tmp_path / "general.jsonl", [{"title": "Rain."}])
    with pytest.raises(RequestError, match="general.jsonl"):
        check_replayed_instructions(file)
    with pytest.raises(RequestError, match="There is no file"):
        check_replayed_instructions(str(tmp_path / "nowhere.jsonl"))
    assert check_replayed_instructions(None) is None
    assert list(replayed_instructions(None)) == []


def test_the_hash_is_of_the_content(tmp_path):
    files = [written(tmp_path / f"{name}.jsonl", questions(name, 1)) for name in ("a", "b")]
    assert len({check_replayed_instructions(file) for file in (*files, "embedded:general")}) == 3


def test_rows_beside_the_users_own_are_only_trained_on_and_accounted_for(tmp_path):
    own = written(tmp_path / "own.jsonl", questions("own", 60))
    general = written(tmp_path / "general.jsonl", [*questions("general", 40), {"instruction": "No answer?"}])
    assert sum(isinstance(row, Quarantined) for row in replayed_instructions(general)) == 1
    ledger = Ledger()
    loaded = load_rows(own, "instruction", CONFIG, tmp_path / "rows.arrow", ledger, more=replayed_instructions(general))
    assert (ledger.read["instruction"], len(loaded.rows)) == (101, 100)
    result = prepare(loaded.rows, "instruction", CONFIG, ledger, tmp_path)
    origins = {name: Counter(split["origin"]) for name, split in result.splits.items()}
    assert origins["train"]["replay"] == 40
    assert set(origins["validation"]) == set(origins["test"]) == {"unknown"}
