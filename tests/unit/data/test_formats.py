"""Formats: each format, each reason for quarantine and each refusal, read from files; kept + quarantined = read."""

import json
import math
from pathlib import Path
from typing import get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_engineering.data.formats import INSTRUCTION_FORMATS, PREFERENCE_FORMATS, open_dataset
from llm_engineering.data.ledger import Ledger, Quarantined
from llm_engineering.data.load import load_rows
from llm_engineering.data.rows import InstructionRow, instruction_dataset, instruction_row, preference_dataset
from llm_engineering.errors import RequestError
from llm_engineering.recipe.data_blocks import DataConfig, FormatName
from tests.unit.data.written import write

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"


def turns(*contents, first="user"):
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def gpt(*contents):
    return [{"from": ["human", "gpt"][i % 2], "value": content} for i, content in enumerate(contents)]


def opened(tmp_path, records, kind="instruction", name="rows.jsonl", **config):
    dataset = open_dataset(str(write(tmp_path / name, records)), kind, DataConfig(**config))
    return dataset.format, list(dataset.rows)


def texts_of(messages):
    return [f"{message.role[0]}:{message.content}" for message in messages]


SYSTEM = {"role": "system", "content": "Be brief"}
ANSWER = {"role": "assistant", "content": "Yo"}
ALPACA_TEXT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\nAdd\n\n### Input:\n1 2\n\n### Response:\n3</s>"
)
CHATML_TEXT = (
    "<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\nCiao<|im_end|>\n"
)
LLAMA3_TEXT = (
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
)
INST_TEXT = "<s>[INST] <<SYS>>\nBe brief\n<</SYS>>\n\nHi [/INST] Hello </s><s>[INST] Bye [/INST] Ciao </s>"

