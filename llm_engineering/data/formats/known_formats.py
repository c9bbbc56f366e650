"""The known formats of datasets: the columns that identify each, and how it reads a record."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from llm_engineering.data.formats.conversations import (
    SYSTEM,
    BadRowError,
    check_conversation,
    from_json,
    read_history,
    read_messages,
    read_text,
    until_last_answer,
    with_system,
)
from llm_engineering.data.formats.text_templates import TEXT_FORMATS, read_template, text_templates
from llm_engineering.data.rows import Message, is_blank, same_text

# The first of these columns with a text says who wrote the answer.
ORIGINS = ("origin", "model", "generator")
# Reads the messages of a record: `prompt` and `completion`, or `prompt`, `chosen` and `rejected`; each answer begins with
# an assistant turn. Or reads a `prompt` and the texts of its accepted `answers`.
Reader = Callable[[dict[str, Any]], dict[str, Any]]


class Format(NamedTuple):
    """A format.

    Attributes:
        columns: the columns that identify it.
        read: reads a record with these columns.
        also: other columns that `read` uses, beside the system message.
    """

    columns: frozenset[str]
    read: Reader
    also: frozenset[str] = frozenset()

    @property
    def reads(self) -> frozenset[str]:
        """All columns that a row is made of."""
        return self.columns | self.also | _COMMON


# Every format reads these columns. `label` is only read where it says that the answer is a good one.
_COMMON = frozenset({*SYSTEM, "document", *ORIGINS})


def _alpaca_question(value: dict[str, Any], context: str = "input") -> Message:
    """The user turn: `instruction` and, if it is present, the column `context`."""
    instruction = read_text(value["instruction"], "instruction")
    if value.get(context) is None:
        return Message(role="user", content=instruction)
    extra = read_text(value[context], context)
    # With an empty `instruction` the question is in `input` alone, and must not begin with two empty lines.
    parts = [part for part in (instruction, extra) if not is_blank(part)]
    return Message(role="user", content="\n\n".join(parts) if parts else instruction)


def _alpaca(answer: str, context: str = "input") -> Reader:
    def read(value: dict[str, Any]) -> dict[str, list[Message]]:
        turns = [
            *_asked(value, [_alpaca_question(value, context)]),
            Message(role="assistant", content=read_text(value[answer], answer)),
        ]
        return _conversation(value, turns)

    return read


def _messages(name: str) -> Reader:
    return lambda value: _conversation(value, read_messages(value[name], name))


def _template(name: str) -> Reader:
    return lambda value: _conversation(value, read_template(read_text(value["text"], "text"), name))


def _prompt_completion(value: dict[str, Any]) -> dict[str, list[Message]]:
    prompt = with_system(value, _asked(value, _read_turns(value["prompt"], "prompt", "user")))
    return _divided(prompt, until_last_answer(_read_answer(value, "completion")))


def _read_turns(value: Any, name: str, role: str) -> list[Message]:
    """Read messages, the JSON text of messages, a dialogue of Human and Assistant, or one text as the message of `role`.

    A dialogue may end with the mark of an answer that is in another column.
    """
    if isinstance(value, str) and text_templates(value) == ("text-hh",):
        turns = read_template(value, "text-hh")
        return turns[:-1] if not turns[-1].content else turns
    decoded = from_json(value)
    if isinstance(value, (list, dict)) or _is_conversation(decoded):
        return read_messages(decoded, name)
    return [Message(role=role, content=read_text(value, name))]


def _read_answer(value: dict[str, Any], name: str) -> list[Message]:
    """The turns of a record's answer. After a dialogue that ends with `Assistant:`, the answer begins with a space."""
    answer, prompt = value[name], value.get("prompt")
    if isinstance(answer, str) and isinstance(prompt, str) and text_templates(prompt) == ("text-hh",):
        answer = answer if text_templates(answer) else answer.strip()
    return _read_turns(answer, name, "assistant")


def _is_conversation(value: Any) -> bool:
    """Whether a JSON value is a list of turns, or holds one under `messages`. An answer may be JSON, too."""
    turns = value.get("messages") if isinstance(value, dict) else value
    return (
        isinstance(turns, list)
        and bool(turns)
        and all(isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in turns)
    )


def _conversation(value: dict[str, Any], messages: list[Message]) -> dict[str, list[Message]]:
    return _divided([], until_last_answer(with_system(value, messages)))


def _divided(prompt: list[Message], messages: list[Message]) -> dict[str, list[Message]]:
    """Cut a conversation before its first trained answer in `messages`."""
    first = next(index for index, message in enumerate(messages) if message.is_trained)
    prompt, completion = [*prompt, *messages[:first]], messages[first:]
    check_conversation(prompt, completion)
    return {"prompt": prompt, "completion": completion}


def _asked(value: dict[str, Any], prompt: list[Message]) -> list[Message]:
    """The turns of `history`, and the prompt."""
    return [*read_history(value.get("history")), *prompt]


_HISTORY = frozenset({"history"})
_QUESTION = frozenset({"history", "input"})
INSTRUCTION_FORMATS = {
    "alpaca": Format(frozenset({"instruction", "output"}), _alpaca("output"), _QUESTION),
    "alpaca-response": Format(frozenset({"instruction", "response"}), _alpaca("response"), _QUESTION),
    "alpaca-answer": Format(frozenset({"instruction", "answer"}), _alpaca("answer"), _QUESTION),
    "dolly": Format(frozenset({"instruction", "context", "response"}), _alpaca("response", "context"), _HISTORY),
    "messages": Format(frozenset({"messages"}), _messages("messages")),
    "sharegpt": Format(frozenset({"conversations"}), _messages("conversations")),
    "prompt-completion": Format(frozenset({"prompt", "completion"}), _prompt_completion, _HISTORY),
    **{name: Format(frozenset({"text"}), _template(name)) for name in TEXT_FORMATS},
}


