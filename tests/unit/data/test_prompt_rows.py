"""Prompts made of instructions, and the rules that check prompts."""

import pytest

from llm_engineering.data.ledger import Ledger
from llm_engineering.data.load import load_evaluation, prompts_of
from llm_engineering.data.prepare import prepare
from llm_engineering.data.row_rules import check_row
from llm_engineering.data.rows import InstructionRow, Message, PromptRow, read_row, split_key, written_as
from llm_engineering.data.storage import rows_dataset
from llm_engineering.recipe.data_blocks import DataConfig, RulesConfig


def asks(text, *accepted, origin="unknown", document=""):
    turns = [Message(role="user", content=text)]
    return PromptRow(prompt=turns, answers=list(accepted), source="s", origin=origin, document=document)


def instruction(number, origin="unknown"):
    turns = [Message(role="assistant", content=f"Room {number}."), Message(role="user", content="Sure?")]
    last = Message(role="assistant", content="Yes.")
    prompt = asks(f"Where is {number}?").prompt
    return InstructionRow(prompt=prompt, completion=[*turns, last], source="s", origin=origin, document=f"{number}.md")


def test_a_row_is_read_back_as_it_was_written():
    row = asks("How many?", "5", "five")
    (record,) = rows_dataset([row], "prompt")
    assert record["answers"] == ["5", "five"]
    assert (read_row(record, "prompt"), record["id"], written_as(row)) == (row, row.id, "prompts")


def test_the_first_answer_of_an_instruction_is_accepted_and_its_split_stays():
    rows = [instruction(1), instruction(2, "replay"), instruction(3)]
    prompts, rejected = prompts_of(rows, "prompt")
    assert [row.accepted for row in prompts] == [["Room 1."], ["Room 3."]]
    assert [split_key(row) for row in prompts] == ["1.md", "3.md"]
    assert [(row.reason, row.stage) for row in rejected] == [("replay", "prompt")]


def prepared(rows, tmp_path, questions=(), **keys):
    ledger = Ledger()
    index = load_evaluation([], 13, questions)
    found = prepare(rows_dataset(rows, "prompt"), "prompt", DataConfig(**keys), ledger, tmp_path, None, index)
    return found, ledger


def test_questions_of_the_exam_are_no_prompts_to_train_on(tmp_path):
    rows = [asks(f"What colour has lamp {number}?", "red") for number in range(40)]
    found, ledger = prepared(rows, tmp_path, [f"What colour has lamp {number}?" for number in range(40)])
    assert len(found.splits["train"]) == 0
    assert ledger.by_reason("prompt")["contaminated"] == 40 - len(found.splits["validation"]) - len(
        found.splits["test"]
    )


def test_prompts_of_one_question_with_other_answers_are_reported(tmp_path):
    found, ledger = prepared(
        [asks("How many?", "5"), asks("How many?", "6")], tmp_path, rules={"near_duplicate": "off"}
    )
    assert [finding["rule"] for finding in found.findings] == ["conflicting_answers"]
    assert ledger.kept["prompt"] == 2


def test_prompts_without_accepted_answers_are_kept(tmp_path):
    found, ledger = prepared([asks("Write a poem."), asks("Name a fish.")], tmp_path)
    assert (ledger.kept["prompt"], sum(map(len, found.splits.values()))) == (2, 2)


@pytest.mark.parametrize("accepted", [("I cannot help with that.",), ("and then it",)])
def test_rules_about_answers_to_train_on_do_not_judge_accepted_ones(accepted):
    assert not check_row(asks("Who?", *accepted, origin="m"), RulesConfig()).reason


def test_private_data_of_accepted_answers_is_masked():
    checked = check_row(asks("Whose?", "Ann", "ann.bell@tollow.org"), RulesConfig(personal_data="mask"))
    assert checked.row.accepted[0] == "Ann"
    assert "@" not in checked.row.accepted[1]