INSTRUCTIONS = [
    ("alpaca", {"instruction": "Add", "input": "1 2", "output": "3"}, "u:Add\n\n1 2", "a:3"),
    ("alpaca", {"instruction": "Add", "input": "", "output": "3", "text": ALPACA_TEXT}, "u:Add", "a:3"),
    ("alpaca", {"instruction": "Add", "input": None, "output": "3", "id": 7}, "u:Add", "a:3"),
    ("alpaca", {"instruction": "", "input": "1 + 2?", "output": "3"}, "u:1 + 2?", "a:3"),
    ("alpaca", {"instruction": "Add", "output": "3", "system": "Be brief"}, "s:Be brief|u:Add", "a:3"),
    ("alpaca", {"instruction": "Add", "input": "\u200b", "output": "3", "system": "\ufeff"}, "u:Add", "a:3"),
    ("alpaca", {"instruction": "Bye", "output": "Ciao", "history": [["Hi", "Yo"]]}, "u:Hi", "a:Yo|u:Bye|a:Ciao"),
    ("alpaca", {"instruction": "Bye", "output": "Ciao", "history": []}, "u:Bye", "a:Ciao"),
    ("alpaca-response", {"instruction": "Add", "response": "3"}, "u:Add", "a:3"),
    ("alpaca-answer", {"instruction": "Add", "answer": "3"}, "u:Add", "a:3"),
    ("dolly", {"instruction": "Add", "context": "1 2", "response": "3", "category": "x"}, "u:Add\n\n1 2", "a:3"),
    ("sharegpt", {"conversations": gpt("Hi", "Hello", "Bye", "Ciao")}, "u:Hi", "a:Hello|u:Bye|a:Ciao"),
    ("sharegpt", {"conversations": gpt("Hi", "Hello"), "system": "Be brief"}, "s:Be brief|u:Hi", "a:Hello"),
    (
        "sharegpt",
        {"conversations": {"from": ["human", "gpt"], "value": ["Hi", "Hello"]}},
        "u:Hi",
        "a:Hello",
    ),
    ("messages", {"messages": [SYSTEM, *turns("Hi", "Hello", "ignored")]}, "s:Be brief|u:Hi", "a:Hello"),
    (
        "messages",
        {
            "messages": turns(
                [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}], [{"type": "text", "text": "!"}]
            )
        },
        "u:Hi",
        "a:!",
    ),
    (
        "messages",
        {"messages": [{"role": "User", "content": "Hi", "tool_calls": None}, {"role": "ASSISTANT ", "content": "Yo"}]},
        "u:Hi",
        "a:Yo",
    ),
    ("messages", {"messages": turns("Hi", "Hello"), "conversations": None}, "u:Hi", "a:Hello"),
    ("prompt-completion", {"prompt": "Hi", "completion": "Hello"}, "u:Hi", "a:Hello"),
    (
        "prompt-completion",
        {"prompt": turns("Hi", "Hello", "Bye"), "completion": turns("Ciao", first="assistant")},
        "u:Hi|a:Hello|u:Bye",
        "a:Ciao",
    ),
    ("text-alpaca", {"text": ALPACA_TEXT}, "u:Add\n\n1 2", "a:3"),
    ("text-alpaca", {"text": "Be kind.\n\n### Instruction:\nAdd\n### Response: 3"}, "s:Be kind.|u:Add", "a:3"),
    (
        "text-human-assistant",
        {"text": "### Human: Hi### Assistant: Hello\n\n### Human: Bye\n### Assistant: Ciao### Human: ?"},
        "u:Hi",
        "a:Hello|u:Bye|a:Ciao",
    ),
    ("text-inst", {"text": INST_TEXT}, "s:Be brief|u:Hi", "a:Hello|u:Bye|a:Ciao"),
    ("text-inst", {"text": "[INST]Hi[/INST]Hello"}, "u:Hi", "a:Hello"),
    (
        "text-hh",
        {"text": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Bye\n\nAssistant: Ciao"},
        "u:Hi",
        "a:Hello|u:Bye|a:Ciao",
    ),
    ("text-chatml", {"text": CHATML_TEXT}, "s:Be brief|u:Hi", "a:Hello|u:Bye|a:Ciao"),
    ("text-chatml", {"text": "<|im_start|>user\nHi<|im_end|><|im_start|>assistant\nHello"}, "u:Hi", "a:Hello"),
    ("text-llama3", {"text": LLAMA3_TEXT}, "u:Hi", "a:Hello"),
    # JSON text in a column
    ("messages", {"messages": json.dumps(turns("Hi", "Hello"))}, "u:Hi", "a:Hello"),
    ("sharegpt", {"conversations": json.dumps(gpt("Hi", "Hello"))}, "u:Hi", "a:Hello"),
    ("messages", {"messages": json.dumps({"messages": turns("Hi", "Hello")})}, "u:Hi", "a:Hello"),
    ("prompt-completion", {"prompt": json.dumps(turns("Hi")), "completion": "[1, 2]"}, "u:Hi", "a:[1, 2]"),
    ("prompt-completion", {"prompt": "Human: Hi\n\nAssistant:", "completion": "Hello"}, "u:Hi", "a:Hello"),
    ("alpaca", {"instruction": "Bye", "output": "Ciao", "history": '[["Hi", "Yo"]]'}, "u:Hi", "a:Yo|u:Bye|a:Ciao"),
    ("alpaca", {"instruction": "Sort", "output": '["a", "b"]'}, "u:Sort", 'a:["a", "b"]'),
]


@pytest.mark.parametrize(("name", "record", "prompt", "completion"), INSTRUCTIONS)
@pytest.mark.parametrize("ending", ["jsonl", "json.gz", "parquet"])
@pytest.mark.parametrize("kind", ["instruction", None])
def test_instruction_formats(tmp_path, name, record, prompt, completion, ending, kind):
    found, rows = opened(tmp_path, [record], kind, f"rows.{ending}")
    assert found == name
    assert texts_of(rows[0].prompt) == prompt.split("|")
    assert texts_of(rows[0].completion) == completion.split("|")


