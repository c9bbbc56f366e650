"""Reads the turns of a conversation and checks them. Every fault has a short name, which the quarantine counts.

If a text holds a whole conversation, this module cuts it into turns at the marks of the template that wrote it. Several
answers to one question become pairs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, Literal

from llm_engineering.data.json_stream import DECODER
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
    value = _from_json(value)
    if isinstance(value, dict) and isinstance(value.get("messages"), list):
        value = value["messages"]
    if isinstance(value, dict):
        value = _turns_of_columns(value) or [value]
    if not isinstance(value, list):
        kind = "text that is not JSON" if isinstance(value, str) else type(value).__name__
        raise BadRowError("malformed", f"`{name}` is {kind}, expected a list of messages")
    if not value:
        raise BadRowError("malformed", f"`{name}` is an empty list")
    return [_message(turn, name) for turn in value]


def read_turns(value: Any, name: str, role: str) -> list[Message]:
    """Read messages, the JSON text of messages, a dialogue of Human and Assistant, or one text as the message of `role`.

    A dialogue may end with the mark of an answer that is in another column.
    """
    if isinstance(value, str) and text_templates(value) == ("text-hh",):
        turns = read_template(value, "text-hh")
        return turns[:-1] if not turns[-1].content else turns
    decoded = _from_json(value)
    if isinstance(value, (list, dict)) or _is_conversation(decoded):
        return read_messages(decoded, name)
    return [_turn(role, read_text(value, name))]


def read_answer(value: dict[str, Any], name: str) -> list[Message]:
    """The turns of a record's answer. After a dialogue that ends with `Assistant:`, the answer begins with a space."""
    answer, prompt = value[name], value.get("prompt")
    if isinstance(answer, str) and isinstance(prompt, str) and text_templates(prompt) == ("text-hh",):
        answer = answer if text_templates(answer) else answer.strip()
    return read_turns(answer, name, "assistant")


def _from_json(value: Any) -> Any:
    """The value of a JSON text; any other value unchanged. CSV and Parquet files often hold a list as its JSON text."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return DECODER.decode(value)
    except (ValueError, RecursionError):
        return value


def _is_conversation(value: Any) -> bool:
    """Whether a JSON value is a list of turns, or holds one under `messages`. An answer may be JSON, too."""
    turns = value.get("messages") if isinstance(value, dict) else value
    return (
        isinstance(turns, list)
        and bool(turns)
        and all(isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in turns)
    )


def read_pairs(value: Any, name: str) -> list[Message]:
    """The turns of LLaMA-Factory's `history`, a list of [question, answer], or messages; empty without a history."""
    value = _from_json(value)
    if _is_empty(value):
        return []
    if isinstance(value, list) and isinstance(value[0], dict):
        return read_messages(value, name)
    if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        raise BadRowError("malformed", f"`{name}` is no list of [question, answer]")
    roles = ("user", "assistant")
    return [_turn(role, read_text(text, name)) for pair in value for role, text in zip(roles, pair, strict=True)]


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
    system = _turn("system", *texts)
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


def _turns_of_columns(value: dict[str, Any]) -> list[dict[str, Any]]:
    # Older versions of `datasets` store a list of turns as one list for each key.
    columns = {key: column for key, column in value.items() if column is not None}
    if not any(keys <= columns.keys() for keys in ({"role", "content"}, {"from", "value"})):
        return []
    if not all(isinstance(column, list) for column in columns.values()) or len(set(map(len, columns.values()))) > 1:
        return []
    return [dict(zip(columns, turn, strict=True)) for turn in zip(*columns.values(), strict=True)]


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
    text = read_text(content, f"{name}.{content_key}")
    weight = _weight(turn, name)
    # Only answers are trained, so other turns may have the weight 0 and no other.
    read = (*_WEIGHTS, *_REASONING) if role == "assistant" else _WEIGHTS if weight == 0 else ()
    check_read(turn, read, f"a {speaker} turn of `{name}`")
    if role != "assistant":
        return _turn(role, text)
    return Message(role=role, content=text, reasoning_content=_reasoning(turn, name), weight=weight)


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
    return [_message({"role": match[1], "content": _stripped(match[2])}, "text") for match in turn.finditer(text)]


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

# Columns that hold several answers to one question. Without scores, those of the first three are in order, the best one
# first, as LLaMA-Factory writes them.
_ORDERED = ("output", "response", "answer")
_SEVERAL = (*_ORDERED, "completion", "outputs", "responses", "answers", "completions")
# Columns of a number for each answer, and keys of it beside an answer, with 1 if more is better and -1 for a rank.
_SCORES = {"scores": 1, "ratings": 1, "rewards": 1, "ranks": -1}
_SCORE = {"score": 1, "overall_score": 1, "rating": 1, "reward": 1, "rank": -1}
_DECODED = {"outputs", "responses", "answers", "completions", *_SCORES}
_TEXT = ("text", "answer", "response", "content", "output", "completion")


def as_pairs(value: dict[str, Any]) -> list[dict[str, Any]]:
    """A record with several answers as one record for each pair; a list of the record itself if it has no such answers.

    The best answer is the chosen one, and each answer with a lower score is once the rejected one. `chosen` and `rejected`
    may also be lists of texts: each text of the one is paired with each of the other.

    Raises:
        BadRowError: `equal_scores`: no answer is worse than another.
    """
    if value.get("chosen") is not None and value.get("rejected") is not None:
        chosen, rejected = _texts(value["chosen"]), _texts(value["rejected"])
        return [{**value, "chosen": one, "rejected": other} for one in chosen for other in rejected]
    # One answer may itself be the JSON text of a list, so only the columns of several answers are decoded.
    value = {name: _from_json(content) if name in _DECODED else content for name, content in value.items()}
    name = next((name for name in _SEVERAL if isinstance(value.get(name), list)), None)
    if name is None:
        return [value]
    scored = _scored(value, name)
    if len(scored) < 2:
        return [value]
    scored.sort(key=lambda answer: -answer[1])
    rest = {key: content for key, content in value.items() if key != name and key not in _SCORES}
    pairs = [
        {**rest, "chosen": scored[0][0], "rejected": answer} for answer, score in scored[1:] if score < scored[0][1]
    ]
    if not pairs:
        raise BadRowError("equal_scores", f"its {len(scored)} answers have the same score, so none is a rejected one")
    return pairs


def _scored(value: dict[str, Any], name: str) -> list[tuple[str, float]]:
    """The answers of a column with their scores, more being better; empty if they are no texts or have no order."""
    answers = value[name]
    if all(isinstance(answer, dict) for answer in answers):
        text, score = (next((k for k in keys if all(k in a for a in answers)), "") for keys in (_TEXT, _SCORE))
        pairs = [(answer.get(text), answer.get(score)) for answer in answers]
        sign = _SCORE.get(score, 1)
    else:
        column = next((column for column in _SCORES if isinstance(value.get(column), list)), "")
        scores = value[column] if column else [-n for n in range(len(answers))] if name in _ORDERED else []
        pairs = list(zip(answers, scores, strict=True)) if len(scores) == len(answers) else []
        sign = _SCORES.get(column, 1)
    if not all(isinstance(text, str) and isinstance(score, int | float) for text, score in pairs):
        return []
    return [(text, sign * score) for text, score in pairs]


def _texts(value: Any) -> list[Any]:
    """The texts of a list of texts; a list of the value itself if it is anything else."""
    is_list = isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)
    return list(value) if is_list else [value]
