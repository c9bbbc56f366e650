"""Cuts one text that holds a whole conversation back into its turns, by the template it was written with.

`text-alpaca` is Stanford Alpaca's, `text-human-assistant` that of OpenAssistant-Guanaco, `text-inst` that of Llama 2
and Mistral.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from llm_engineering.data.conversations import BadRowError
from llm_engineering.data.rows import Message

_ALPACA = re.compile(r"^### (Instruction|Input|Response):", re.MULTILINE)
_HUMAN_ASSISTANT = re.compile(r"### (Human|Assistant):")
_INST = re.compile(r"\[INST\](.*?)\[/INST\](.*?)(?=\[INST\]|\Z)", re.DOTALL)
_SYSTEM = re.compile(r"\A\s*<<SYS>>(.*?)<</SYS>>", re.DOTALL)
# Written by tokenizers that rendered the text; as part of an answer they would be learned as words.
_BORDERS = ("<s>", "</s>", "<|endoftext|>")
# The sentence before the first heading belongs to Alpaca's template; any other one is a system message.
_ALPACA_PREAMBLE = "Below is an instruction that describes a task"


def text_templates(text: str) -> tuple[str, ...]:
    """The names of the templates whose first mark the text has."""
    return tuple(name for name, mark in _MARKS.items() if mark in text)


def read_template(text: str, name: str) -> list[Message]:
    """The turns of a text, without the template's marks and the space around them.

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
        *([] if not preamble or preamble.startswith(_ALPACA_PREAMBLE) else [_said("system", preamble)]),
        _said("user", "\n\n".join(part for part in prompt if part)),
        _said("assistant", answer),
    ]


def _human_assistant(text: str) -> list[Message]:
    preamble, *parts = _HUMAN_ASSISTANT.split(text)
    roles = ["user" if name == "Human" else "assistant" for name in parts[0::2]]
    system = _stripped(preamble)
    turns = [_said(role, _stripped(content)) for role, content in zip(roles, parts[1::2], strict=True)]
    if not turns:
        raise BadRowError("malformed", "it has no mark of text-human-assistant")
    return [_said("system", system), *turns] if system else turns


def _inst(text: str) -> list[Message]:
    turns: list[Message] = []
    for number, found in enumerate(_INST.finditer(text)):
        user = found[1]
        system = _SYSTEM.match(user) if number == 0 else None
        if system:
            turns.append(_said("system", _stripped(system[1])))
            user = user[system.end() :]
        turns += [_said("user", _stripped(user)), _said("assistant", _stripped(found[2]))]
    before = text.partition("[INST]")[0]
    pairs = sum(turn.role == "user" for turn in turns)
    if not pairs or text.count("[INST]") != pairs or text.count("[/INST]") != pairs or _stripped(before):
        raise BadRowError("malformed", "its [INST] and [/INST] do not come in pairs, or text stands before the first")
    return turns


def _said(role: str, content: str) -> Message:
    return Message(role=role, content=content)


def _stripped(text: str) -> str:
    before = None
    while text != before:
        before = text
        text = text.strip()
        for border in _BORDERS:
            text = text.removeprefix(border).removesuffix(border)
    return text


_MARKS = {"text-alpaca": "### Instruction:", "text-human-assistant": "### Human:", "text-inst": "[INST]"}
_READERS: dict[str, Callable[[str], list[Message]]] = {
    "text-alpaca": _alpaca,
    "text-human-assistant": _human_assistant,
    "text-inst": _inst,
}
