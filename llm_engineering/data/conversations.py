"""Reads the turns of a conversation and checks them; every fault has a name, which the quarantine counts by.

A text that holds a whole conversation is first cut into turns by the template that it was written with.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from llm_engineering.data.rows import Message

_ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "system": "system",
    # OpenAI's name for the system message of its reasoning models.
    "developer": "system",
}
_TOOL_ROLES = ("tool", "function", "function_call", "tool_call", "observation", "tool_response", "ipython")


class BadRowError(ValueError):
    """A row that cannot be read; `reason` is the short name that quarantine counts by."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(detail or reason)
        self.reason = reason
        self.detail = detail


def read_text(value: Any, name: str) -> str:
    """The text of a column or key. A number or a truth value is not turned into text: it may mean anything.

    Raises:
        BadRowError: `null_value` or `not_text`.
    """
    if isinstance(value, str):
        return value
    if value is None:
        raise BadRowError("null_value", f"`{name}` is null")
    raise BadRowError("not_text", f"`{name}` is {type(value).__name__}, expected text")


def read_messages(value: Any, name: str) -> list[Message]:
    """The turns of ShareGPT (`from`, `value`) or OpenAI (`role`, `content`); one turn need not stand in a list.

    Raises:
        BadRowError: `null_value`, `malformed`, `tool_call`, `unknown_role`, `not_text` or `content_parts`.
    """
    if value is None:
        raise BadRowError("null_value", f"`{name}` is null")
    if isinstance(value, dict):
        value = _turns_of_columns(value) or [value]
    if not isinstance(value, list):
        raise BadRowError("malformed", f"`{name}` is {type(value).__name__}, expected a list of messages")
    if not value:
        raise BadRowError("malformed", f"`{name}` is an empty list")
    return [_message(turn, name) for turn in value]


def read_turns(value: Any, name: str, role: str) -> list[Message]:
    """Messages, or one text that is the message of a role."""
    if isinstance(value, (list, dict)):
        return read_messages(value, name)
    return [Message(role=role, content=read_text(value, name))]


def read_pairs(value: Any, name: str) -> list[Message]:
    """The turns of LLaMA-Factory's `history`: a list of [question, answer], or nothing."""
    if not value:
        return []
    if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        raise BadRowError("malformed", f"`{name}` is no list of [question, answer]")
    turns = []
    for question, answer in value:
        turns.append(Message(role="user", content=read_text(question, name)))
        turns.append(Message(role="assistant", content=read_text(answer, name)))
    return turns


def with_system(value: dict[str, Any], messages: list[Message]) -> list[Message]:
    """The messages after the row's own `system` text, where it has one that is not among them already."""
    if not value.get("system"):
        return messages
    system = Message(role="system", content=read_text(value["system"], "system"))
    return messages if messages[:1] == [system] else [system, *messages]


def until_last_answer(messages: list[Message]) -> list[Message]:
    """Without what follows the last assistant turn: it has no answer of its own, so there is nothing to learn.

    Raises:
        BadRowError: `no_answer`: there is no assistant turn.
    """
    for index in range(len(messages) - 1, -1, -1):
        if messages[index].role == "assistant":
            return messages[: index + 1]
    raise BadRowError("no_answer", "it has no assistant turn")


def check_conversation(prompt: Sequence[Message], answer: Sequence[Message]) -> None:
    """User and assistant in turn after an optional system message, the assistant last, and no turn without words.

    A lone answer may be empty: the rules of the data decide what happens to it.

    Raises:
        BadRowError: `wrong_role_order`, `empty_prompt` or `empty_turn`.
    """
    messages = [*prompt, *answer]
    start = 1 if messages[0].role == "system" else 0
    expected = "user"
    for message in messages[start:]:
        if message.role != expected:
            raise BadRowError("wrong_role_order", _roles(messages))
        expected = "assistant" if expected == "user" else "user"
    if expected == "assistant":
        raise BadRowError("wrong_role_order", _roles(messages))
    last = len(messages) - 1
    for index in range(start, len(messages)):
        if messages[index].content.strip():
            continue
        if index == start:
            raise BadRowError("empty_prompt", "the first user turn is empty")
        if index < last or len(answer) > 1:
            raise BadRowError("empty_turn", f"turn {index + 1} of {len(messages)} ({messages[index].role}) is empty")


def _roles(messages: Iterable[Message]) -> str:
    return " → ".join(message.role for message in messages)


def _turns_of_columns(value: dict[str, Any]) -> list[dict[str, Any]]:
    # Older versions of `datasets` store a list of turns as one list for each key.
    columns = [key for key in ("role", "content", "from", "value") if isinstance(value.get(key), list)]
    if len(columns) != 2 or len({len(value[key]) for key in columns}) > 1:
        return []
    return [dict(zip(columns, turn, strict=True)) for turn in zip(*(value[key] for key in columns), strict=True)]


def _message(turn: Any, name: str) -> Message:
    if not isinstance(turn, dict):
        raise BadRowError("malformed", f"`{name}` holds a turn that is {type(turn).__name__}, expected an object")
    role_key, content_key = ("from", "value") if turn.get("from") is not None else ("role", "content")
    if role_key not in turn:
        raise BadRowError("malformed", f"`{name}` holds a turn with neither `from` nor `role`")
    said = read_text(turn[role_key], f"{name}.{role_key}")
    role = _ROLES.get(said) or _ROLES.get(said.strip().lower())
    if turn.get("tool_calls") or turn.get("function_call") or (role is None and said.strip().lower() in _TOOL_ROLES):
        raise BadRowError("tool_call", f"`{name}` holds a {said} turn that calls or answers a tool")
    if role is None:
        raise BadRowError("unknown_role", f"`{name}` holds a turn of {said!r}")
    if content_key not in turn:
        raise BadRowError("malformed", f"`{name}` holds a turn without `{content_key}`")
    content = turn[content_key]
    if isinstance(content, list):
        content = _joined(content, name)
    return Message(role=role, content=read_text(content, f"{name}.{content_key}"))


def _joined(parts: list[Any], name: str) -> str:
    texts = [
        part["text"]
        for part in parts
        if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
    ]
    if not texts or len(texts) < len(parts):
        raise BadRowError("content_parts", f"`{name}` holds a turn with parts that are not plain text")
    return "".join(texts)


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
