"""The checks that one row answers by itself: is there an answer, is it whole, does it refuse, is anything in it private.

Each rule's switch stands in the recipe (`data.rules`). What needs other rows, such as duplicates, is judged elsewhere.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from typing import Generic, NamedTuple, TypeVar, cast

from llm_engineering.data.private import Private, masked, personal_data, redacted, secrets
from llm_engineering.data.rows import InstructionRow, Message, PreferenceRow
from llm_engineering.data.wording import mention_of_passage, refusal, unfinished
from llm_engineering.recipe.data_blocks import RulesConfig

RowT = TypeVar("RowT", bound=InstructionRow | PreferenceRow)
Row = InstructionRow | PreferenceRow

# Longest quotation of a row in a detail, in characters.
QUOTE_CHARS = 80
# Origins of rows that no model wrote, or of which it is not known.
NOT_GENERATED = frozenset({"human", "unknown", "document", ""})
# A prompt from this many characters on carries the text that it speaks of.
LONG_PROMPT_CHARS = 400
# Blank although Unicode counts them as letters, symbols or marks: Hangul's fillers, the empty braille pattern, the
# grapheme joiner and the variation selectors.
_BLANK = frozenset("\u115f\u1160\u3164\uffa0\u2800\u034f" + "".join(map(chr, range(0xFE00, 0xFE10))))


class Finding(NamedTuple):
    """A rule, by its name in RulesConfig, that matched a row which stays."""

    rule: str
    detail: str


class Checked(NamedTuple, Generic[RowT]):
    """What the rules say of a row.

    Attributes:
        row: the row, or a copy without its private parts where a switch is `mask`.
        reason: the rule that drops the row; empty for one that stays.
        detail: what that rule found. No detail repeats anything private.
        findings: what other rules found, and what was masked.
    """

    row: RowT
    reason: str
    detail: str
    findings: list[Finding]


def is_generated(row: Row) -> bool:
    """Whether a model wrote the row, or part of it."""
    return row.origin.strip().casefold() not in NOT_GENERATED


class RowRules:
    """Checks rows one by one; nothing is carried from one to the next.

    Args:
        config: each rule's switch.
    """

    def __init__(self, config: RulesConfig) -> None:
        self.config = config

    def check(self, row: RowT) -> Checked[RowT]:
        """Judge a row. The first rule that drops it is its reason, and no rule is asked after it.

        Secrets and personal data go first, so that a row which a later rule drops is masked all the same. Secrets go
        before personal data: what stands before the @ of a URL is a password, not a mailbox.
        """
        findings: list[Finding] = []
        for rule, find in _PRIVATE_RULES:
            action = getattr(self.config, rule)
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
        for rule, judge in _CONTENT_RULES:
            action = getattr(self.config, rule)
            detail = "" if action == "off" else judge(row)
            if not detail:
                continue
            if action == "drop" or (action == "drop_generated" and is_generated(row)):
                return Checked(row, rule, detail, findings)
            findings.append(Finding(rule, detail))
        return Checked(row, "", "", findings)


def _fields(row: Row) -> dict[str, list[Message]]:
    if isinstance(row, InstructionRow):
        return {"prompt": row.prompt, "completion": row.completion}
    return {"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected}


def _answers(messages: Sequence[Message]) -> list[str]:
    return [message.content for message in messages if message.role == "assistant"]


def _learned(row: Row) -> list[str]:
    """The answers that the model is to give."""
    return _answers(row.completion if isinstance(row, InstructionRow) else row.chosen)


def _private(row: Row, find: Callable[[str], list[Private]]) -> list[tuple[str, str]]:
    """Field and kind of everything private."""
    return [
        (field, private.kind)
        for field, messages in _fields(row).items()
        for message in messages
        for private in find(message.content)
    ]


def _private_detail(found: Sequence[tuple[str, str]]) -> str:
    counts = Counter(found)
    return "; ".join(
        f"{kind} in the {field}, {count} times" if count > 1 else f"{kind} in the {field}"
        for (field, kind), count in counts.items()
    )


def _masked(row: RowT, find: Callable[[str], list[Private]]) -> RowT:
    update = {
        field: [
            message.model_copy(update={"content": masked(message.content, find(message.content))})
            for message in messages
        ]
        for field, messages in _fields(row).items()
    }
    return cast("RowT", row.model_copy(update=update))


def _empty_answer(row: Row) -> str:
    for field, messages in _fields(row).items():
        answers = _answers(messages)
        if field != "prompt" and (not answers or any(_is_blank(answer) for answer in answers)):
            return f"{field}: an answer without any visible character"
    return ""


def _is_blank(text: str) -> bool:
    # Whitespace and separators are Z, control and formatting characters such as the zero-width space Cc and Cf.
    return all(
        character in _BLANK or unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp", "Zs") for character in text
    )


def _chosen_equals_rejected(row: Row) -> str:
    if isinstance(row, InstructionRow):
        return ""
    chosen = "\n".join(message.content for message in row.chosen)
    rejected = "\n".join(message.content for message in row.rejected)
    if chosen == rejected:
        return "the answers are equal"
    pairs = zip_longest(_essence(chosen), _essence(rejected))
    # Both streams are read only up to the first difference, mostly the first word. Answers of punctuation alone have
    # nothing in them to compare, so they stay as different as their texts.
    first = next(pairs, None)
    if first is not None and first[0] == first[1] and all(one == other for one, other in pairs):
        return "the answers differ only in case, space or punctuation"
    return ""


def _essence(text: str) -> Iterator[str]:
    """A text's characters without case, space and punctuation.

    What stands before a digit stays, as it can be a sign, a decimal point or a ratio: 3.5 is not 35, nor -1 the same as 1.
    So does the space between two digits. Symbols (S) are no punctuation: `a = b` is not `a < b`.
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
    opening = next(filter(None, map(refusal, _learned(row))), "")
    return f"begins with “{opening[:QUOTE_CHARS]}”" if opening else ""


def _truncated_answer(row: Row) -> str:
    for answer in _learned(row):
        why = unfinished(answer)
        if why:
            # Taken from the redacted text: the cut could leave half of something private that no pattern knows.
            return f"{why}: “…{redacted(answer).rstrip()[-QUOTE_CHARS:]}”"
    return ""


def _mentions_passage(row: Row) -> str:
    turns = [message.content for message in row.prompt if message.role != "system"]
    if len(turns) != 1 or sum(len(message.content) for message in row.prompt) >= LONG_PROMPT_CHARS:
        return ""
    mention = mention_of_passage(turns[0])
    return f"speaks of “{mention[:QUOTE_CHARS]}”, which is not there" if mention else ""


_PRIVATE_RULES = (("secret", secrets), ("personal_data", personal_data))
_CONTENT_RULES = (
    ("empty_answer", _empty_answer),
    ("chosen_equals_rejected", _chosen_equals_rejected),
    ("refusal", _refusal),
    ("truncated_answer", _truncated_answer),
    ("mentions_passage", _mentions_passage),
)
