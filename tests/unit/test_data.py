"""Files, formats, validation and splits: kept + quarantined = read, and every reason has its place."""

import json
import random

import pytest
from llm_engineering.data.validate import validate_instructions, validate_preferences

from llm_engineering.config import SplitConfig
from llm_engineering.data.formats import read_instructions, read_preferences
from llm_engineering.data.ledger import Ledger
from llm_engineering.data.quarantine import by_reason
from llm_engineering.data.rows import InstructionRow, Message, PreferenceRow, instruction_dataset, instruction_row
from llm_engineering.data.split import split_of, split_rows
from llm_engineering.errors import RequestError, WorkError


def turns(*contents, first="user"):
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def row(prompt="Q?", answer="A.", source="s", document=""):
    return InstructionRow(
        prompt=[Message(role="user", content=prompt)],
        completion=[Message(role="assistant", content=answer)],
        source=source,
        origin="human",
        document=document,
    )


def pair(chosen, rejected, prompt="Q?"):
    return PreferenceRow(
        prompt=[Message(role="user", content=prompt)],
        chosen=[Message(role="assistant", content=chosen)],
        rejected=[Message(role="assistant", content=rejected)],
        source="s",
        origin="human",
    )


CONVERSATION = [("human", "Hi"), ("gpt", "Hello"), ("human", "Bye"), ("gpt", "Ciao")]
SHAREGPT = [{"from": role, "value": value} for role, value in CONVERSATION]


@pytest.mark.parametrize(
    ("record", "name", "prompt", "completion"),
    [
        ({"instruction": "Add", "input": "1 2", "output": "3"}, "alpaca", ["Add\n\n1 2"], ["3"]),
        ({"instruction": "Add", "input": "", "output": "3"}, "alpaca", ["Add"], ["3"]),
        ({"instruction": "Add", "response": "3"}, "alpaca (response)", ["Add"], ["3"]),
        ({"instruction": "Add", "answer": "3"}, "alpaca (answer)", ["Add"], ["3"]),
        ({"conversations": SHAREGPT}, "sharegpt", ["Hi"], ["Hello", "Bye", "Ciao"]),
        ({"messages": turns("Hi", "Hello")}, "messages", ["Hi"], ["Hello"]),
        ({"prompt": "Hi", "completion": "Hello"}, "prompt-completion", ["Hi"], ["Hello"]),
        (
            {"prompt": turns("Hi", "Hello", "Bye"), "completion": turns("Ciao", first="assistant")},
            "prompt-completion",
            ["Hi", "Hello", "Bye"],
            ["Ciao"],
        ),
    ],
)
def test_instruction_formats(tmp_path, record, name, prompt, completion):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(record))
    found, rows, quarantine = read_instructions(file)
    assert (found, quarantine) == (name, [])
    assert [m.content for m in rows[0].prompt] == prompt
    assert [m.content for m in rows[0].completion] == completion


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Hi", "chosen": "Hello", "rejected": "Go away"},
        {
            "prompt": turns("Hi"),
            "chosen": turns("Hello", first="assistant"),
            "rejected": turns("Go away", first="assistant"),
        },
        {"chosen": turns("Hi", "Hello"), "rejected": turns("Hi", "Go away")},
        {"prompt": "Hi", "chosen": turns("Hi", "Hello"), "rejected": turns("Hi", "Go away")},
        {
            "conversations": [{"from": "human", "value": "Hi"}],
            "chosen": {"from": "gpt", "value": "Hello"},
            "rejected": {"from": "gpt", "value": "Go away"},
        },
    ],
    ids=["strings", "messages", "whole conversations", "prompt and whole conversations", "sharegpt"],
)
def test_preference_formats(tmp_path, record):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([record]))
    _, rows, quarantine = read_preferences(file)
    assert quarantine == []
    contents = [[m.content for m in part] for part in (rows[0].prompt, rows[0].chosen, rows[0].rejected)]
    assert contents == [["Hi"], ["Hello"], ["Go away"]]


