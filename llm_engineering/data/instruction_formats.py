"""Turns a record of each instruction format into a conversation: Alpaca's, OpenAI's, ShareGPT's, TRL's, plain text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llm_engineering.data.conversations import (
    check_conversation,
    read_messages,
    read_pairs,
    read_text,
    read_turns,
    until_last_answer,
    with_system,
)
from llm_engineering.data.rows import Message
from llm_engineering.data.templates import read_template

# Prompt and completion; the completion begins with an assistant turn.
Instruction = tuple[list[Message], list[Message]]


def alpaca_question(value: dict[str, Any], context: str = "input") -> Message:
    """The user turn of a record with `instruction` and, where there is one, `input`."""
    instruction = read_text(value["instruction"], "instruction")
    if value.get(context) is None:
        return Message(role="user", content=instruction)
    extra = read_text(value[context], context)
    # A question that stands in `input` alone is no reason to begin with two empty lines.
    parts = [part for part in (instruction, extra) if part.strip()]
    return Message(role="user", content="\n\n".join(parts) if parts else instruction)


def _alpaca(answer: str, context: str = "input") -> Callable[[dict[str, Any]], Instruction]:
    def read(value: dict[str, Any]) -> Instruction:
        turns = [
            *read_pairs(value.get("history"), "history"),
            alpaca_question(value, context),
            Message(role="assistant", content=read_text(value[answer], answer)),
        ]
        return _conversation(with_system(value, turns))

    return read


def _messages(name: str) -> Callable[[dict[str, Any]], Instruction]:
    return lambda value: _conversation(with_system(value, read_messages(value[name], name)))


def _template(name: str) -> Callable[[dict[str, Any]], Instruction]:
    return lambda value: _conversation(with_system(value, read_template(read_text(value["text"], "text"), name)))


def _prompt_completion(value: dict[str, Any]) -> Instruction:
    prompt = with_system(value, read_turns(value["prompt"], "prompt", "user"))
    completion = until_last_answer(read_turns(value["completion"], "completion", "assistant"))
    check_conversation(prompt, completion)
    return prompt, completion


def _conversation(messages: list[Message]) -> Instruction:
    messages = until_last_answer(messages)
    first = next(index for index, message in enumerate(messages) if message.role == "assistant")
    prompt, completion = messages[:first], messages[first:]
    check_conversation(prompt, completion)
    return prompt, completion


# The columns that each format is known by, and what reads a record that has them.
INSTRUCTION_FORMATS: dict[str, tuple[frozenset[str], Callable[[dict[str, Any]], Instruction]]] = {
    "alpaca": (frozenset({"instruction", "output"}), _alpaca("output")),
    "alpaca-response": (frozenset({"instruction", "response"}), _alpaca("response")),
    "alpaca-answer": (frozenset({"instruction", "answer"}), _alpaca("answer")),
    "dolly": (frozenset({"instruction", "context", "response"}), _alpaca("response", context="context")),
    "messages": (frozenset({"messages"}), _messages("messages")),
    "sharegpt": (frozenset({"conversations"}), _messages("conversations")),
    "prompt-completion": (frozenset({"prompt", "completion"}), _prompt_completion),
    "text-alpaca": (frozenset({"text"}), _template("text-alpaca")),
    "text-human-assistant": (frozenset({"text"}), _template("text-human-assistant")),
    "text-inst": (frozenset({"text"}), _template("text-inst")),
}
