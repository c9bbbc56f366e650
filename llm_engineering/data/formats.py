"""Turns the formats that people have into canonical rows.

Read are, for instructions: TRL's `prompt`/`completion`, OpenAI's `messages`, ShareGPT's `conversations`, and Alpaca's
`instruction`/`input`/`output`; for preferences: TRL's `prompt`/`chosen`/`rejected` (text, messages, or whole
conversations with or without `prompt`) and ShareGPT's `conversations` with `chosen` and `rejected`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from llm_engineering.data.files import read_records
from llm_engineering.data.quarantine import Quarantined
from llm_engineering.data.rows import InstructionRow, Message, PreferenceRow
from llm_engineering.errors import RequestError

RowT = TypeVar("RowT", InstructionRow, PreferenceRow)
# A format: its name, the keys that tell it, and what turns a record into a row.
Formats = Sequence[tuple[str, frozenset[str], Callable[..., RowT]]]
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "bard": "assistant", "chatgpt": "assistant"}


class BadRowError(ValueError):
    """A row that cannot be read; `reason` is the short name that quarantine counts by."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(detail or reason)
        self.reason = reason
        self.detail = detail


def read_instructions(path: Path) -> tuple[str, list[InstructionRow], list[Quarantined]]:
    """Read an instruction dataset: the name of its format, its rows, and what was not kept.

    Raises:
        RequestError: the file is missing, empty or in no known format.
    """
    return _read(path, "instruction", _INSTRUCTION_FORMATS)


def read_preferences(path: Path) -> tuple[str, list[PreferenceRow], list[Quarantined]]:
    """Read a preference dataset: the name of its format, its rows, and what was not kept.

    Raises:
        RequestError: the file is missing, empty or in no known format.
    """
    return _read(path, "preference", _PREFERENCE_FORMATS)


def is_preference_file(path: Path) -> bool:
    """Whether the rows of a file have a `chosen` and a `rejected` answer."""
    records, _ = read_records(path, "row")
    return any({"chosen", "rejected"} <= record.value.keys() for record in records)


def _read(path: Path, stage: str, formats: Formats[RowT]) -> tuple[str, list[RowT], list[Quarantined]]:
    records, quarantine = read_records(path, stage)
    rows: list[RowT] = []
    names: dict[str, int] = {}
    for value, place in records:
        match = next(((name, convert) for name, keys, convert in formats if keys <= value.keys()), None)
        try:
            if match is None:
                raise BadRowError(
                    "malformed", f"no {stage} format has the keys {', '.join(map(str, value)) or '(none)'}"
                )
            rows.append(match[1](value, source=f"{path.name}:{place}", origin=_origin(value)))
            names[match[0]] = names.get(match[0], 0) + 1
        except (BadRowError, ValidationError) as error:
            reason, detail = (
                (error.reason, error.detail) if isinstance(error, BadRowError) else ("malformed", _short(error))
            )
            quarantine.append(
                Quarantined(
                    stage=stage, reason=reason, source=str(path), place=place, detail=detail, text=str(value)[:200]
                )
            )
    if records and not names and all(row.reason == "malformed" for row in quarantine):
        known = "; ".join(f"{name}: {', '.join(sorted(keys))}" for name, keys, _ in formats)
        raise RequestError(
            f"{path} is in no known {stage} format: its first row has the keys {', '.join(map(str, records[0].value))}. "
            f"Known are {known}."
        )
    if not records:
        raise RequestError(f"{path} holds no row that can be read; the first problem: {quarantine[0].named()}.")
    return " and ".join(sorted(names, key=lambda name: -names[name])), rows, quarantine


def _short(error: ValidationError) -> str:
    problem = error.errors()[0]
    return f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"


def _origin(value: dict[str, Any]) -> str:
    given = value.get("origin")
    return given if isinstance(given, str) and given else "unknown"


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise BadRowError("malformed", f"`{key}` is {type(value).__name__}, expected text")
    return value


def _messages(value: Any, key: str) -> list[Message]:
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not value:
        raise BadRowError("malformed", f"`{key}` is {type(value).__name__}, expected a list of messages")
    messages = []
    for turn in value:
        if not isinstance(turn, dict):
            raise BadRowError("malformed", f"`{key}` holds a turn that is {type(turn).__name__}, expected an object")
        role, content = (
            (turn.get("from"), turn.get("value")) if "from" in turn else (turn.get("role"), turn.get("content"))
        )
        role = _SHAREGPT_ROLES.get(str(role), role)
        messages.append(Message(role=_text(role, f"{key}.role"), content=_text(content, f"{key}.content")))
    return messages


