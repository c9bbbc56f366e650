"""Decisions of reviewers, and what they do to rows."""

from __future__ import annotations

import pytest

from llm_engineering.data.row_rules import check_row, is_generated
from llm_engineering.data.rows import REPLAY, InstructionRow, Message, PreferenceRow, split_key
from llm_engineering.feedback.decisions import (
    DROPPED,
    Decision,
    apply_decisions,
    content_of,
    current,
    edited_row,
    store,
    stored,
)
from llm_engineering.recipe.data_blocks import RulesConfig


def instruction(question="Why?", answer="Because.", document="guide.md"):
    prompt, completion = [Message(role="user", content=question)], [Message(role="assistant", content=answer)]
    return InstructionRow(prompt=prompt, completion=completion, source="s", origin="smollm2", document=document)


def decide(row, action, reviewer="Ann", new=None, **values):
    content = content_of(new) if new is not None else None
    return Decision(id=row.id, kind="instruction", action=action, reviewer=reviewer, content=content, **values)


def test_every_decision_is_stored_and_the_last_one_counts(tmp_path):
    row, other = instruction(), instruction("When?")
    made = [decide(row, "accept"), decide(other, "drop"), decide(row, "drop", "Bob", reason="wrong")]
    for decision in made:
        store(tmp_path, decision)
    assert stored(tmp_path) == made
    assert current(stored(tmp_path)) == {row.id: made[2], other.id: made[1]}


def test_an_undone_decision_does_not_count():
    row = instruction()
    assert current([decide(row, "drop"), decide(row, "undo")]) == {}


def test_an_accepted_edit_counts_until_the_row_is_decided_on_otherwise():
    row = instruction()
    edit, accept, drop = (
        decide(row, "edit", new=instruction(answer="Better.")),
        decide(row, "accept", "Bob"),
        decide(row, "drop"),
    )
    assert current([edit, accept]) == {row.id: edit}
    assert current([edit, accept, drop, accept]) == {row.id: accept}


def test_rows_are_edited_dropped_and_otherwise_unchanged():
    kept, accepted, dropped, changed = (instruction(name) for name in ("a?", "b?", "c?", "d?"))
    new = instruction("d?", "Better.")
    decisions = current(
        [decide(accepted, "accept"), decide(dropped, "drop", reason="not true"), decide(changed, "edit", new=new)]
    )
    applied = apply_decisions([kept, accepted, dropped, changed], decisions, "instruction")
    assert applied.rows[:2] == [kept, accepted]
    assert applied.rows[2] == new.model_copy(update={"origin": "human:Ann"})
    assert applied.edited == 1
    (record,) = applied.rejected
    assert (record.stage, record.reason, record.detail) == ("instruction", DROPPED, "Ann: not true")
    assert record.place == dropped.id


def test_a_decision_on_an_edited_row_is_applied_to_it():
    first, second = instruction(), instruction(answer="Because of it.")
    edits = [decide(first, "edit", new=second), decide(second, "drop", "Bob")]
    applied = apply_decisions([first], current(edits), "instruction")
    assert (applied.rows, applied.edited) == ([], 0)
    assert applied.rejected[0].detail == "Bob"
    back = [edits[0], decide(second, "edit", "Bob", new=first)]
    assert apply_decisions([first], current(back), "instruction").rows[0].completion == first.completion


@pytest.mark.parametrize("document", ["guide.md", ""])
def test_an_edited_question_stays_in_the_split_of_the_row(document):
    row = instruction(document=document)
    edited = edited_row(row, decide(row, "edit", new=instruction("Why then?")))
    assert edited.prompt[0].content == "Why then?"
    assert split_key(edited) == split_key(row)


def test_an_edited_general_row_is_still_only_trained_on():
    row = instruction(document="").model_copy(update={"origin": REPLAY})
    edited = edited_row(row, decide(row, "edit", new=instruction(answer="Better.", document="")))
    assert (edited.completion[0].content, edited.origin) == ("Better.", REPLAY)


def test_a_decision_on_a_masked_row_is_applied_to_the_unmasked_one():
    row = instruction(answer="Write to ann@company.com about it.")
    rules = RulesConfig(personal_data="mask")
    seen = check_row(row, rules).row
    assert seen.id != row.id
    decisions = current([decide(seen, "drop")])
    assert apply_decisions([row], decisions, "instruction", rules).rows == []
    assert apply_decisions([row], decisions, "instruction").rows == [row]


def test_pairs_are_edited_too():
    asked, good, bad = (
        Message(role=role, content=text) for role, text in zip(("user", "assistant", "assistant"), "abc", strict=True)
    )
    pair = PreferenceRow(prompt=[asked], chosen=[good], rejected=[bad], source="s", origin="m")
    new = pair.model_copy(update={"chosen": [Message(role="assistant", content="better")]})
    (row,) = apply_decisions([pair], current([decide(pair, "edit", new=new)]), "preference").rows
    assert (row.chosen, row.rejected, row.origin) == (new.chosen, [bad], "human:Ann")


def test_a_corrected_row_counts_as_human():
    assert not is_generated(instruction().model_copy(update={"origin": "human:Ann"}))
    assert is_generated(instruction())
