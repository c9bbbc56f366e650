"""Checks of a single row: an empty, cut off or refusing answer, equal answers, a missing passage, private data.

`data.rules` in the recipe has a switch for each rule. Checks that compare rows, such as duplicates, are in `dataset_rules`.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any, Generic, NamedTuple, TypeVar, cast

from llm_engineering.data.private import Private, masked, personal_data, redacted, secrets
from llm_engineering.data.rows import (
    REPLAY,
    InstructionRow,
    LabelledRow,
    Message,
    PreferenceRow,
    PromptRow,
    Row,
    TextRow,
    is_blank,
)
from llm_engineering.data.wording import mention_of_passage, order_to_model, refusal, unfinished
from llm_engineering.recipe.data_blocks import RulesConfig

RowT = TypeVar("RowT", bound=Row)

# Maximum number of characters that a finding's detail quotes from a row.
QUOTE_CHARS = 80
# Origins of rows that no model wrote, and of rows whose author is unknown.
NOT_GENERATED = frozenset({"human", "unknown", "document", REPLAY, ""})
# A prompt of at least this many characters is assumed to contain the text that it mentions.
LONG_PROMPT_CHARS = 400


class Finding(NamedTuple):
    """A match of a rule in a row that is kept. `rule` is its name in RulesConfig."""

    rule: str
    detail: str


class Checked(NamedTuple, Generic[RowT]):
    """The result of all rules for one row.

    Attributes:
        row: the row, or a copy whose private parts are masked if a switch is `mask`.
        reason: the rule that drops the row; empty if the row is kept.
        detail: what that rule found. No detail quotes private data.
        findings: what the other rules found, and what was masked.
    """

    row: RowT
    reason: str
    detail: str
    findings: list[Finding]


def is_generated(row: Row) -> bool:
    """Whether a model wrote the row or a part of it. The origin of a row that a reviewer corrected is `human:` and a name."""
    return row.origin.partition(":")[0].strip().casefold() not in NOT_GENERATED


def check_row(row: RowT, rules: RulesConfig) -> Checked[RowT]:
    """Apply the rules to a row, until one of them drops it.

    Private data comes first, so that a row that a later rule drops is masked too. Secrets come before personal data: in
    a URL, the text before the @ is a password, not a mailbox.
    """
    findings: list[Finding] = []
    for rule, find in _PRIVATE_RULES:
        action = getattr(rules, rule)
        found = [] if action == "off" else _private(row, find)
        if not found:
            continue
        detail = _private_detail(found)
        if action == "drop":
            return Checked(row, rule, detail, findings)
        if action == "mask":
            row = _masked(row, find)
            detail = f"masked: {detail}"
        findings.append(Finding(rule, detail))
    # The other rules are about questions and answers to train on. Accepted answers are only compared with.
    for rule, judge in _RULES_OF_KIND.get(type(row), _ANSWER_RULES):
        action = getattr(rules, rule)
        detail = "" if action == "off" else judge(row)
        if not detail:
            continue
        if action == "drop" or (action == "drop_generated" and is_generated(row)):
            return Checked(row, rule, detail, findings)
        findings.append(Finding(rule, detail))
    return Checked(row, "", "", findings)


def _fields(row: Row) -> dict[str, list[Message]]:
    if isinstance(row, TextRow):
        return {"text": row.answers[0]}
    if isinstance(row, InstructionRow):
        return {"prompt": row.prompt, "completion": row.completion}
    if isinstance(row, PromptRow):
        return {"prompt": row.prompt, "accepted": [Message(role="assistant", content=text) for text in row.accepted]}
    return {"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected}


def _answers(messages: Sequence[Message]) -> list[str]:
    return [message.content for message in messages if message.is_trained]


def _wanted(row: Row) -> list[str]:
    """The answers that a model should give: not those that are rejected or labelled as bad."""
    return [] if isinstance(row, LabelledRow) and not row.label else _answers(row.answers[0])


def _private(row: Row, find: Callable[[str], list[Private]]) -> list[tuple[str, str]]:
    """Field and kind of everything private in a row."""
    return [
        (field, private.kind)
        for field, messages in _fields(row).items()
        for message in messages
        for text in message.texts
        for private in find(text)
    ]


def _private_detail(found: Sequence[tuple[str, str]]) -> str:
    counts = Counter(found)
    return "; ".join(
        f"{kind} in the {field}, {count} times" if count > 1 else f"{kind} in the {field}"
        for (field, kind), count in counts.items()
    )


def _masked(row: RowT, find: Callable[[str], list[Private]]) -> RowT:
    update: dict[str, Any] = {
        field: [
            message.model_copy(
                update={
                    name: masked(text, find(text))
                    for name, text in zip(("content", "reasoning_content"), message.texts, strict=False)
                }
            )
            for message in messages
        ]
        for field, messages in _fields(row).items()
    }
    if isinstance(row, TextRow):
        update = {"text": update["text"][0].content}
    if isinstance(row, PromptRow):
        update["accepted"] = [message.content for message in update["accepted"]]
    return cast("RowT", row.model_copy(update=update))


def _empty_answer(row: Row) -> str:
    for field, messages in _fields(row).items():
        answers = _answers(messages)
        if field != "prompt" and (not answers or any(is_blank(answer) for answer in answers)):
            return f"{field}: an answer without any visible character"
    return ""


def _chosen_equals_rejected(row: Row) -> str:
    if not isinstance(row, PreferenceRow):
        return ""
    chosen = "\n".join(message.content for message in row.chosen)
    rejected = "\n".join(message.content for message in row.rejected)
    if chosen == rejected:
        return "the answers are equal"
    pairs = zip_longest(_essence(chosen), _essence(rejected))
    # Both streams are read up to the first difference, which is usually in the first word. Two answers of only
    # punctuation leave no characters to compare. They count as different, because their texts differ.
    first = next(pairs, None)
    if first is not None and first[0] == first[1] and all(one == other for one, other in pairs):
        return "the answers differ only in case, space or punctuation"
    return ""


def _essence(text: str) -> Iterator[str]:
    """A text's characters without case, white space and punctuation.

    Punctuation before a digit is kept, because it can be a sign, a decimal point or a ratio: 3.5 is not 35, and -1 is
    not 1. White space between two digits is kept too. Symbols (S) are no punctuation: `a = b` is not `a < b`.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    last_digit = False
    space = False
    for place, character in enumerate(folded):
        if unicodedata.category(character)[0] in "PZC":
            space = space or character.isspace()
            if character not in "-.,:/" or not folded[place + 1 : place + 2].isdigit():
                continue
        elif space and last_digit and character.isdigit():
            yield " "
        space = False
        last_digit = character.isdigit()
        yield character