HH = "\n\nHuman: Yo\n\nAssistant: What\n\nHuman: Hi\n\nAssistant:"
PREFERENCES = [
    ("prompt-chosen-rejected", {"prompt": "Hi", "chosen": "Hello", "rejected": "Go away"}, "u:Hi"),
    (
        "prompt-chosen-rejected",
        {"prompt": "Hi", "chosen": "Hello", "rejected": "Go away", "system": "Be brief"},
        "s:Be brief|u:Hi",
    ),
    (
        "prompt-chosen-rejected",
        {
            "prompt": [SYSTEM, *turns("Yo", "What", "Hi")],
            "chosen": turns("Hello", first="assistant"),
            "rejected": turns("Go away", first="assistant"),
        },
        "s:Be brief|u:Yo|a:What|u:Hi",
    ),
    (
        "prompt-chosen-rejected",
        {"prompt": turns("Hi"), "chosen": turns("Hi", "Hello"), "rejected": turns("Hi", "Go away")},
        "u:Hi",
    ),
    (
        "prompt-chosen-rejected",
        {"prompt": "Hi ", "chosen": turns("Hi", "Hello"), "rejected": turns("Hi", "Go away")},
        "u:Hi",
    ),
    ("chosen-rejected", {"chosen": turns("Hi", "Hello"), "rejected": turns("Hi", "Go away"), "prompt": None}, "u:Hi"),
    (
        "chosen-rejected",
        {"chosen": turns("Yo", "What", "Hi", "Hello"), "rejected": turns("Yo", "What", "Hi", "Go away", "left out")},
        "u:Yo|a:What|u:Hi",
    ),
    (
        "sharegpt-preference",
        {
            "conversations": gpt("Yo", "What", "Hi"),
            "chosen": {"from": "gpt", "value": "Hello"},
            "rejected": {"from": "gpt", "value": "Go away"},
        },
        "u:Yo|a:What|u:Hi",
    ),
    (
        "alpaca-preference",
        {"instruction": "Hi", "input": "you", "chosen": "Hello", "rejected": "Go away"},
        "u:Hi\n\nyou",
    ),
    ("alpaca-preference", {"instruction": "Hi", "input": "", "output": ["Hello", "Go away"]}, "u:Hi"),
    ("prompt-chosen-rejected", {"prompt": "Hi", "responses": ["Go away", "Hello"], "scores": [1, 2.5]}, "u:Hi"),
    (
        "prompt-chosen-rejected",
        {"prompt": "Hi", "answers": [{"answer": "Go away", "rank": 2}, {"answer": "Hello", "rank": 1}]},
        "u:Hi",
    ),
    ("chosen-rejected", {"chosen": HH + "Hello", "rejected": HH + "Go away"}, "u:Yo|a:What|u:Hi"),
    ("prompt-chosen-rejected", {"prompt": HH, "chosen": " Hello", "rejected": " Go away"}, "u:Yo|a:What|u:Hi"),
    ("prompt-chosen-rejected", {"prompt": HH, "chosen": HH + "Hello", "rejected": HH + "Go away"}, "u:Yo|a:What|u:Hi"),
    (
        "chosen-rejected",
        {"chosen": json.dumps({"messages": turns("Hi", "Hello")}), "rejected": json.dumps(turns("Hi", "Go away"))},
        "u:Hi",
    ),
    (
        "openai-preference",
        {
            "input": {"messages": turns("Yo", "What", "Hi"), "tools": [], "parallel_tool_calls": True},
            "preferred_output": turns("Hello", first="assistant"),
            "non_preferred_output": turns("Go away", first="assistant"),
        },
        "u:Yo|a:What|u:Hi",
    ),
]


@pytest.mark.parametrize(("name", "record", "prompt"), PREFERENCES)
@pytest.mark.parametrize("ending", ["json", "parquet", "arrow"])
@pytest.mark.parametrize("kind", ["preference", None])
def test_preference_formats(tmp_path, name, record, prompt, ending, kind):
    found, rows = opened(tmp_path, [record], kind, f"rows.{ending}")
    assert found == name
    parts = [texts_of(part) for part in (rows[0].prompt, rows[0].chosen, rows[0].rejected)]
    assert parts == [prompt.split("|"), ["a:Hello"], ["a:Go away"]]


