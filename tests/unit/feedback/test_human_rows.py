"""Rows of people: how they are stored, how they join other rows, in which split they end, and how often they count."""

import pytest
from datasets import DatasetDict

from llm_engineering.data.ledger import Ledger
from llm_engineering.data.prepare import prepare
from llm_engineering.data.rows import HUMAN, REPEATED, Message, PreferenceRow, split_key, split_of
from llm_engineering.data.storage import FEATURES, rows_dataset
from llm_engineering.errors import WorkError
from llm_engineering.feedback.decisions import Decision, content_of
from llm_engineering.feedback.human_rows import (
    HumanRow,
    Said,
    facts,
    join,
    read_snapshot,
    repeated,
    take_snapshot,
)
from llm_engineering.recipe.data_blocks import DataConfig, SplitConfig
from tests.tiny_models import instruction, pair

SPLIT = SplitConfig(validation_fraction=0.2, test_fraction=0.3)
CONFIG = DataConfig(split=SPLIT)


def judged(number, split_of_row="train"):
    """A pair that Ada made of the answers to a question."""
    row = pair(number)
    row = row.model_copy(
        update={"origin": HUMAN + "review", "document": split_key(row), "chosen": [turn("This answer is better.")]}
    )
    return HumanRow(row, "Ada", f"2026-01-0{1 + number % 9}", "base over sft", split_of_row == "test")


def drop(row_id):
    return Decision(
        id=row_id, kind="preference", action="drop", reviewer="Bo", reason="wrong", dataset="set 1", time="2026-01-05"
    )


def turn(text):
    return Message(role="assistant", content=text)


def stored(tmp_path, rows, decisions=(), kind="preference"):
    return read_snapshot(take_snapshot(Said(list(rows), list(decisions), []), tmp_path), kind, tmp_path)


def candidates(rows, test=()):
    ledger = Ledger()
    ledger.record("preference", len(rows), len(rows))
    made = {"rows": rows_dataset(rows, "preference")}
    if test:
        ledger.record("preference_test", len(test), len(test))
        made["test_rows"] = rows_dataset(test, "preference")
    return DatasetDict(**made), ledger


def numbers_in(split):
    """Numbers of pairs whose question is in a split."""
    return [number for number in range(60) if split_of(split_key(pair(number)), SPLIT) == split]


def test_a_snapshot_is_named_by_what_was_said(tmp_path):
    one = Said([judged(1)], [], [])
    other = Said([judged(1)], [drop("a")], [])
    assert take_snapshot(one, tmp_path) == take_snapshot(Said([judged(1)], [], []), tmp_path)
    assert take_snapshot(one, tmp_path) != take_snapshot(other, tmp_path)
    read = stored(tmp_path, other.rows, other.decisions)
    assert read["rows"][0]["by"] == "Ada"
    assert read["rows"][0]["id"] == judged(1).row.id
    assert facts(read) == {
        "rows": 1,
        "decisions": {"drop": 1},
        "without_a_row": {},
        "by": {"Ada": 1, "Bo": 1},
        "first": "2026-01-02",
        "last": "2026-01-05",
        "about": {"base over sft": 1, "set 1": 1},
    }
    with pytest.raises(WorkError, match="Start the run again"):
        read_snapshot("none", "preference", tmp_path)


def test_a_persons_row_stays_and_the_generated_row_that_is_like_it_is_dropped(tmp_path):
    number = numbers_in("train")[0]
    same = pair(number).model_copy(update={"chosen": [turn("This answer is better.")], "origin": "model"})
    others = [pair(n) for n in numbers_in("train")[1:4]]
    made, ledger = candidates([same, *others])
    rows = join(made, stored(tmp_path, [judged(number)]), "preference", CONFIG, ledger)
    assert rows["rows"]["origin"] == ["human:review", "model", "o", "o", "o"]
    prepared = prepare(rows["rows"], "preference", CONFIG, ledger, tmp_path)
    assert [o for o in prepared.splits["train"]["origin"] if o != "o"] == ["human:review"]
    assert ledger.by_reason("preference")["exact_duplicate"] == 1
    assert ledger.read["preference"] == 5


