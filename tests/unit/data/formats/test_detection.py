"""The format of a dataset is detected, mapped or refused, and its rows are read on demand."""

import json
from pathlib import Path

import pytest

from llm_engineering.data.formats.detection import open_dataset
from llm_engineering.data.ledger import Ledger
from llm_engineering.data.load import load_rows
from llm_engineering.data.rows import InstructionRow, Quarantined
from llm_engineering.errors import RequestError
from llm_engineering.recipe.data_blocks import DataConfig
from tests.unit.data.formats.records import gpt, opened, texts_of, turns
from tests.unit.data.written import write

SHARED = Path(__file__).resolve().parents[5] / "shared" / "data"


def test_several_formats_in_one_file(tmp_path):
    alpaca = {"instruction": "Add", "output": "3"}
    name, rows = opened(tmp_path, [{"messages": turns("Hi", "Yo")}, alpaca, alpaca])
    assert name == "alpaca and messages"
    assert [texts_of(row.completion) for row in rows] == [["a:Yo"], ["a:3"], ["a:3"]]
    assert [row.source for row in rows] == ["rows.jsonl:line 1", "rows.jsonl:line 2", "rows.jsonl:line 3"]


def test_rows_are_the_same_wherever_their_file_is(tmp_path):
    (tmp_path / "moved").mkdir()
    records = [{"instruction": "Add", "output": "3"}, {"instruction": "Add", "output": "4", "document": "sums"}]
    assert opened(tmp_path, records) == opened(tmp_path / "moved", records)


def test_the_format_of_each_row_after_the_first_hundred_is_detected(tmp_path):
    alpaca = {"instruction": "Add", "output": "3"}
    late = [{"messages": turns("Hi", "Yo")}, {**alpaca, "response": "4"}, {"other": 1}]
    late.append({"prompt": "Hi", "chosen": "a", "rejected": "b"})
    name, rows = opened(tmp_path, [alpaca] * 100 + late)
    assert name == "alpaca"
    assert texts_of(rows[100].completion) == ["a:Yo"]
    assert [row.reason for row in rows[101:]] == ["malformed"] * 3
    assert "can be read as alpaca or as alpaca-response: name one in data.format" in rows[101].detail


def test_columns_that_nothing_reads_are_named(tmp_path):
    records = [
        {"instruction": "Add", "output": "3", "source": "x"},
        {"instruction": "Add", "output": "4", "score": 1},
    ]
    dataset = open_dataset(str(write(tmp_path / "rows.jsonl", records)), None, DataConfig())
    assert len(list(dataset.rows)) == 2
    assert dataset.unread == ["source", "score"]
    ledger = Ledger()
    loaded = load_rows(str(tmp_path / "rows.jsonl"), None, DataConfig(), tmp_path / "rows.arrow", ledger)
    assert len(loaded.rows) == 2
    assert Ledger.load(ledger.datasets()).unread == {"instruction": dataset.unread}


def test_origin_and_document(tmp_path):
    row = {"instruction": "Add", "output": "3"}
    extra = [
        {},
        {"origin": "human", "model": "m"},
        {"model": "m", "document": "d"},
        {"generator": "g", "document": 7},
        {"origin": 3, "document": []},
    ]
    _, rows = opened(tmp_path, [{**row, **keys} for keys in extra])
    assert [(r.origin, r.document) for r in rows] == [
        ("unknown", ""),
        ("human", ""),
        ("m", "d"),
        ("g", "7"),
        ("unknown", ""),
    ]


@pytest.mark.parametrize(
    ("kind", "record", "words"),
    [
        ("instruction", {"messages": turns("Hi", "Yo"), "conversations": gpt("Hi", "Yo")}, "messages or as sharegpt"),
        ("instruction", {"instruction": "A", "output": "b", "response": "c"}, "alpaca or as alpaca-response"),
        (None, {"prompt": "A", "completion": "b", "instruction": "A", "output": "b"}, "alpaca or as prompt-completion"),
        (None, {"instruction": "A", "output": "b", "prompt": "A", "chosen": "b", "rejected": "c"}, "alpaca or as"),
        ("instruction", {"text": "### Human: [INST] Hi [/INST] x"}, "text-human-assistant or as text-inst"),
    ],
)
def test_a_record_that_fits_two_formats_is_refused(tmp_path, kind, record, words):
    with pytest.raises(RequestError, match=rf"rows.jsonl \(line 1\) can be read as .*{words}.*data.format="):
        opened(tmp_path, [record], kind)


def test_both_kinds_in_one_file_are_refused(tmp_path):
    records = [{"instruction": "A", "output": "b"}, {"prompt": "Hi", "chosen": "a", "rejected": "b"}]
    with pytest.raises(RequestError, match="can be read as alpaca or as prompt-chosen-rejected"):
        opened(tmp_path, records, None)


