"""Records that cannot be read are set aside with a reason; weights, system messages, history and reasoning are read."""

import json

import pytest

from llm_engineering.data.formats.detection import open_dataset
from llm_engineering.data.rows import InstructionRow, Quarantined, instruction_row
from llm_engineering.data.storage import rows_dataset
from llm_engineering.recipe.data_blocks import DataConfig
from tests.unit.data.formats.records import ANSWER, SYSTEM, gpt, opened, texts_of, turns


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
    assert instruction_row(rows_dataset([mixed], "instruction")[0]) == mixed


def test_system_prompt_history_and_reasoning_are_read(tmp_path):
    row = {"instruction": "Add", "output": "3", "system_prompt": "Be brief", "images": [], "label": None, "tools": "[]"}
    thought = [*turns("Hi"), {**ANSWER, "reasoning_content": "A greeting."}]
    _, (alpaca, thinking, good) = opened(
        tmp_path, [row, {"messages": thought}, {"prompt": "Hi", "completion": "Yo", "label": True}]
    )
    assert texts_of(alpaca.prompt) == ["s:Be brief", "u:Add"]
    assert thinking.completion[0].reasoning_content == "A greeting."
    assert instruction_row(rows_dataset([thinking], "instruction")[0]) == thinking
    assert thinking.id != good.id
    pair = {"prompt": "Hi", "chosen": "Yo", "rejected": "No", "history": [["Q", "A"]], "system_prompt": "S"}
    asked = {"instruction": "Hi", "chosen": "Yo", "rejected": "No", "history": turns("Q", "A")}
    _, pairs = opened(tmp_path, [pair, asked], "preference")
    assert [texts_of(pair.prompt) for pair in pairs] == [["s:S", "u:Q", "a:A", "u:Hi"], ["u:Q", "a:A", "u:Hi"]]
