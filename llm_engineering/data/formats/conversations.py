"""Reads the turns of a conversation and checks them. Every fault has a short name, which the quarantine counts."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal

from llm_engineering.data.reading.json_stream import DECODER
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


# Keys that change what a row or a turn means, and the reason for which a row is set aside that has one which nothing reads.
MEANINGFUL = {
    **dict.fromkeys(("label", "kto_tag"), "label"),
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), "media"),
    **dict.fromkeys(("tools", "functions", "tool_calls", "function_call"), "tools"),
    **dict.fromkeys(("reasoning_content", "reasoning", "thinking"), "reasoning"),
    **dict.fromkeys(("weight", "loss_weight", "loss", "loss_mask", "loss_scale"), "loss_weight"),
    **dict.fromkeys(("train", "training", "train_detail", "mask"), "loss_weight"),
    **dict.fromkeys(("system", "system_prompt", "system_message"), "system"),
    "history": "history",
}
# The keys of a turn that say whether an answer is trained, and those of its reasoning.
_WEIGHTS = ("weight", "loss_weight", "loss", "loss_mask", "train", "training")
_REASONING = ("reasoning_content", "reasoning", "thinking")
# The columns of a row's system message.
SYSTEM = ("system", "system_prompt", "system_message")


class BadRowError(ValueError):
    """A row cannot be read; `reason` is the short name that the quarantine counts."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(detail or reason)
        self.reason = reason
        self.detail = detail


def check_read(value: dict[str, Any], read: Collection[str], where: str) -> None:
    """Check that no key changes the meaning of a row or turn without being read. Empty values mean nothing.

    Args:
        value: the record or the turn.
        read: the keys that are read.

    Raises:
        BadRowError: the reason in `MEANINGFUL`.
    """
    for name, content in value.items():
        if name in MEANINGFUL and name not in read and not _is_empty(content):
            raise BadRowError(
                MEANINGFUL[name], f"{where} has `{name}`, which changes its meaning and cannot be trained on as it says"
            )


def _is_empty(value: Any) -> bool:
    if isinstance(value, str):
        return is_blank(value) or value.strip() in ("[]", "{}", "null")
    return value is None or (isinstance(value, list | dict) and not value)


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
    value = from_json(value)
    if isinstance(value, dict) and isinstance(value.get("messages"), list):
        value = value["messages"]
    if isinstance(value, dict):
        value = _turns_of_columns(value) or [value]
    if not isinstance(value, list):
        kind = "text that is not JSON" if isinstance(value, str) else type(value).__name__
        raise BadRowError("malformed", f"`{name}` is {kind}, expected a list of messages")
    if not value:
        raise BadRowError("malformed", f"`{name}` is an empty list")
    return [read_message(turn, name) for turn in value]


def from_json(value: Any) -> Any:
    """The value of a JSON text; any other value unchanged. CSV and Parquet files often hold a list as its JSON text."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return DECODER.decode(value)
    except (ValueError, RecursionError):
        return value


def read_history(value: Any) -> list[Message]:
    """The turns of LLaMA-Factory's `history`, a list of [question, answer], or messages; empty without a history."""
    value = from_json(value)
    if _is_empty(value):
        return []
    if isinstance(value, list) and isinstance(value[0], dict):
        return read_messages(value, "history")
    if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        raise BadRowError("malformed", "`history` is no list of [question, answer]")
    roles = ("user", "assistant")
    return [
        Message(role=role, content=read_text(text, "history"))
        for pair in value
        for role, text in zip(roles, pair, strict=True)
    ]


def with_system(value: dict[str, Any], messages: list[Message]) -> list[Message]:
    """Put the row's system text before the messages, unless they already begin with it.

    Raises:
        BadRowError: `not_text`, or `system`: two columns have different system messages.
    """
    texts = {read_text(value[name], name): name for name in SYSTEM if not _is_empty(value.get(name))}
    if not texts:
        return messages
    if len(texts) > 1:
        raise BadRowError("system", f"its {' and '.join(map('`{}`'.format, texts.values()))} are different")
    system = Message(role="system", content=next(iter(texts)))
    return messages if messages[:1] == [system] else [system, *messages]


def until_last_answer(messages: list[Message]) -> list[Message]:
    """Cut off the turns after the last answer that is trained, because training learns nothing from them.

    Raises:
        BadRowError: `no_answer`: there is no assistant turn, or all of them have the weight 0.
    """
    for index in range(len(messages) - 1, -1, -1):
        if messages[index].is_trained:
            return messages[: index + 1]
    untrained = any(message.role == "assistant" for message in messages)
    raise BadRowError(
        "no_answer", "all its assistant turns have the weight 0" if untrained else "it has no assistant turn"
    )


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


def read_message(turn: Any, name: str) -> Message:
    """A turn of ShareGPT or OpenAI. `name` is the column that it stands in.

    Raises:
        BadRowError: `malformed`, `tool_call`, `unknown_role`, `not_text`, `content_parts`, or a reason in `MEANINGFUL`.
    """
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
    text = read_text(content, f"{name}.{content_key}")
    weight = _weight(turn, name)
    # Only answers are trained, so other turns may have the weight 0 and no other.
    read = (*_WEIGHTS, *_REASONING) if role == "assistant" else _WEIGHTS if weight == 0 else ()
    check_read(turn, read, f"a {speaker} turn of `{name}`")
    if role != "assistant":
        return Message(role=role, content=text)
    return Message(role=role, content=text, reasoning_content=_reasoning(turn, name), weight=weight)


def _turns_of_columns(value: dict[str, Any]) -> list[dict[str, Any]]:
    # Older versions of `datasets` store a list of turns as one list for each key.
    columns = {key: column for key, column in value.items() if column is not None}
    if not any(keys <= columns.keys() for keys in ({"role", "content"}, {"from", "value"})):
        return []
    if not all(isinstance(column, list) for column in columns.values()) or len(set(map(len, columns.values()))) > 1:
        return []
    return [dict(zip(columns, turn, strict=True)) for turn in zip(*columns.values(), strict=True)]


def _reasoning(turn: dict[str, Any], name: str) -> str | None:
    """What the assistant thought before its answer, if the turn has it beside the answer."""
    texts = {read_text(turn[key], f"{name}.{key}") for key in _REASONING if not _is_empty(turn.get(key))}
    if len(texts) > 1:
        raise BadRowError("reasoning", f"a turn of `{name}` has several keys with different reasoning")
    return next(iter(texts), None)


def _weight(turn: dict[str, Any], name: str) -> Literal[0] | None:
    """0 for an answer that must not be trained. OpenAI writes `weight: 0`, others `train: false` or `loss_mask: 0`."""
    weights = {
        turn[key] if isinstance(turn[key], int | float) else str(turn[key])
        for key in _WEIGHTS
        if not _is_empty(turn.get(key))
    }
    if weights <= {0}:
        return 0 if weights else None
    if weights <= {1}:
        return None
    raise BadRowError(
        "loss_weight", f"a turn of `{name}` has the weight {', '.join(map(str, weights))}; only 0 and 1 can be trained"
    )


def _joined(parts: list[Any], name: str) -> str:
    texts = [
        part["text"]
        for part in parts
        if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
    ]
    if not texts or len(texts) < len(parts):
        raise BadRowError("content_parts", f"`{name}` holds a turn with parts that are not plain text")
    return "".join(texts)
