"""Validation and splits: kept + quarantined = read, and every reason has its place."""

import random

import pytest

from llm_engineering.config import SplitConfig
from llm_engineering.data.ledger import Ledger
from llm_engineering.data.quarantine import by_reason
from llm_engineering.data.rows import InstructionRow, Message, PreferenceRow, instruction_dataset, instruction_row
from llm_engineering.data.split import split_of, split_rows
from llm_engineering.data.validate import validate_instructions, validate_preferences
from llm_engineering.errors import WorkError


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