def test_a_pair_about_a_held_out_question_is_no_part_of_a_dataset(tmp_path):
    made, ledger = candidates([pair(1)], test=[pair(2)])
    said = [judged(3, "test"), judged(4)]
    rows = join(made, stored(tmp_path, said), "preference", CONFIG, ledger)
    assert rows["rows"]["origin"] == ["human:review", "o"]
    assert rows["test_rows"]["origin"] == ["o"]
    assert ledger.by_reason("preference") == {"held_out_question": 1}
    assert (ledger.read["preference"], ledger.kept["preference"]) == (3, 2)
    # So the model that was judged is not trained again.
    assert Said(said, [], []).hash == Said(said[1:], [], []).hash


def test_a_row_about_a_row_stays_in_its_split(tmp_path):
    numbers = {split: numbers_in(split)[0] for split in ("train", "validation", "test")}
    made, ledger = candidates([pair(n) for n in range(20)])
    human = stored(tmp_path, [judged(number) for number in numbers.values()])
    rows = join(made, human, "preference", CONFIG, ledger)["rows"]
    splits = prepare(rows, "preference", CONFIG, ledger, tmp_path).splits
    assert {name: part["origin"].count("human:review") for name, part in splits.items()} == dict.fromkeys(numbers, 1)


def test_edited_rows_come_first_and_dropped_rows_are_set_aside(tmp_path):
    made, ledger = candidates([pair(1), pair(2), pair(3)])
    content = content_of(judged(3).row)
    edit = Decision(id=pair(3).id, kind="preference", action="edit", reviewer="Ada", content=content)
    rows = join(made, stored(tmp_path, [], [edit, drop(pair(2).id)]), "preference", CONFIG, ledger)["rows"]
    assert rows["id"] == [judged(3).row.id, pair(1).id]
    assert rows["origin"] == ["human:Ada", "o"]
    assert ledger.by_reason("preference") == {"dropped_by_reviewer": 1}
    assert (ledger.read["preference"], ledger.kept["preference"]) == (3, 2)


def test_decisions_on_rows_of_people_are_applied_to_them(tmp_path):
    made, ledger = candidates([pair(3)])
    content = content_of(pair(4))
    edit = Decision(id=judged(2).row.id, kind="preference", action="edit", reviewer="Bo", content=content)
    said = stored(tmp_path, [judged(1), judged(2)], [drop(judged(1).row.id), edit])
    rows = join(made, said, "preference", CONFIG, ledger)["rows"]
    assert list(zip(rows["id"], rows["origin"], strict=True)) == [(pair(4).id, "human:Bo"), (pair(3).id, "o")]
    assert ledger.by_reason("preference") == {"dropped_by_reviewer": 1}
    assert (ledger.read["preference"], ledger.kept["preference"]) == (3, 2)


def test_rows_of_people_alone_need_no_candidates(tmp_path):
    ledger = Ledger()
    rows = join(None, stored(tmp_path, [judged(1), judged(2)]), "preference", CONFIG, ledger)
    assert len(rows["rows"]) == ledger.kept["preference"] == ledger.read["preference"] == 2


def test_the_weight_repeats_only_rows_of_people():
    other = [instruction(n) for n in range(3)]
    own = instruction(3).model_copy(update={"origin": HUMAN + "review"})
    train = rows_dataset([*other, own], "instruction")
    again = repeated(train, "instruction", 3)
    assert again["id"] == [own.id] * 2
    assert set(again["origin"]) == {REPEATED + own.origin}
    assert len(repeated(rows_dataset(other, "instruction"), "instruction", 3)) == 0
    assert again.features == train.features == FEATURES["instruction"]


def test_a_pair_of_people_is_not_dropped_as_generated(tmp_path):
    refused = PreferenceRow(
        prompt=[Message(role="user", content="Where is it?")],
        chosen=[turn("I am sorry, but I cannot help with that.")],
        rejected=[turn("In the house.")],
        source="s",
        origin=HUMAN + "review",
    )
    generated = refused.model_copy(update={"origin": "model", "prompt": [Message(role="user", content="Who is it?")]})
    made, ledger = candidates([refused, generated])
    prepare(made["rows"], "preference", CONFIG, ledger, tmp_path)
    assert ledger.by_reason("preference") == {"refusal": 1}
    assert ledger.kept["preference"] == 1