@pytest.mark.parametrize(
    ("record", "pairs"),
    [
        ({"instruction": "Hi", "output": ["A", "B", "C"]}, ["A>B", "A>C"]),
        ({"prompt": "Hi", "responses": ["A", "B", "C", "D"], "scores": [1, 3, 2, 3]}, ["B>C", "B>A"]),
        ({"prompt": "Hi", "responses": '["A", "B"]', "ranks": "[2, 1]"}, ["B>A"]),
        ({"prompt": "Hi", "completions": [{"response": "A", "score": 1}, {"response": "B", "score": 2}]}, ["B>A"]),
        ({"prompt": "Hi", "chosen": ["A"], "rejected": ["B", "C"]}, ["A>B", "A>C"]),
        ({"prompt": "Hi", "chosen": "A", "rejected": ["B"]}, ["A>B"]),
    ],
)
def test_several_answers_become_pairs(tmp_path, record, pairs):
    _, rows = opened(tmp_path, [record], None)
    assert [f"{row.chosen[0].content}>{row.rejected[0].content}" for row in rows] == pairs
    assert len({row.source for row in rows}) == len(pairs)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "Hi", "responses": ["A", "B"], "scores": [1, 1]}, "equal_scores"),
        ({"prompt": "Hi", "responses": ["A", "B"], "scores": [1]}, "malformed"),
        ({"prompt": "Hi", "responses": ["A", "B"]}, "malformed"),
    ],
)
def test_answers_without_an_order_become_no_pairs(tmp_path, record, reason):
    good = {"prompt": "Hi", "chosen": "Hello", "rejected": "Go away"}
    _, rows = opened(tmp_path, [good, record], "preference")
    assert [row.reason for row in rows[1:]] == [reason]


def test_pairs_with_tools_are_set_aside(tmp_path):
    pair = {"preferred_output": "A", "non_preferred_output": "B"}
    messages = {"messages": turns("Hi")}
    _, rows = opened(tmp_path, [{"input": messages | more, **pair} for more in ({}, {"tools": [{"type": "f"}]})], None)
    assert rows[0].chosen[0].content == "A"
    assert rows[1].reason == "tool_call"


def test_every_format_has_a_test_and_a_name_in_the_recipe():
    tested = {name for name, *_ in INSTRUCTIONS} | {name for name, *_ in PREFERENCES}
    assert tested == set(INSTRUCTION_FORMATS) | set(PREFERENCE_FORMATS) == set(get_args(FormatName))


def test_csv_rows(tmp_path):
    name, rows = opened(tmp_path, [{"instruction": "Add", "input": "", "output": "3"}], name="rows.csv")
    assert (name, texts_of(rows[0].completion), rows[0].source) == ("alpaca", ["a:3"], "rows.csv:line 2")