def test_data_format_decides_between_two_formats(tmp_path):
    record = {"instruction": "A", "output": "b", "response": "c"}
    name, rows = opened(tmp_path, [record, {"instruction": "A", "output": "b"}], format="alpaca-response")
    assert (name, texts_of(rows[0].completion)) == ("alpaca-response", ["a:c"])
    assert (rows[1].reason, rows[1].detail) == ("malformed", "`response` is missing, and alpaca-response needs it")
    pair = {"prompt": "Hi", "chosen": turns("Hi", "a"), "rejected": turns("Hi", "b"), "messages": turns("Hi", "a")}
    assert opened(tmp_path, [pair], None, format="messages")[0] == "messages"
    assert opened(tmp_path, [pair], None, format="chosen-rejected")[0] == "chosen-rejected"
    assert opened(tmp_path, [pair], "instruction")[0] == "messages"
    assert opened(tmp_path, [pair], "preference")[0] == "prompt-chosen-rejected"
    # The format of the recipe's other dataset.
    assert opened(tmp_path, [pair], "preference", format="messages")[0] == "prompt-chosen-rejected"


def test_columns_are_mapped(tmp_path):
    record = {"question_text": "Add", "reply": "3", "answer": "other", "written_by": "Ada", "page": "p"}
    columns = {"instruction": "question_text", "output": "reply", "origin": "written_by", "document": "page"}
    # `chosen` belongs to the recipe's preference dataset alone.
    name, rows = opened(
        tmp_path, [record], columns={**columns, "answer": "reply", "chosen": "x"} | {"output": "reply"}, format="alpaca"
    )
    assert (name, texts_of(rows[0].prompt), texts_of(rows[0].completion)) == ("alpaca", ["u:Add"], ["a:3"])
    assert (rows[0].origin, rows[0].document) == ("Ada", "p")


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"instruction": "question"}, "maps instruction to question, .* no such column: they have instruction, output"),
        ({"instuction": "question"}, "maps instuction, which is no standard column.*conversations, document"),
    ],
)
def test_an_absent_column_or_an_unknown_name_is_refused(tmp_path, columns, words):
    with pytest.raises(RequestError, match=words):
        opened(tmp_path, [{"instruction": "A", "output": "b"}], columns=columns)


@pytest.mark.parametrize(
    ("content", "kind", "config", "words"),
    [
        ("", None, {}, "is empty: there is no row in it"),
        ("\n \n", None, {}, "is empty"),
        ("nonsense", None, {}, "holds no row that can be read; the first problem: .*line 1: malformed"),
        (
            '{"a": 1}',
            "instruction",
            {},
            "in no known instruction format: its first row has the columns a. Known formats are",
        ),
        ('{"a": 1}', None, {}, "in no known format: .*chosen-rejected: chosen, rejected"),
        ('{"text": "x"}', "instruction", {}, "A `text` must follow the template of its format"),
        (
            '{"conversations": [], "chosen": {}, "rejected": {}}',
            "instruction",
            {},
            r"it holds preference rows \(sharegpt-preference\). Name it under data.preferences",
        ),
        ('{"messages": []}', "preference", {}, r"instruction rows \(messages\). Name it under data.instructions"),
        (
            '{"instruction": "A", "output": "b"}',
            None,
            {"format": "messages"},
            "data.format asks for: messages has the columns messages, its first row has instruction, output",
        ),
    ],
)
def test_refused_datasets(tmp_path, content, kind, config, words):
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(RequestError, match=words):
        open_dataset(str(tmp_path / "rows.jsonl"), kind, DataConfig(**config))


def test_an_empty_list(tmp_path):
    (tmp_path / "rows.json").write_text("[]")
    with pytest.raises(RequestError, match="is empty"):
        open_dataset(str(tmp_path / "rows.json"), None, DataConfig())


def test_an_unknown_format_is_refused_with_the_list():
    with pytest.raises(ValueError, match="'alpaca', 'alpaca-response'"):
        DataConfig(format="alpacca")


def test_rows_are_read_on_demand(tmp_path):
    """Damage at the end of a file is raised when the iterator reaches it, not earlier."""
    rows = json.dumps([{"instruction": "Add", "output": "x" * 2000}] * 3000)
    (tmp_path / "rows.json").write_text(rows[:-1] + "nonsense")
    dataset = open_dataset(str(tmp_path / "rows.json"), None, DataConfig())
    assert isinstance(next(dataset.rows), InstructionRow)
    with pytest.raises(RequestError, match=r"after \[2999\]"):
        list(dataset.rows)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the data of other projects is not beside this checkout")
@pytest.mark.parametrize(
    ("name", "kind", "format_name", "count"),
    [
        ("alpaca_en_demo.json", "instruction", "alpaca", 999),
        ("dpo_en_demo.json", "preference", "sharegpt-preference", 299),
    ],
)
def test_real_files(name, kind, format_name, count):
    dataset = open_dataset(str(SHARED / name), None, DataConfig())
    rows = list(dataset.rows)
    assert (dataset.kind, dataset.format, len(rows)) == (kind, format_name, count)
    assert not any(isinstance(row, Quarantined) for row in rows)
