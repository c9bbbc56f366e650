"""Prompts with accepted answers, as users write them."""

import pytest

from llm_engineering.data.formats.detection import open_dataset
from llm_engineering.data.formats.known_formats import PROMPT_FORMATS
from llm_engineering.data.load import load_evaluation
from llm_engineering.errors import RequestError
from llm_engineering.recipe.data_blocks import DataConfig
from tests.unit.data.formats.records import SYSTEM, opened, texts_of, turns
from tests.unit.data.written import write

PROMPTS = [
    ("prompt", {"prompt": "Hi", "answer": "5"}, "u:Hi", ["5"]),
    ("prompt", {"prompt": turns("Yo", "What", "Hi"), "answers": ["5", "five"]}, "u:Yo|a:What|u:Hi", ["5", "five"]),
    ("prompt", {"prompt": "Hi", "system": "Be brief"}, "s:Be brief|u:Hi", []),
    ("prompt", {"prompt": "Hi", "history": [["Yo", "What"]], "answer": None}, "u:Yo|a:What|u:Hi", []),
    ("question", {"question": "Hi", "answer": 5}, "u:Hi", ["5"]),
    ("question", {"question": "Hi", "answers": '["5", "five"]'}, "u:Hi", ["5", "five"]),
    ("question", {"question": "Hi", "answer": ["5", 2.5]}, "u:Hi", ["5", "2.5"]),
    ("prompt-messages", {"messages": [SYSTEM, *turns("Hi")], "answers": []}, "s:Be brief|u:Hi", []),
]


@pytest.mark.parametrize(("name", "record", "prompt", "answers"), PROMPTS)
def test_prompt_formats(tmp_path, name, record, prompt, answers):
    found, (row,) = opened(tmp_path, [record], "prompt")
    assert (found, texts_of(row.prompt), row.accepted) == (name, prompt.split("|"), answers)


def test_every_format_of_prompts_has_a_test():
    assert {name for name, *_ in PROMPTS} == set(PROMPT_FORMATS)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "Hi", "answer": "5", "answers": ["5"]}, "malformed"),
        ({"prompt": "Hi", "answer": " "}, "empty_answer"),
        ({"prompt": "Hi", "answer": True}, "not_text"),
        ({"prompt": "Hi", "answers": [["5"]]}, "not_text"),
        ({"prompt": turns("Hi", "Yo")}, "ends_with_answer"),
        ({"prompt": turns("Hi", first="assistant")}, "ends_with_answer"),
        ({"prompt": ""}, "empty_prompt"),
        ({"prompt": "Hi", "images": ["a.png"]}, "media"),
        ({"prompt": "Hi", "label": False}, "label"),
        ({"prompt": None}, "null_value"),
    ],
)
def test_a_prompt_that_cannot_be_read_is_set_aside_by_name(tmp_path, record, reason):
    _, rows = opened(tmp_path, [{"prompt": "Good"}, record], "prompt")
    assert [row.reason for row in rows[1:]] == [reason]


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        ({"prompt": "Hi", "completion": "Yo"}, "instruction"),
        ({"prompt": "Hi", "chosen": "a", "rejected": "b"}, "preference"),
    ],
)
def test_rows_with_an_answer_to_train_on_are_no_prompts(tmp_path, record, kind):
    with pytest.raises(RequestError, match=f"Name it under data.{kind}s"):
        opened(tmp_path, [record], "prompt")


def test_rows_of_prompts_are_detected_after_all_other_formats(tmp_path):
    assert opened(tmp_path, [{"question": "Hi", "answer": "5"}], None)[0] == "question"
    assert opened(tmp_path, [{"prompt": "Hi", "completion": "Yo"}], None)[0] == "prompt-completion"
    assert opened(tmp_path, [{"question": "Hi", "text": "Human: Hi\n\nAssistant: Yo"}], None)[0] == "text-hh"
    assert opened(tmp_path, [{"messages": turns("Hi", "Yo")}], None)[0] == "messages"


def test_a_column_can_be_mapped_to_the_accepted_answer(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"problem": "Hi", "solution": "5"}])
    columns = {"question": "problem", "answer": "solution"}
    (row,) = open_dataset(str(path), "prompt", DataConfig(columns=columns)).rows
    assert row.accepted == ["5"]


def test_all_texts_of_a_benchmark_with_questions_are_compared(tmp_path):
    choice = "a choice of thirteen words that no other column of this file has in it"
    path = write(tmp_path / "rows.jsonl", [{"question": "Hi", "choices": [choice], "answer": "5"}])
    index = load_evaluation([str(path)], 13)
    _, (row,) = opened(tmp_path, [{"prompt": f"Is {choice} right?"}], "prompt", "other.jsonl")
    assert index.match(row)
