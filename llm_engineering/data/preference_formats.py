"""Turns a record of each preference format into a prompt and two answers: TRL's three forms, ShareGPT's, Alpaca's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llm_engineering.data.conversations import (
    BadRowError,
    check_conversation,
    read_messages,
    read_turns,
    until_last_answer,
    with_system,
)
from llm_engineering.data.instruction_formats import alpaca_question
from llm_engineering.data.rows import Message

# Prompt, chosen and rejected answer; both answers begin with an assistant turn.
Preference = tuple[list[Message], list[Message], list[Message]]


def _prompt_chosen_rejected(value: dict[str, Any]) -> Preference:
    chosen, rejected = _answers(value)
    if isinstance(value["prompt"], str):
        if len(chosen) == 1 and len(rejected) == 1:
            return _pair(value, [Message(role="user", content=value["prompt"])], chosen, rejected)
        prompt, chosen, rejected = _whole_conversations(chosen, rejected)
        asked = value["prompt"].strip()
        if all(turn.content.strip() != asked for turn in prompt if turn.role == "user"):
            raise BadRowError("different_prompts", "`prompt` is no user turn of the two conversations")
        return _pair(value, prompt, chosen, rejected)
    return _pair(value, read_turns(value["prompt"], "prompt", "user"), chosen, rejected)


def _chosen_rejected(value: dict[str, Any]) -> Preference:
    chosen, rejected = _answers(value)
    return _pair(value, *_whole_conversations(chosen, rejected))


def _sharegpt(value: dict[str, Any]) -> Preference:
    return _pair(value, read_messages(value["conversations"], "conversations"), *_answers(value))


def _alpaca(value: dict[str, Any]) -> Preference:
    return _pair(value, [alpaca_question(value)], *_answers(value))


def _answers(value: dict[str, Any]) -> tuple[list[Message], list[Message]]:
    chosen = until_last_answer(read_turns(value["chosen"], "chosen", "assistant"))
    rejected = until_last_answer(read_turns(value["rejected"], "rejected", "assistant"))
    return chosen, rejected


def _whole_conversations(chosen: list[Message], rejected: list[Message]) -> Preference:
    """The turns that both conversations begin with, and what follows in each."""
    if len(chosen) == 1 or len(rejected) == 1:
        raise BadRowError(
            "no_prompt", "its answers have no prompt; where it stands in another column, name that in data.columns"
        )
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _pair(value: dict[str, Any], prompt: list[Message], chosen: list[Message], rejected: list[Message]) -> Preference:
    chosen, rejected = _after(prompt, chosen), _after(prompt, rejected)
    if chosen[0].role != "assistant" or rejected[0].role != "assistant":
        raise BadRowError("different_prompts", "the conversations of the two answers do not begin with the same turns")
    prompt = with_system(value, prompt)
    check_conversation(prompt, chosen)
    check_conversation(prompt, rejected)
    return prompt, chosen, rejected


def _after(prompt: list[Message], answer: list[Message]) -> list[Message]:
    repeats_prompt = len(answer) > len(prompt) and answer[: len(prompt)] == prompt
    return answer[len(prompt) :] if repeats_prompt else answer


# The columns that each format is known by, and what reads a record that has them.
PREFERENCE_FORMATS: dict[str, tuple[frozenset[str], Callable[[dict[str, Any]], Preference]]] = {
    "prompt-chosen-rejected": (frozenset({"prompt", "chosen", "rejected"}), _prompt_chosen_rejected),
    "chosen-rejected": (frozenset({"chosen", "rejected"}), _chosen_rejected),
    "sharegpt-preference": (frozenset({"conversations", "chosen", "rejected"}), _sharegpt),
    "alpaca-preference": (frozenset({"instruction", "chosen", "rejected"}), _alpaca),
}