@pytest.mark.parametrize(
    ("record", "reason", "detail"),
    [
        ({"instruction": " ", "output": "3"}, "empty_prompt", ""),
        ({"instruction": "\u200b\ufeff", "input": "\u2060", "output": "3"}, "empty_prompt", ""),
        ({"messages": turns("Hi", "\u200b", "Bye", "Ciao")}, "empty_turn", "turn 2 of 4"),
        (
            {"text": "Note: <|im_start|>user\nHi<|im_end|><|im_start|>assistant\nYo"},
            "malformed",
            "stands outside of its turns",
        ),
        (
            {"text": "Human: Hi\n\nAssistant: Yo\n\nHuman: a\n\nHuman: b\n\nAssistant: c"},
            "wrong_role_order",
            "user → user",
        ),
        ({"messages": "[{'role': 'user'}]"}, "malformed", "text that is not JSON"),
        ({"instruction": "Add", "output": None}, "null_value", "`output` is null"),
        ({"text": None}, "null_value", "`text` is null"),
        ({"messages": None, "conversations": None}, "null_value", ""),
        ({"messages": [{"role": "user", "content": None}]}, "null_value", "messages.content"),
        ({"instruction": "Add", "output": 3}, "not_text", "`output` is int"),
        ({"instruction": True, "output": "3"}, "not_text", "`instruction` is bool"),
        ({"instruction": "Add", "input": ["1"], "output": "3"}, "not_text", "`input` is list"),
        ({"instruction": "Add", "output": "3", "system": 5}, "not_text", "`system` is int"),
        ({"prompt": 1.5, "completion": "x"}, "not_text", "`prompt` is float"),
        ({"text": 4}, "not_text", "`text` is int"),
        ({"messages": turns("Hi", "Hello", first="assistant")}, "wrong_role_order", "assistant"),
        ({"messages": [*turns("Hi", "Yo"), SYSTEM, *turns("Hi", "Yo")]}, "wrong_role_order", "assistant → system"),
        ({"messages": [*turns("Hi"), *turns("Hi", "Yo")]}, "wrong_role_order", "user → user"),
        ({"messages": [SYSTEM, *turns("Hi", "Yo")], "system": "Other"}, "wrong_role_order", "system → system"),
        ({"messages": turns("Hi", " ", "Bye", "Ciao")}, "empty_turn", "turn 2 of 4"),
        ({"messages": turns("Hi", "Yo", "", "Ciao")}, "empty_turn", "turn 3 of 4"),
        ({"messages": turns("Hi", "Yo", "Bye", "")}, "empty_turn", "turn 4 of 4"),
        ({"messages": turns("Hi")}, "no_answer", ""),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "unknown_role", "'narrator'"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "tool_call", ""),
        ({"messages": [*turns("Hi"), {"role": "assistant", "content": None, "tool_calls": [{}]}]}, "tool_call", ""),
        ({"conversations": [*gpt("Hi"), {"from": "function_call", "value": "{}"}]}, "tool_call", ""),
        ({"messages": turns("Hi", [{"type": "image_url", "image_url": "x"}])}, "content_parts", ""),
        ({"messages": turns("Hi", [])}, "content_parts", ""),
        ({"messages": []}, "malformed", "empty list"),
        ({"messages": "Hi"}, "malformed", "`messages` is text that is not JSON"),
        ({"messages": ["Hi"]}, "malformed", "a turn that is str"),
        ({"messages": [{"speaker": "user"}]}, "malformed", "neither `from` nor `role`"),
        ({"messages": [{"role": "user"}]}, "malformed", "without `content`"),
        ({"instruction": "Add", "output": "3", "history": [["Hi"]]}, "malformed", "`history`"),
        ({"text": "### Instruction:\nAdd\n### Input:\n1"}, "wrong_role_order", "Instruction → Input"),
        ({"text": "before [INST] Hi [/INST] Yo"}, "malformed", "text precedes the first pair"),
        ({"text": "[INST] Hi [INST] Yo [/INST]"}, "malformed", "do not come in pairs"),
        ({"text": "### Human: Hi"}, "no_answer", ""),
        ({"text": "no template"}, "malformed", "no known template"),
        ({"other": "x", "keys": "y"}, "malformed", "no instruction format has the columns other, keys"),
        ({}, "malformed", r"\(none\)"),
        ({"instruction": "Add \ud800", "output": "3"}, "not_utf8", ""),
        ({"prompt": "Hi", "completion": "Go away", "label": False}, "label", "`label`"),
        ({"instruction": "Add", "output": "3", "kto_tag": True}, "label", "`kto_tag`"),
        ({"messages": turns("Hi", "Yo"), "images": ["a.png"]}, "media", "`images`"),
        ({"messages": turns("Hi", "Yo"), "tools": [{"type": "function"}]}, "tools", "`tools`"),
        ({"messages": turns("Hi", "Yo"), "functions": '[{"name": "f"}]'}, "tools", "`functions`"),
        ({"messages": turns("Hi", "Yo"), "weight": 0}, "loss_weight", "`weight`"),
        ({"messages": turns("Hi", "Yo"), "history": [["Hi", "Yo"]]}, "history", "`history`"),
        ({"instruction": "Add", "output": "3", "reasoning": "1 + 2"}, "reasoning", "`reasoning`"),
        ({"instruction": "Add", "output": "3", "system": "A", "system_prompt": "B"}, "system", "are different"),
        ({"messages": [*turns("Hi"), {**ANSWER, "weight": 0.5}]}, "loss_weight", "0.5"),
        ({"messages": [*turns("Hi"), {**ANSWER, "train": "no"}]}, "loss_weight", "no"),
        ({"messages": [*turns("Hi"), {**ANSWER, "weight": 0}]}, "no_answer", "weight 0"),
        ({"messages": [{**turns("Hi")[0], "weight": 1}, ANSWER]}, "loss_weight", "a user turn"),
        ({"messages": [{**turns("Hi")[0], "image": "a.png"}, ANSWER]}, "media", "a user turn"),
        ({"messages": [*turns("Hi"), {**ANSWER, "thinking": "a", "reasoning": "b"}]}, "reasoning", "different"),
    ],
)
def test_instruction_rows_that_are_set_aside(tmp_path, record, reason, detail):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"instruction": "Add", "output": "3"}) + "\n\n" + json.dumps(record))
    rows = list(open_dataset(str(file), "instruction", DataConfig()).rows)
    assert isinstance(rows[0], InstructionRow)
    assert (rows[1].stage, rows[1].reason, rows[1].source, rows[1].place) == (
        "instruction",
        reason,
        str(file),
        "line 3",
    )
    assert len(rows) == 2
    assert detail.replace("\\", "") in rows[1].detail


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"chosen": "Hello", "rejected": "Go away"}, "no_prompt"),
        ({"chosen": "Hello", "rejected": "Go away", "question": "Hi"}, "no_prompt"),
        ({"prompt": None, "chosen": "Hello", "rejected": "Go away"}, "no_prompt"),
        ({"prompt": " ", "chosen": "Hello", "rejected": "Go away"}, "empty_prompt"),
        ({"prompt": "Hi", "chosen": "Hello", "rejected": None}, "null_value"),
        ({"prompt": "Hi", "chosen": "Hello", "rejected": 3}, "not_text"),
        ({"chosen": turns("Hi", "Hello"), "rejected": turns("Ho", "Go away")}, "different_prompts"),
        ({"chosen": turns("Hi", "A", "X", "B"), "rejected": turns("Hi", "A", "Y", "B")}, "different_prompts"),
        ({"prompt": "No", "chosen": turns("Hi", "Hello"), "rejected": turns("Hi", "Go away")}, "different_prompts"),
        (
            {"prompt": turns("No"), "chosen": turns("Hi", "Hello"), "rejected": turns("Hi", "Go away")},
            "different_prompts",
        ),
        ({"chosen": turns("Hi"), "rejected": turns("Hi", "Go away")}, "no_answer"),
        ({"chosen": turns("Hi", "", "Bye", "x"), "rejected": turns("Hi", "A", "Bye", "x")}, "empty_turn"),
        ({"prompt": turns("Hi", "A"), "chosen": "Hello", "rejected": "Go away"}, "wrong_role_order"),
        ({"messages": turns("Hi", "Hello")}, "malformed"),
        ({"prompt": "Hi", "chosen": "Hello", "rejected": "Go away", "images": ["a.png"]}, "media"),
        (
            {"prompt": turns("Hi"), "chosen": [{**ANSWER, "weight": 0}, *turns("Hi", "A")], "rejected": "B"},
            "loss_weight",
        ),
        ({"conversations": gpt("Hi"), "chosen": "A", "rejected": "B", "history": [["Hi", "Yo"]]}, "history"),
    ],
)
def test_preference_rows_that_are_set_aside(tmp_path, record, reason):
    good = {"prompt": "Hi", "chosen": "Hello", "rejected": "Go away"}
    _, rows = opened(tmp_path, [good, record], "preference")
    assert not isinstance(rows[0], Quarantined)
    assert [(row.stage, row.reason) for row in rows[1:]] == [("preference", reason)]