def _check_order(messages: Sequence[Message]) -> None:
    """User and assistant in turn after an optional system message, the assistant last."""
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    expected = ["user", "assistant"] * (len(turns) // 2)
    if not turns or [message.role for message in turns] != expected:
        raise BadRowError("wrong_role_order", " → ".join(message.role for message in messages))
    if any(not message.content.strip() for message in turns if message.role == "assistant"):
        raise BadRowError("empty_answer")
    if any(not message.content.strip() for message in turns if message.role == "user"):
        raise BadRowError("empty_prompt")


def _instruction(prompt: list[Message], completion: list[Message], source: str, origin: str) -> InstructionRow:
    _check_order([*prompt, *completion])
    return InstructionRow(prompt=prompt, completion=completion, source=source, origin=origin)


def _from_conversation(messages: list[Message], source: str, origin: str) -> InstructionRow:
    first = next((i for i, message in enumerate(messages) if message.role == "assistant"), None)
    if first is None:
        raise BadRowError("empty_answer", "the conversation has no assistant turn")
    # What follows the last answer has no answer of its own, so there is nothing in it to learn.
    last = max(i for i, message in enumerate(messages) if message.role == "assistant")
    return _instruction(messages[:first], messages[first : last + 1], source, origin)


def _alpaca(value: dict[str, Any], source: str, origin: str) -> InstructionRow:
    key = next(key for key in ("output", "response", "answer") if key in value)
    instruction = _text(value["instruction"], "instruction")
    extra = _text(value.get("input") or "", "input")
    prompt = f"{instruction}\n\n{extra}" if extra.strip() else instruction
    answer = Message(role="assistant", content=_text(value[key], key))
    messages = [Message(role="user", content=prompt)]
    if value.get("system"):
        messages.insert(0, Message(role="system", content=_text(value["system"], "system")))
    return _instruction(messages, [answer], source, origin)


def _prompt_completion(value: dict[str, Any], source: str, origin: str) -> InstructionRow:
    return _instruction(
        _one_or_more(value["prompt"], "prompt", "user"),
        _one_or_more(value["completion"], "completion", "assistant"),
        source,
        origin,
    )


def _one_or_more(value: Any, key: str, role: str) -> list[Message]:
    return [Message(role=role, content=value)] if isinstance(value, str) else _messages(value, key)


def _preference(value: dict[str, Any], source: str, origin: str) -> PreferenceRow:
    chosen = _one_or_more(value["chosen"], "chosen", "assistant")
    rejected = _one_or_more(value["rejected"], "rejected", "assistant")
    if "conversations" in value:
        prompt = _messages(value["conversations"], "conversations")
    elif "prompt" in value and value["prompt"] is not None:
        prompt = _one_or_more(value["prompt"], "prompt", "user")
        # Whole conversations that repeat the prompt: only what follows it is the answer.
        if isinstance(value["prompt"], str) and len(chosen) > 1 and len(rejected) > 1:
            prompt = chosen[:-1]
    else:
        prompt = [turn for turn, other in zip(chosen, rejected, strict=False) if turn == other][: len(chosen) - 1]
        if not prompt:
            raise BadRowError("malformed", "without `prompt`, `chosen` and `rejected` must begin with the same turns")
    if len(chosen) > len(prompt) and chosen[: len(prompt)] == prompt:
        chosen = chosen[len(prompt) :]
    if len(rejected) > len(prompt) and rejected[: len(prompt)] == prompt:
        rejected = rejected[len(prompt) :]
    _check_order([*prompt, *chosen])
    _check_order([*prompt, *rejected])
    return PreferenceRow(prompt=prompt, chosen=chosen, rejected=rejected, source=source, origin=origin)


# The first format whose keys a row has is the one it is read as.
_INSTRUCTION_FORMATS: Formats[InstructionRow] = [
    ("prompt-completion", frozenset({"prompt", "completion"}), _prompt_completion),
    (
        "messages",
        frozenset({"messages"}),
        lambda v, **kw: _from_conversation(_messages(v["messages"], "messages"), **kw),
    ),
    (
        "sharegpt",
        frozenset({"conversations"}),
        lambda v, **kw: _from_conversation(_messages(v["conversations"], "conversations"), **kw),
    ),
    ("alpaca", frozenset({"instruction", "output"}), _alpaca),
    ("alpaca (response)", frozenset({"instruction", "response"}), _alpaca),
    ("alpaca (answer)", frozenset({"instruction", "answer"}), _alpaca),
]
_PREFERENCE_FORMATS: Formats[PreferenceRow] = [
    ("sharegpt preference", frozenset({"conversations", "chosen", "rejected"}), _preference),
    ("prompt-chosen-rejected", frozenset({"prompt", "chosen", "rejected"}), _preference),
    ("chosen-rejected", frozenset({"chosen", "rejected"}), _preference),
]
