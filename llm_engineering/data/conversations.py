"""Reads the turns of a conversation and checks them. Every fault has a short name, which the quarantine counts.

If a text holds a whole conversation, this module cuts it into turns at the marks of the template that wrote it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from llm_engineering.data.rows import Message, is_blank

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
    """A row cannot be read; `reason` is the short name that the quarantine counts."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(detail or reason)
        self.reason = reason
        self.detail = detail


def read_text(value: Any, name: str) -> str:
    """The text of a column or key. Numbers and booleans are refused: how to write them as text is ambiguous.

    Raises:
        BadRowError: `null_value` or `not_text`.
    """
    if isinstance(value, str):
        return value
    if value is None:
        raise BadRowError("null_value", f"`{name}` is null")
    raise BadRowError("not_text", f"`{name}` is {type(value).__name__}, expected text")


def read_messages(value: Any, name: str) -> list[Message]:
    """The turns of ShareGPT (`from`, `value`) or OpenAI (`role`, `content`): a list, or a single turn.

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
    """Read messages, or one text as the message of `role`."""
    if isinstance(value, (list, dict)):
        return read_messages(value, name)
    return [_turn(role, read_text(value, name))]


def read_pairs(value: Any, name: str) -> list[Message]:
    """The turns of LLaMA-Factory's `history`, a list of [question, answer]; empty without a history."""
    if not value:
        return []
    if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        raise BadRowError("malformed", f"`{name}` is no list of [question, answer]")
    roles = ("user", "assistant")
    return [_turn(role, read_text(text, name)) for pair in value for role, text in zip(roles, pair, strict=True)]


def with_system(value: dict[str, Any], messages: list[Message]) -> list[Message]:
    """Put the row's `system` text before the messages, unless they already begin with it."""
    if not value.get("system"):
        return messages
    system = _turn("system", read_text(value["system"], "system"))
    return messages if is_blank(system.content) or messages[:1] == [system] else [system, *messages]


def until_last_answer(messages: list[Message]) -> list[Message]:
    """Cut off the turns after the last assistant turn: they have no answer, so training learns nothing from them.

    Raises:
        BadRowError: `no_answer`: there is no assistant turn.
    """
    for index in range(len(messages) - 1, -1, -1):
        if messages[index].role == "assistant":
            return messages[: index + 1]
    raise BadRowError("no_answer", "it has no assistant turn")


def check_conversation(prompt: Sequence[Message], answer: Sequence[Message]) -> None:
    """Check that user and assistant alternate after an optional system message, and that no turn is empty.

    The last turn must be the assistant's. An empty answer of a single turn passes: the rule `empty_answer` handles it.

    Raises:
        BadRowError: `wrong_role_order`, `empty_prompt` or `empty_turn`.
    """
    messages = [*prompt, *answer]
    start = 1 if messages[0].role == "system" else 0
    roles = [message.role for message in messages]
    if roles[start:] != ["user", "assistant"] * (len(roles[start:]) // 2):
        raise BadRowError("wrong_role_order", " → ".join(roles))
    last = len(messages) - 1
    for index in range(start, len(messages)):
        if not is_blank(messages[index].content):
            continue
        if index == start:
            raise BadRowError("empty_prompt", "the first user turn is empty")
        if index < last or len(answer) > 1:
            raise BadRowError("empty_turn", f"turn {index + 1} of {len(messages)} ({roles[index]}) is empty")


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
    speaker = read_text(turn[role_key], f"{name}.{role_key}")
    folded = speaker.strip().lower()
    role = _ROLES.get(folded)
    if turn.get("tool_calls") or turn.get("function_call") or folded in _TOOL_ROLES:
        raise BadRowError("tool_call", f"`{name}` holds a {speaker} turn that calls or answers a tool")
    if role is None:
        raise BadRowError("unknown_role", f"`{name}` holds a turn of the unknown role {speaker!r}")
    if content_key not in turn:
        raise BadRowError("malformed", f"`{name}` holds a turn without `{content_key}`")
    content = turn[content_key]
    if isinstance(content, list):
        content = _joined(content, name)
    return _turn(role, read_text(content, f"{name}.{content_key}"))


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
# A tokenizer wrote these marks when it rendered the text. If an answer kept them, the model would learn them as words.
_BORDERS = ("<s>", "</s>", "<|endoftext|>")
# This sentence before the first heading belongs to Alpaca's template. Any other text there is a system message.
_ALPACA_PREAMBLE = "Below is an instruction that describes a task"


def text_templates(text: str) -> tuple[str, ...]:
    """The names of the templates whose first mark occurs in the text."""
    return tuple(name for name, mark in _MARKS.items() if mark in text)


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


_MARKS = {"text-alpaca": "### Instruction:", "text-human-assistant": "### Human:", "text-inst": "[INST]"}
_READERS: dict[str, Callable[[str], list[Message]]] = {
    "text-alpaca": _alpaca,
    "text-human-assistant": _human_assistant,
    "text-inst": _inst,
}
