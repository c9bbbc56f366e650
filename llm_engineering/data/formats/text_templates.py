"""Cuts a text that holds a whole conversation into turns, at the marks of the template that wrote it."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

from llm_engineering.data.formats.conversations import BadRowError, read_message
from llm_engineering.data.rows import Message

_ALPACA = re.compile(r"^### (Instruction|Input|Response):", re.MULTILINE)
_HUMAN_ASSISTANT = re.compile(r"### (Human|Assistant):")
_INST = re.compile(r"\[INST\](.*?)\[/INST\](.*?)(?=\[INST\]|\Z)", re.DOTALL)
_SYSTEM = re.compile(r"\A\s*<<SYS>>(.*?)<</SYS>>", re.DOTALL)
# A tokenizer wrote these marks when it rendered the text. If an answer kept them, the model would learn them as words.
_BORDERS = ("<s>", "</s>", "<|endoftext|>", "<|begin_of_text|>", "<|end_of_text|>")
# Anthropic's HH-RLHF writes dialogues so.
_HH = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_CHATML_TURN = re.compile(r"<\|im_start\|>(\w+)\n(.*?)(?:<\|im_end\|>|\Z)", re.DOTALL)
_LLAMA3_TURN = re.compile(r"<\|start_header_id\|>(\w+)<\|end_header_id\|>(.*?)(?:<\|eot_id\|>|\Z)", re.DOTALL)
# This sentence before the first heading belongs to Alpaca's template. Any other text there is a system message.
_ALPACA_PREAMBLE = "Below is an instruction that describes a task"


def text_templates(text: str) -> tuple[str, ...]:
    """The names of the templates whose first mark occurs in the text."""
    return tuple(name for name, mark in _MARKS.items() if mark.search(text))


def read_template(text: str, name: str) -> list[Message]:
    """Cut a text into turns, without the template's marks and the white space around them.

    Raises:
        BadRowError: `malformed` or `wrong_role_order`: the text does not follow the template.
    """
    return _READERS[name](text)


def _alpaca(text: str) -> list[Message]:
    preamble, *parts = _ALPACA.split(text)
    names = parts[0::2]
    if names not in (["Instruction", "Response"], ["Instruction", "Input", "Response"]):
        raise BadRowError("wrong_role_order", " → ".join(names) or "it has no heading of text-alpaca")
    *prompt, answer = map(_stripped, parts[1::2])
    preamble = _stripped(preamble)
    return [
        *([] if not preamble or preamble.startswith(_ALPACA_PREAMBLE) else [_turn("system", preamble)]),
        _turn("user", "\n\n".join(part for part in prompt if part)),
        _turn("assistant", answer),
    ]


def _human_assistant(text: str) -> list[Message]:
    preamble, *parts = _HUMAN_ASSISTANT.split(text)
    roles = ["user" if name == "Human" else "assistant" for name in parts[0::2]]
    system = _stripped(preamble)
    turns = [_turn(role, _stripped(content)) for role, content in zip(roles, parts[1::2], strict=True)]
    if not turns:
        raise BadRowError("malformed", "it has no mark of text-human-assistant")
    return [_turn("system", system), *turns] if system else turns


def _inst(text: str) -> list[Message]:
    turns: list[Message] = []
    for number, match in enumerate(_INST.finditer(text)):
        user = match[1]
        system = _SYSTEM.match(user) if number == 0 else None
        if system:
            turns.append(_turn("system", _stripped(system[1])))
            user = user[system.end() :]
        turns += [_turn("user", _stripped(user)), _turn("assistant", _stripped(match[2]))]
    before = text.partition("[INST]")[0]
    pairs = sum(turn.role == "user" for turn in turns)
    if not pairs or text.count("[INST]") != pairs or text.count("[/INST]") != pairs or _stripped(before):
        raise BadRowError("malformed", "its [INST] and [/INST] do not come in pairs, or text precedes the first pair")
    return turns


def _turn(role: str, content: str) -> Message:
    return Message(role=role, content=content)


def _stripped(text: str) -> str:
    before = None
    while text != before:
        before = text
        text = text.strip()
        for border in _BORDERS:
            text = text.removeprefix(border).removesuffix(border)
    return text


def _dialogue(text: str) -> list[Message]:
    preamble, *parts = _HH.split(text)
    turns = [
        _turn("user" if name == "Human" else "assistant", _stripped(content))
        for name, content in zip(parts[0::2], parts[1::2], strict=True)
    ]
    if not turns or _stripped(preamble):
        raise BadRowError("malformed", "it does not begin with `Human:`")
    return turns


def _marked(text: str, turn: re.Pattern[str]) -> list[Message]:
    """The turns between marks that name the role of each."""
    between = turn.sub("", text)
    if _stripped(between):
        raise BadRowError("malformed", f"text stands outside of its turns: {_stripped(between)[:40]!r}")
    return [read_message({"role": match[1], "content": _stripped(match[2])}, "text") for match in turn.finditer(text)]


_MARKS = {
    "text-alpaca": re.compile(r"### Instruction:"),
    "text-human-assistant": re.compile(r"### Human:"),
    "text-inst": re.compile(r"\[INST\]"),
    "text-hh": re.compile(r"\A\s*Human:.*?\n\nAssistant:", re.DOTALL),
    "text-chatml": re.compile(r"<\|im_start\|>"),
    "text-llama3": re.compile(r"<\|start_header_id\|>"),
}
_READERS: dict[str, Callable[[str], list[Message]]] = {
    "text-alpaca": _alpaca,
    "text-human-assistant": _human_assistant,
    "text-inst": _inst,
    "text-hh": _dialogue,
    "text-chatml": partial(_marked, turn=_CHATML_TURN),
    "text-llama3": partial(_marked, turn=_LLAMA3_TURN),
}
# The formats of texts that hold a whole conversation.
TEXT_FORMATS = tuple(_READERS)