def _prompt_chosen_rejected(value: dict[str, Any]) -> dict[str, list[Message]]:
    chosen, rejected = _answers(value)
    question = _read_turns(value["prompt"], "prompt", "user")
    is_text = [turn.content for turn in question] == [value["prompt"]]
    if not is_text or (len(chosen) == 1 and len(rejected) == 1):
        return _pair(value, _asked(value, question), chosen, rejected)
    prompt, chosen, rejected = _split_conversations(chosen, rejected)
    if not any(same_text(turn.content, value["prompt"]) for turn in prompt if turn.role == "user"):
        raise BadRowError("different_prompts", "`prompt` is no user turn of the two conversations")
    return _pair(value, _asked(value, prompt), chosen, rejected)


def _answers(
    value: dict[str, Any], chosen: str = "chosen", rejected: str = "rejected"
) -> tuple[list[Message], list[Message]]:
    return until_last_answer(_read_answer(value, chosen)), until_last_answer(_read_answer(value, rejected))


def _split_conversations(
    chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """Split two whole conversations into the turns that both begin with, and the rest of each."""
    if len(chosen) == 1 or len(rejected) == 1:
        raise BadRowError(
            "no_prompt",
            "its answers have no prompt; if the column NAME holds the prompt, set data.columns.prompt=NAME",
        )
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and _same(chosen[shared], rejected[shared]):
        shared += 1
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _pair(
    value: dict[str, Any], prompt: list[Message], chosen: list[Message], rejected: list[Message]
) -> dict[str, list[Message]]:
    chosen, rejected = _without_prompt(prompt, chosen), _without_prompt(prompt, rejected)
    if chosen[0].role != "assistant" or rejected[0].role != "assistant":
        raise BadRowError("different_prompts", "the conversations of the two answers do not begin with the same turns")
    if not all(turn.is_trained for turn in (*chosen, *rejected) if turn.role == "assistant"):
        raise BadRowError("loss_weight", "a part of its answers has the weight 0; pairs compare whole answers")
    prompt = with_system(value, prompt)
    check_conversation(prompt, chosen)
    check_conversation(prompt, rejected)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _without_prompt(prompt: list[Message], answer: list[Message]) -> list[Message]:
    repeats_prompt = len(answer) > len(prompt) and all(map(_same, answer, prompt))
    return answer[len(prompt) :] if repeats_prompt else answer


def _same(one: Message, other: Message) -> bool:
    return one.role == other.role and same_text(one.content, other.content)


def _openai_preference(value: dict[str, Any]) -> dict[str, list[Message]]:
    if isinstance(value["input"], dict) and value["input"].get("tools"):
        raise BadRowError("tool_call", "`input` offers tools, which are not trained")
    chosen, rejected = _answers(value, "preferred_output", "non_preferred_output")
    return _pair(value, read_messages(value["input"], "input"), chosen, rejected)


PREFERENCE_FORMATS = {
    "prompt-chosen-rejected": Format(frozenset({"prompt", "chosen", "rejected"}), _prompt_chosen_rejected, _HISTORY),
    "chosen-rejected": Format(
        frozenset({"chosen", "rejected"}), lambda value: _pair(value, *_split_conversations(*_answers(value)))
    ),
    "sharegpt-preference": Format(
        frozenset({"conversations", "chosen", "rejected"}),
        lambda value: _pair(value, read_messages(value["conversations"], "conversations"), *_answers(value)),
    ),
    "alpaca-preference": Format(
        frozenset({"instruction", "chosen", "rejected"}),
        lambda value: _pair(value, _asked(value, [_alpaca_question(value)]), *_answers(value)),
        _QUESTION,
    ),
    "openai-preference": Format(frozenset({"input", "preferred_output", "non_preferred_output"}), _openai_preference),
}


def _prompt(name: str) -> Reader:
    def read(value: dict[str, Any]) -> dict[str, Any]:
        prompt = with_system(value, _asked(value, _read_turns(value[name], name, "user")))
        if prompt[-1].role == "assistant":
            raise BadRowError(
                "ends_with_answer",
                f"`{name}` ends with an answer, and a prompt ends with a question: move the answer to the column `answer`",
            )
        check_conversation(prompt, [Message(role="assistant", content="")])
        return {"prompt": prompt, "answers": _accepted(value)}

    return read


def _accepted(value: dict[str, Any]) -> list[str]:
    """The accepted answers of a record: `answer`, or the list `answers`. They may be numbers."""
    names = [name for name in ("answer", "answers") if value.get(name) is not None]
    if len(names) > 1:
        raise BadRowError("malformed", "it has both `answer` and `answers`")
    found = from_json(value[names[0]]) if names else []
    # An `answer` that is a JSON object is one text.
    texts = found if isinstance(found, list) else [value[names[0]]]
    accepted = [
        str(text) if isinstance(text, int | float) and not isinstance(text, bool) else read_text(text, names[0])
        for text in texts
    ]
    if any(is_blank(text) for text in accepted):
        raise BadRowError("empty_answer", f"`{names[0]}` has an answer without any visible character")
    return accepted


_ACCEPTED = frozenset({"answer", "answers", *_HISTORY})
PROMPT_FORMATS = {
    "prompt": Format(frozenset({"prompt"}), _prompt("prompt"), _ACCEPTED),
    "question": Format(frozenset({"question"}), _prompt("question"), _ACCEPTED),
    "prompt-messages": Format(frozenset({"messages"}), _prompt("messages"), _ACCEPTED),
}