def _refusal(row: Row) -> str:
    opening = next(filter(None, map(refusal, _wanted(row))), "")
    return f"begins with “{opening[:QUOTE_CHARS]}”" if opening else ""


def _truncated_answer(row: Row) -> str:
    for answer in _wanted(row):
        problem = unfinished(answer)
        if problem:
            # Redact before cutting: half of a key or address matches no pattern.
            return f"{problem}: “…{redacted(answer).rstrip()[-QUOTE_CHARS:]}”"
    return ""


def _mentions_passage(row: Row) -> str:
    turns = [message.content for message in row.prompt if message.role != "system"]
    if len(turns) != 1 or sum(len(message.content) for message in row.prompt) >= LONG_PROMPT_CHARS:
        return ""
    mention = mention_of_passage(turns[0])
    return f"mentions “{mention[:QUOTE_CHARS]}”, but contains no such text" if mention else ""


def _order_to_model(row: Row) -> str:
    texts = (text for messages in _fields(row).values() for message in messages for text in message.texts)
    order = next(filter(None, map(order_to_model, texts)), "")
    return f"contains “{order[:QUOTE_CHARS]}”" if order else ""


_PRIVATE_RULES = (("secret", secrets), ("personal_data", personal_data))
_Rules = tuple[tuple[str, Callable[[Row], str]], ...]
_TEXT_RULES: _Rules = (("empty_answer", _empty_answer), ("order_to_model", _order_to_model))
_PROMPT_RULES: _Rules = (("order_to_model", _order_to_model), ("mentions_passage", _mentions_passage))
_ANSWER_RULES: _Rules = (
    *_TEXT_RULES,
    ("chosen_equals_rejected", _chosen_equals_rejected),
    ("refusal", _refusal),
    ("truncated_answer", _truncated_answer),
    ("mentions_passage", _mentions_passage),
)
_RULES_OF_KIND: Mapping[type, _Rules] = {TextRow: _TEXT_RULES, PromptRow: _PROMPT_RULES}