@pytest.mark.parametrize(
    ("kind", "record"),
    [
        ("instruction", {"instruction": "Add", "output": ""}),
        ("instruction", {"instruction": "Add", "output": " \n"}),
        ("instruction", {"messages": turns("Hi", "")}),
        ("instruction", {"prompt": turns("Hi", "Yo", "Bye"), "completion": ""}),
        ("preference", {"prompt": "Hi", "chosen": "", "rejected": " "}),
        ("preference", {"prompt": "Hi", "chosen": "Hello", "rejected": "Hello"}),
        ("preference", {"chosen": turns("Hi", "Yo", "Bye", "x"), "rejected": turns("Hi", "Yo", "Bye", "x")}),
    ],
)
def test_empty_and_equal_answers_are_left_to_the_rules(tmp_path, kind, record):
    _, rows = opened(tmp_path, [record], kind)
    assert not isinstance(rows[0], Quarantined)


def test_several_formats_in_one_file(tmp_path):
    alpaca = {"instruction": "Add", "output": "3"}
    name, rows = opened(tmp_path, [{"messages": turns("Hi", "Yo")}, alpaca, alpaca])
    assert name == "alpaca and messages"
    assert [texts_of(row.completion) for row in rows] == [["a:Yo"], ["a:3"], ["a:3"]]
    assert [row.source for row in rows] == ["rows.jsonl:line 1", "rows.jsonl:line 2", "rows.jsonl:line 3"]


