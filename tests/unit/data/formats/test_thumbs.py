"""Rows that judge an answer: their labels, and the checks that look at them."""

import json

import pytest

from llm_engineering.data.formats.detection import open_dataset
from llm_engineering.data.ledger import Ledger
from llm_engineering.data.prepare import prepare
from llm_engineering.data.rows import LabelledRow, Message, PreferenceRow, Quarantined, read_row, split_key
from llm_engineering.data.storage import rows_dataset
from llm_engineering.errors import RequestError
from llm_engineering.recipe.data_blocks import DataConfig
from tests.unit.data.formats.records import opened, texts_of, turns
from tests.unit.data.written import write

FOX = "The quick brown fox jumps over the lazy dog near the old river bank every single morning in May"


def judged(answer="It is there.", label=True, prompt="Where is it?", source="s", origin="human", document=""):
    return LabelledRow(
        prompt=[Message(role="user", content=prompt)],
        completion=[Message(role="assistant", content=answer)],
        label=label,
        source=source,
        origin=origin,
        document=document,
    )


def prepared(folder, rows, **rules):
    """The sources of the rows that are kept, the reasons of the others, and the findings."""
    config = DataConfig.model_validate({"rules": {"language_outlier": "off", **rules}})
    ledger = Ledger()
    candidates = rows_dataset(rows, "labelled")
    made = prepare(candidates, "labelled", config, ledger, folder, inspected=True)
    kept = [record["source"] for record in made.splits["train"]]
    assert ledger.read["labelled"] == len(rows) == len(kept) + sum(ledger.by_reason("labelled").values())
    return kept, ledger.by_reason("labelled"), {(found["source"], found["rule"]) for found in made.findings}


@pytest.mark.parametrize(
    "label", [True, 1, 1.0, "true", "True", "1", "+1", "up", "thumbs_up", "Thumbs up", "👍", "👍🏽", "good"]
)
def test_a_good_label(label, tmp_path):
    _, (row,) = opened(tmp_path, [{"prompt": "Hi", "completion": "Yo", "label": label}], "labelled")
    assert isinstance(row, LabelledRow)
    assert row.label is True


@pytest.mark.parametrize("label", [False, 0, "false", "0", "-1", "down", "thumbs_down", "👎", "Dislike", "undesirable"])
def test_a_bad_label(label, tmp_path):
    _, (row,) = opened(tmp_path, [{"instruction": "Hi", "output": "Yo", "kto_tag": label}], "labelled")
    assert row.label is False


@pytest.mark.parametrize("label", [None, 2, 4.5, -1, "", "maybe", [True], {"up": 1}])
def test_a_row_without_a_usable_label_is_set_aside(label, tmp_path):
    good = {"prompt": "Hi", "completion": "Yo", "label": True}
    _, rows = opened(tmp_path, [good, {**good, "label": label}], "labelled")
    assert [row.reason for row in rows if isinstance(row, Quarantined)] == ["no_label"]


def test_a_file_without_labels_is_refused_before_it_is_read(tmp_path):
    with pytest.raises(RequestError, match="no column `label` in its first rows.*data.columns.label=NAME"):
        opened(tmp_path, [{"prompt": "Hi", "completion": "Yo"}], "labelled")
    _, (row,) = opened(
        tmp_path, [{"prompt": "Hi", "completion": "Yo", "thumb": 0}], "labelled", columns={"label": "thumb"}
    )
    assert row.label is False


def test_the_label_of_a_conversation_is_that_of_its_last_answer(tmp_path):
    talk, whole = (
        turns("Q1", "A1", "Q2", "A2"),
        {"prompt": turns("Q1"), "completion": turns("A1", "Q2", "A2", first="a")},
    )
    _, (row,) = opened(tmp_path, [{"messages": talk, "label": True}], "labelled", "talk.jsonl")
    assert texts_of(row.prompt) == ["u:Q1", "a:A1", "u:Q2"]
    assert texts_of(row.completion) == ["a:A2"]
    _, (row,) = opened(tmp_path, [{**whole, "label": False}], "labelled", "whole.jsonl")
    assert texts_of(row.completion) == ["a:A1", "u:Q2", "a:A2"]


def test_labels_make_a_file_labelled_and_other_kinds_refuse_bad_answers(tmp_path):
    records = [
        {"prompt": "Hi", "completion": "Yo", "label": True},
        {"prompt": "Bye", "completion": "No", "label": False},
    ]
    dataset = open_dataset(str(write(tmp_path / "rows.jsonl", records)), None, DataConfig())
    assert (dataset.kind, dataset.format) == ("labelled", "prompt-completion with labels")
    assert [row.label for row in dataset.rows] == [True, False]
    assert dataset.unread == []
    _, (good, bad) = opened(tmp_path, records, "instruction")
    assert type(good).__name__ == "InstructionRow"
    assert bad.reason == "label"
    stars = [{**record, "label": 5} for record in records]
    assert open_dataset(str(write(tmp_path / "stars.jsonl", stars)), None, DataConfig()).kind == "instruction"


def test_a_pair_becomes_a_good_and_a_bad_answer_of_one_split():
    pair = PreferenceRow.model_validate({
        "prompt": turns("Where?"), "chosen": turns("There.", first="a"), "rejected": turns("Who knows.", first="a"),
        "source": "s", "origin": "m",
    })  # fmt: skip
    good, bad = pair.labelled()
    assert [(row.completion[0].content, row.label) for row in (good, bad)] == [("There.", True), ("Who knows.", False)]
    assert split_key(good) == split_key(bad) == split_key(pair)
    assert (bad.source, bad.origin) == ("s", "m")
    assert read_row(json.loads(json.dumps(bad.record())), "labelled") == bad
    same = bad.model_copy(update={"label": True})
    assert same.id != bad.id


def test_only_rows_with_the_same_label_are_duplicates(tmp_path):
    rows = [
        judged(FOX, True, source="1"),
        judged(FOX + ".", True, source="2"),
        judged(FOX + "!", False, source="3"),
        judged(FOX + "!", False, source="4"),
    ]
    kept, reasons, findings = prepared(tmp_path, rows)
    assert kept == ["1", "3"]
    assert reasons == {"near_duplicate": 1, "exact_duplicate": 1}
    assert findings == {("3", "conflicting_answers")}


def test_different_answers_to_one_question_do_not_conflict(tmp_path):
    rows = [
        judged("There.", True, source="1"),
        judged("Here, I think.", True, source="2"),
        judged("No.", False, source="3"),
    ]
    kept, _, findings = prepared(tmp_path, rows, conflicting_answers="drop")
    assert kept == ["1", "2", "3"]
    assert not findings


def test_a_bad_answer_may_refuse_or_break_off_and_may_not_be_empty(tmp_path):
    refusal, broken = "I'm sorry, but I cannot help with that.", "The reason for this is that the"
    rows = [
        judged(answer, label, prompt=f"{answer} {label}?", source=f"{place}{label}", origin="model")
        for place, answer in (("refusal", refusal), ("broken", broken), ("empty", " "))
        for label in (True, False)
    ]
    kept, reasons, _ = prepared(tmp_path, rows, refusal="drop", truncated_answer="drop", near_duplicate="off")
    assert kept == ["refusalFalse", "brokenFalse"]
    assert reasons == {"refusal": 1, "truncated_answer": 1, "empty_answer": 2}
