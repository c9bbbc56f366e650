"""Rows whose meaning a column, a turn or a chat template changes: labels, tools, media, reasoning, control tokens, dates."""

from __future__ import annotations

import datetime
from unittest import mock

import transformers.utils.chat_template_utils
from transformers import PreTrainedTokenizerBase

from llm_engineering.data.rows import InstructionRow, Message
from llm_engineering.formatting.render import render
from llm_engineering.models.tokenizer import set_chat_template
from tests.cases.case import CallCase, Case, DataCase, lines, turns
from tests.tiny_models import tiny_tokenizer

ASKED = turns("Which boat sails first?", "The red one.")
LONG_TALK = turns("Which boat sails first?", "The red one.", "And then?", "The green one.")
SYSTEM = {"role": "system", "content": "You answer for the harbour."}
IMAGE = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": "boat.png"}}]

_TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
_ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
# Writes the mark of thinking only before the last answer, so a longer conversation does not begin with a shorter one.
THINKING = (
    "{% for m in messages %}{% if m.role == 'assistant' and loop.last %}<|im_start|>assistant\n<think></think>"
    "{{ m.content }}<|im_end|>\n{% else %}" + _TURN + "{% endif %}{% endfor %}" + _ASK
)
# Writes the text of a system message into the last question, as Mistral's templates do.
MOVING = (
    "{% set last = messages | selectattr('role', 'equalto', 'user') | list | last %}{% for m in messages %}"
    "{% if m.role == 'user' and m == last and messages[0].role == 'system' and not loop.last %}<|im_start|>user\n"
    "{{ m.content }}<|im_end|>\n{% elif m.role == 'user' and m == last and messages[0].role == 'system' %}<|im_start|>user\n"
    "{{ messages[0].content }} {{ m.content }}<|im_end|>\n{% elif m.role != 'system' %}" + _TURN + "{% endif %}"
    "{% endfor %}" + _ASK
)
RAISING = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('No system message, please') }}{% endif %}"
    + _TURN
    + "{% endfor %}"
    + _ASK
)
DATED = "{{ strftime_now('%d %B %Y') }}\n{% for m in messages %}" + _TURN + "{% endfor %}" + _ASK


def thinking_rows() -> str:
    """A row whose answer has its reasoning beside it."""
    return lines({"messages": [ASKED[0], {**ASKED[1], "reasoning_content": "Red sails at four, green at five."}]})


def row(*contents: str) -> InstructionRow:
    """A conversation of user and assistant that ends with an answer."""
    messages = [Message(role=turn["role"], content=turn["content"]) for turn in turns(*contents)]
    return InstructionRow(prompt=messages[:-1], completion=messages[-1:], source="s", origin="o")


def tokenizer(template: str) -> PreTrainedTokenizerBase:
    """A small tokenizer of ChatML's tokens with a chat template."""
    made = tiny_tokenizer(("<|endoftext|>", "<|im_start|>", "<|im_end|>"), template)
    set_chat_template(made, None)
    return made


def rendered_on_two_days() -> str:
    """Whether the tokens of a row are the same on two days."""
    ids = []
    for day in (3, 4):
        today = mock.Mock(wraps=datetime.datetime)
        today.now.return_value = datetime.datetime(2031, 5, day)
        with mock.patch.object(transformers.utils.chat_template_utils, "datetime", today):
            ids.append(render([row("Who?", "She.")], tokenizer(DATED))[0].input_ids)
    return "the same" if ids[0] == ids[1] else "others"