def test_the_format_of_each_row_after_the_first_hundred_is_detected(tmp_path):
    alpaca = {"instruction": "Add", "output": "3"}
    late = [{"messages": turns("Hi", "Yo")}, {**alpaca, "response": "4"}, {"other": 1}]
    late.append({"prompt": "Hi", "chosen": "a", "rejected": "b"})
    name, rows = opened(tmp_path, [alpaca] * 100 + late)
    assert name == "alpaca"
    assert texts_of(rows[100].completion) == ["a:Yo"]
    assert [row.reason for row in rows[101:]] == ["malformed"] * 3
    assert "can be read as alpaca or as alpaca-response: name one in data.format" in rows[101].detail


def test_an_answer_of_weight_0_is_read_and_not_trained(tmp_path):
    def rated(name, *ratings):
        contents = [text for number in range(len(ratings)) for text in (f"Q{number}", f"A{number}")]
        asked = [{**turn, name: False} if turn["role"] == "user" else turn for turn in turns(*contents)]
        return [turn if number % 2 == 0 else {**turn, name: ratings[number // 2]} for number, turn in enumerate(asked)]

    columns = {"role": ["user", "assistant"] * 2, "content": ["Q", "A", "Q", "B"], "weight": [None, 0, None, 1]}
    records = [
        {"messages": rated("weight", 0, 1, 0, 1, 0)},
        {"messages": rated("train", True, True)},
        {"prompt": "Hi", "completion": [{**ANSWER, "loss_mask": 0}, *turns("Bye", "Ciao")]},
        {"messages": columns},
    ]
    _, (mixed, plain, completion, turned) = opened(tmp_path, records)
    assert [(m.content, m.weight) for m in mixed.prompt] == [("Q0", None), ("A0", 0), ("Q1", None)]
    assert [(m.content, m.weight) for m in mixed.completion] == [
        ("A1", None),
        ("Q2", None),
        ("A2", 0),
        ("Q3", None),
        ("A3", None),
    ]
    assert texts_of(plain.completion) == ["a:A0", "u:Q1", "a:A1"]
    # A flag that changes nothing does not change the id of the row.
    assert plain.id == opened(tmp_path, [{"messages": turns("Q0", "A0", "Q1", "A1")}])[1][0].id
    assert (texts_of(completion.prompt), texts_of(completion.completion)) == (["u:Hi", "a:Yo", "u:Bye"], ["a:Ciao"])
    assert (texts_of(turned.prompt), texts_of(turned.completion)) == (["u:Q", "a:A", "u:Q"], ["a:B"])
    assert [row.prompt[-1].content for row in mixed.by_answer()] == ["Q1", "Q3"]
    assert instruction_row(instruction_dataset([mixed])[0]) == mixed


def test_system_prompt_history_and_reasoning_are_read(tmp_path):
    row = {"instruction": "Add", "output": "3", "system_prompt": "Be brief", "images": [], "label": None, "tools": "[]"}
    thought = [*turns("Hi"), {**ANSWER, "reasoning_content": "A greeting."}]
    _, (alpaca, thinking, good) = opened(
        tmp_path, [row, {"messages": thought}, {"prompt": "Hi", "completion": "Yo", "label": True}]
    )
    assert texts_of(alpaca.prompt) == ["s:Be brief", "u:Add"]
    assert thinking.completion[0].reasoning_content == "A greeting."
    assert instruction_row(instruction_dataset([thinking])[0]) == thinking
    assert thinking.id != good.id
    pair = {"prompt": "Hi", "chosen": "Yo", "rejected": "No", "history": [["Q", "A"]], "system_prompt": "S"}
    asked = {"instruction": "Hi", "chosen": "Yo", "rejected": "No", "history": turns("Q", "A")}
    _, pairs = opened(tmp_path, [pair, asked], "preference")
    assert [texts_of(pair.prompt) for pair in pairs] == [["s:S", "u:Q", "a:A", "u:Hi"], ["u:Q", "a:A", "u:Hi"]]


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


# Any text that JSON can hold, lone surrogates included.
TEXT = st.text(st.characters(exclude_categories=()), max_size=12)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-(10**400), 10**400) | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
TURN = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant", "system", "tool"]) | JSON,
        "content": TEXT | JSON,
        "from": st.sampled_from(["human", "gpt", "function_call"]) | JSON,
        "value": TEXT | JSON,
        "tool_calls": JSON,
    },
)
MARKS = ["### Instruction:", "### Input:", "### Response:", "### Human:", "### Assistant:", "[INST]", "[/INST]", "\n"]
TEMPLATE = st.lists(st.sampled_from(MARKS) | TEXT, max_size=8).map("".join)
CONTENT = TEXT | st.lists(TURN, max_size=4) | TURN | JSON
NAMES = sorted(set().union(*(f.columns for f in [*INSTRUCTION_FORMATS.values(), *PREFERENCE_FORMATS.values()])))
RECORD = st.dictionaries(
    st.sampled_from([*NAMES, "input", "system", "history", "document", "model"]), CONTENT, max_size=5
)
RECORD = RECORD | st.builds(lambda text: {"text": text}, TEMPLATE) | JSON
ALPACA = {"instruction": "Add", "output": "3"}
PAIR = {"prompt": "Hi", "chosen": "Hello", "rejected": "Go away"}
quick = settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))