def test_broken_lines_are_quarantined_with_their_numbers(tmp_path):
    file = tmp_path / "rows.jsonl"
    good = json.dumps({"instruction": "Add", "output": "3 \u2028 4"}, ensure_ascii=False)
    file.write_text("\n".join([good, '{"instruction": ', good, "[1, 2]", "", good, "nonsense"]), encoding="utf-8")
    _, rows, quarantine = read_instructions(file)
    assert len(rows) == 3
    assert [(q.reason, q.place) for q in quarantine] == [
        ("malformed", "line 2"),
        ("malformed", "line 4"),
        ("malformed", "line 7"),
    ]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"instruction": "Add", "output": " \n"}, "empty_answer"),
        ({"instruction": " ", "output": "3"}, "empty_prompt"),
        ({"instruction": "Add", "output": None}, "malformed"),
        ({"instruction": "Add", "output": 3}, "malformed"),
        ({"messages": turns("Hi", "Hello", first="assistant")}, "wrong_role_order"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "malformed"),
        ({"messages": turns("Hi")}, "empty_answer"),
        ({"messages": []}, "malformed"),
        ({"text": "no known keys"}, "malformed"),
    ],
)
def test_bad_rows_have_a_reason(tmp_path, record, reason):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"instruction": "Add", "output": "3"}) + "\n" + json.dumps(record))
    _, rows, quarantine = read_instructions(file)
    assert len(rows) == 1
    assert [q.reason for q in quarantine] == [reason]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.jsonl", "", "is empty"),
        ("rows.json", "[]", "is empty"),
        ("rows.json", "{", "is not valid JSON"),
        ("rows.json", '{"a": 1}\n{"a": 2}', "name the file .jsonl"),
        ("rows.json", '{"a": [1], "b": [2]}', "2 lists"),
        ("rows.jsonl", '{"a": 1}', "in no known instruction format: its first row has the keys a"),
        ("rows.jsonl", "nonsense", "holds no row that can be read"),
        ("rows.parquet", "x", "in no known format"),
    ],
)
def test_unreadable_files(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(RequestError, match=words):
        read_instructions(tmp_path / name)


def test_missing_file(tmp_path):
    with pytest.raises(RequestError, match="There is no file"):
        read_instructions(tmp_path / "rows.jsonl")


def test_validation_sets_aside_empty_and_repeated_rows():
    text = "The quick brown fox jumps over the lazy dog near the old river bank every single morning in May"
    rows = [row(answer=text, source="1"), row(answer=text, source="2"), row(answer=" "), row(answer=text + "!")]
    kept, quarantine = validate_instructions(rows, 0.8)
    assert [r.source for r in kept] == ["1"]
    assert [q.reason for q in quarantine] == ["exact_duplicate", "empty_answer", "near_duplicate"]
    assert quarantine[0].detail == quarantine[2].detail.replace("of the row at", "first seen at") == "first seen at 1"


def test_validation_of_pairs():
    kept, quarantine = validate_preferences(
        [pair("Yes.", "no"), pair("Yes.", " yes"), pair("", "no"), pair("?", "!")], 0.8
    )
    assert len(kept) == 2
    assert by_reason(quarantine) == {"chosen_equals_rejected": 1, "empty_answer": 1}


def test_split_stays_when_rows_are_added():
    config = SplitConfig(validation_fraction=0.2, test_fraction=0.2)
    rows = [row(prompt=f"Question {i}", document=f"doc {i % 60}") for i in range(600)]
    before = {r.id: name for name, part in split_rows(rows[:300], config, "x", []).items() for r in part}
    after = {r.id: name for name, part in split_rows(rows, config, "x", []).items() for r in part}
    assert before.items() <= after.items()
    sides = {}
    for r in rows:
        sides.setdefault(r.document, set()).add(after[r.id])
    assert all(len(names) == 1 for names in sides.values())


def test_split_shares_are_those_of_the_recipe():
    config = SplitConfig(validation_fraction=0.1, test_fraction=0.2)
    sides = [split_of(str(random.Random(i).random()), config) for i in range(4000)]
    assert sides.count("test") / 4000 == pytest.approx(0.2, abs=0.02)
    assert sides.count("validation") / 4000 == pytest.approx(0.1, abs=0.02)


def test_same_question_in_other_case_falls_on_the_same_side():
    config = SplitConfig(validation_fraction=0.3, test_fraction=0.3)
    rows = [row(prompt=f"What is {i}?") for i in range(30)] + [
        row(prompt=f"WHAT is {i}", answer="B") for i in range(30)
    ]
    parts = split_rows(rows, config, "x", [])
    side = {r.id: name for name, part in parts.items() for r in part}
    assert all(side[rows[i].id] == side[rows[i + 30].id] for i in range(30))


def test_no_row_left_says_why():
    _, quarantine = validate_instructions([row(answer=" "), row(answer="")], 0.8)
    with pytest.raises(WorkError, match="No instruction row is left.*2 empty_answer"):
        split_rows([], SplitConfig(), "instruction", quarantine)


def test_ledger_refuses_rows_that_vanish():
    ledger = Ledger()
    ledger.record("instruction", 3, 3, [])
    with pytest.raises(AssertionError, match="3 rows were there"):
        ledger.record("instruction", 3, 2, [])
    stored = Ledger.load(ledger.datasets())
    assert (stored.read, stored.kept) == (ledger.read, ledger.kept)


def test_rows_survive_the_dataset():
    rows = [row(prompt="Ä 😀\n", answer="x")]
    assert [instruction_row(record) for record in instruction_dataset(rows)] == rows