MEANING: list[Case] = [
    DataCase(
        "answers that were marked as bad",
        "a.jsonl",
        lines(
            {"prompt": "Who?", "completion": "She.", "label": True},
            {"prompt": "When?", "completion": "No.", "label": False},
        ),
        "prompt-completion with labels: 2 read, 2 kept",
        before="prompt-completion: 2 read, 2 kept",
    ),
    DataCase(
        "a tool list that no turn uses",
        "a.jsonl",
        lines(
            {"messages": ASKED, "tools": [{"type": "function", "function": {"name": "tides"}}]},
            {"messages": turns("Who?", "She.")},
        ),
        "messages: 2 read, 1 kept, 1 tools",
        before="messages: 2 read, 2 kept",
    ),
    DataCase(
        "a call of a function",
        "a.jsonl",
        lines(
            {"conversations": [{"from": "human", "value": "Tide?"}, {"from": "function_call", "value": "{}"}]},
            {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "She."}]},
        ),
        "sharegpt: 2 read, 1 kept, 1 tool_call",
    ),
    DataCase(
        "images beside the turns",
        "a.jsonl",
        lines({"messages": ASKED, "images": ["boat.png"]}, {"messages": turns("Who?", "She."), "images": []}),
        "messages: 2 read, 1 kept, 1 media",
        before="messages: 2 read, 2 kept",
    ),
    DataCase(
        "images within a turn",
        "a.jsonl",
        lines(
            {"messages": [{"role": "user", "content": IMAGE}, ASKED[1]]},
            {"messages": [{"role": "user", "content": IMAGE[:1]}, ASKED[1]]},
        ),
        "messages: 2 read, 1 kept, 1 content_parts",
    ),
    DataCase(
        "reasoning that the chat template leaves out",
        "a.jsonl",
        thinking_rows() + lines({"messages": turns("Who?", "She.")}),
        "messages: 2 read, 1 kept, 1 template_drops_text",
        before="messages: 2 read, 2 kept",
    ),
    DataCase(
        "a system prompt in a column of its own",
        "a.jsonl",
        lines({"system_prompt": SYSTEM["content"], "question": "Who?", "response": "She."}),
        "alpaca: 1 read, 1 kept",
        data={"columns": {"instruction": "question", "output": "response"}},
    ),
    DataCase(
        "turns of one side in a row",
        "a.jsonl",
        lines({"messages": [ASKED[0], *ASKED]}, {"messages": ASKED[1:] + ASKED}, {"messages": [*ASKED, ASKED[0]]}),
        "messages: 3 read, 1 kept, 2 wrong_role_order",
    ),
    DataCase(
        "an unknown role",
        "a.jsonl",
        lines({"messages": [{"role": "narrator", "content": "Fog."}, *ASKED]}, {"messages": ASKED}),
        "messages: 2 read, 1 kept, 1 unknown_role",
    ),
    DataCase(
        "a null in a turn and instead of the turns",
        "a.jsonl",
        lines({"messages": [{"role": "user", "content": None}, ASKED[1]]}, {"messages": None}, {"messages": ASKED}),
        "messages: 3 read, 1 kept, 2 null_value",
    ),
    DataCase(
        "answers whose prompt is in an unknown column",
        "a.jsonl",
        lines({"riddle": "Who?", "chosen": "She.", "rejected": "No."}),
        "chosen-rejected: 1 read, 0 kept, 1 no_prompt",
    ),
    DataCase(
        "a document in the row of a question",
        "a.jsonl",
        lines({"query": "Who?", "answer": "She."}),
        "Map other column names with data.columns, e.g.",
        before="Map other column names with data.columns",
    ),
]

TEMPLATES: list[Case] = [
    DataCase(
        "a template that strips thinking from earlier answers",
        "a.jsonl",
        lines({"messages": LONG_TALK}, {"messages": turns("Who?", "She.")}),
        "messages: 2 read, 2 kept",
        before="the run ends: the chat template renders a prompt differently once it is answered",
        template=THINKING,
    ),
    DataCase(
        "a template that moves the system message",
        "a.jsonl",
        lines({"messages": [SYSTEM, *LONG_TALK]}, {"messages": ASKED}),
        "messages: 2 read, 1 kept, 1 template_changes_prompt",
        before="the run ends: the chat template renders a prompt differently once it is answered",
        template=MOVING,
    ),
    DataCase(
        "a template that raises an error",
        "a.jsonl",
        lines({"messages": [SYSTEM, *ASKED]}, {"messages": ASKED}),
        "messages: 2 read, 1 kept, 1 template_error",
        before="the run ends: TemplateError: No system message, please",
        template=RAISING,
    ),
    CallCase(
        "the tokens of a template with today's date, on two days", rendered_on_two_days, "the same", before="others"
    ),
    DataCase(
        "control tokens in a text",
        "a.jsonl",
        lines({"messages": [{"role": "user", "content": "<|im_end|>"}, ASKED[1]]}, {"messages": ASKED}),
        "messages: 2 read, 1 kept, 1 special_token_in_text",
    ),
    DataCase(
        "an answer of 200,000 characters",
        "a.jsonl",
        lines({"instruction": "Go on", "output": "word " * 40_000}, {"instruction": "Who?", "output": "She."}),
        "alpaca: 2 read, 1 kept, 1 over_long",
    ),
    DataCase(
        "prompts that leave no room for their answers",
        "a.jsonl",
        lines({"instruction": "Well? " * 300, "output": "So."}, {"instruction": "Who?", "output": "She."}),
        "alpaca: 2 read, 1 kept, 1 over_long_prompt",
        before="alpaca: 2 read, 1 kept, 1 no_trained_token",
        formatting={"max_length": 64, "over_long": "truncate"},
    ),
]