def check_all_accounted_for(file, kind, read):
    """Every row is kept or quarantined, and both can be stored."""
    try:
        rows = list(open_dataset(str(file), kind, DataConfig()).rows)
    except RequestError as error:
        str(error).encode()
        return
    assert len(rows) == read
    kept = [row for row in rows if not isinstance(row, Quarantined)]
    make = instruction_dataset if kind == "instruction" else preference_dataset
    assert len(make(kept)) == len(kept)
    for row in rows:
        row.model_dump_json().encode()


@quick
@given(records=st.lists(RECORD, min_size=1, max_size=4), kind=st.sampled_from(["instruction", "preference"]))
@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_any_json_rows(tmp_path, records, kind, ending):
    rows = [ALPACA if kind == "instruction" else PAIR, *records]
    file = tmp_path / f"rows.{ending}"
    file.write_text("\n".join(map(json.dumps, rows)) if ending == "jsonl" else json.dumps(rows))
    check_all_accounted_for(file, kind, len(rows))


@quick
@given(content=st.binary(max_size=60))
@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet", "arrow", "jsonl.gz"])
def test_any_bytes(tmp_path, content, ending):
    file = tmp_path / f"rows.{ending}"
    file.write_bytes(content)
    with pytest.raises(RequestError):
        list(open_dataset(str(file), None, DataConfig()).rows)


@quick
@given(lines=st.lists(st.binary(max_size=20).filter(lambda line: b"\n" not in line), max_size=4))
def test_any_lines_between_good_ones(tmp_path, lines):
    file = tmp_path / "rows.jsonl"
    good = json.dumps(ALPACA).encode()
    file.write_bytes(b"\n".join([good, *lines, good]))
    blank = sum(not line.decode("utf-8", "replace").strip() for line in lines)
    check_all_accounted_for(file, "instruction", len(lines) - blank + 2)


@quick
@given(cells=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4))
def test_any_csv_rows(tmp_path, cells):
    clean = [tuple(cell.encode("utf-8", "replace").decode() for cell in row) for row in cells]
    file = write(tmp_path / "rows.csv", [dict(zip(("instruction", "output"), row, strict=True)) for row in clean])
    check_all_accounted_for(file, "instruction", len(clean))


@quick
@given(
    instructions=st.lists(TEXT.filter(lambda t: t.isascii()) | st.none(), min_size=2, max_size=4),
    numbers=st.lists(st.integers(-(2**63), 2**63 - 1) | st.none(), min_size=4, max_size=4),
    floats=st.lists(st.floats() | st.none(), min_size=4, max_size=4),
)
def test_any_parquet_rows(tmp_path, instructions, numbers, floats):
    count = len(instructions)
    table = pa.table(
        {
            "instruction": pa.array(instructions, pa.string()),
            "output": pa.array(instructions[::-1], pa.string()),
            "score": pa.array(floats[:count], pa.float64()),
            "document": pa.array(numbers[:count], pa.int64()),
        }
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    check_all_accounted_for(tmp_path / "rows.parquet", "instruction", count)


def test_odd_numbers_in_unread_columns_are_harmless(tmp_path):
    extra = {"score": math.nan, "big": 10**400, "nested": {"a": [1, {"b": None}]}}
    _, rows = opened(tmp_path, [{**ALPACA, **extra}], name="rows.json")
    assert texts_of(rows[0].completion) == ["a:3"]
