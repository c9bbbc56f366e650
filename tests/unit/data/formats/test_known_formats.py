"""Each format is read from files of several kinds, and its rows have the turns of the record."""

import json
from typing import get_args

import pytest

from llm_engineering.data.formats.known_formats import INSTRUCTION_FORMATS, PREFERENCE_FORMATS, PROMPT_FORMATS
from llm_engineering.recipe.data_blocks import FormatName
from tests.unit.data.formats.records import SYSTEM, gpt, opened, texts_of, turns

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


def test_pairs_with_tools_are_set_aside(tmp_path):
    pair = {"preferred_output": "A", "non_preferred_output": "B"}
    messages = {"messages": turns("Hi")}
    _, rows = opened(tmp_path, [{"input": messages | more, **pair} for more in ({}, {"tools": [{"type": "f"}]})], None)
    assert rows[0].chosen[0].content == "A"
    assert rows[1].reason == "tool_call"


def test_every_format_has_a_test_and_a_name_in_the_recipe():
    tested = {name for name, *_ in INSTRUCTIONS} | {name for name, *_ in PREFERENCES}
    assert tested == set(INSTRUCTION_FORMATS) | set(PREFERENCE_FORMATS)
    assert tested | set(PROMPT_FORMATS) == set(get_args(FormatName))


def test_csv_rows(tmp_path):
    name, rows = opened(tmp_path, [{"instruction": "Add", "input": "", "output": "3"}], name="rows.csv")
    assert (name, texts_of(rows[0].completion), rows[0].source) == ("alpaca", ["a:3"], "rows.csv:line 2")
