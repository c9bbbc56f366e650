"""Canonical rows: conversations in TRL's columns, with an id, a source, and the rule that assigns each to a split."""

from __future__ import annotations

import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from llm_engineering.recipe.data_blocks import SplitConfig

# In the order of use: for training, for the loss during training, for the evaluation after training.
SPLITS = ("train", "validation", "test")
# The end of the `origin` of a pair whose rejected answer reached its maximum length.
AT_LAST_SENTENCE = "ended at its last sentence"
# A smaller dataset has too few rows to train on and to hold some out.
MIN_ROWS = 20
# Characters of a row that its quarantine record quotes.
QUOTED_CHARS = 200
# Accents that follow their letter, and the vowel signs of Hindi, Arabic or Thai. `\w` does not match them. Later planes
# have none.
MARKS = "".join(mark for mark in map(chr, range(0x20000)) if unicodedata.category(mark)[0] == "M")
# Scripts with few or no spaces between words: Thai and Lao, Burmese, Khmer, Chinese, Japanese, Korean. Each of their
# characters counts as one word, as in Unicode's rules for word borders (UAX 29) without a dictionary.
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{UNSPACED}][{MARKS}]*|[^\W{UNSPACED}]+(?:[{MARKS}]+[^\W{UNSPACED}]*)*")
# Invisible, although Unicode counts them as letters, symbols or marks: Hangul's fillers, the empty braille pattern, the
# grapheme joiner and the variation selectors.
_INVISIBLE = frozenset("\u115f\u1160\u3164\uffa0\u2800\u034f" + "".join(map(chr, range(0xFE00, 0xFE10))))
# Soft hyphens, joiners and byte order marks. They are invisible, and many stand within words.
_JOINERS = re.compile("[\u00ad\u200c\u200d\u2060\ufeff]+")


class Message(BaseModel):
    """One turn of a conversation.

    Attributes:
        reasoning_content: what the assistant thought before it answered; None if there is none.
        weight: 0 for an answer that is read and not trained on, else None.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: str
    reasoning_content: str | None = None
    weight: Literal[0] | None = None

    @property
    def is_trained(self) -> bool:
        """Whether this is an answer that training learns."""
        return self.role == "assistant" and self.weight is None

    @property
    def texts(self) -> tuple[str, ...]:
        """The content, and the reasoning if there is any."""
        return (self.content,) if self.reasoning_content is None else (self.content, self.reasoning_content)


class _Row(BaseModel):
    """The fields that all kinds of rows share.

    Attributes:
        source: the file and the place in it, or the document and its characters, that the row was made from.
        origin: who wrote the answer: `human`, `human:review`, `human:feedback`, `document`, `replay`, or the name of a model; `unknown` if the file does not say.
        document: the source document; rows of one document go to the same split. Empty if there is none.
    """

    # A record of a dataset also has the column `id`, which is computed anew.
    model_config = ConfigDict(frozen=True, extra="ignore")

    source: str
    origin: str
    document: str = ""

    @property
    def id(self) -> str:
        """Hash of the content alone: the same text has the same id wherever it comes from."""
        # Without the keys of messages that are not set, so that a new key does not change the ids of other rows.
        content = self.model_dump(exclude={"source", "origin", "document"}, exclude_none=True)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def record(self) -> dict[str, Any]:
        """The row as a record of a dataset."""
        return {"id": self.id, **self.model_dump(by_alias=True)}


class TextRow(_Row):
    """Text that continued pre-training learns whole. A row of `data.replay` has the origin `replay`."""

    text: str

    @property
    def prompt(self) -> list[Message]:
        """Text has no prompt."""
        return []

    @property
    def answers(self) -> list[list[Message]]:
        """The text, as the only answer."""
        return [[Message(role="assistant", content=self.text)]]


class InstructionRow(_Row):
    """`completion` starts with an assistant turn; training learns every assistant turn in it without the weight 0."""

    prompt: list[Message]
    completion: list[Message]

    def by_answer(self) -> list[InstructionRow]:
        """A row for each answer that is trained, whose prompt has all turns before the answer.

        The rows belong together, so they have the document of this row, or else its id.
        """
        turns = [*self.prompt, *self.completion]
        cuts = [place for place in range(len(self.prompt), len(turns)) if turns[place].is_trained]
        own = {"document": self.document or self.id}
        return [self.model_copy(update={**own, "prompt": turns[:cut], "completion": [turns[cut]]}) for cut in cuts]

    @property
    def answers(self) -> list[list[Message]]:
        """The completion, as a list of one answer."""
        return [self.completion]


class PreferenceRow(_Row):
    """`chosen` and `rejected` are two answers to the same prompt."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]

    @property
    def answers(self) -> list[list[Message]]:
        """The chosen answer, then the rejected one."""
        return [self.chosen, self.rejected]

    def labelled(self) -> list[LabelledRow]:
        """The chosen answer as a good one, and the rejected answer as a bad one."""
        shared = self.model_dump(include={"source", "origin", "document", "prompt"})
        return [
            LabelledRow(**shared, completion=answer, label=label)
            for answer, label in ((self.chosen, True), (self.rejected, False))
        ]


class LabelledRow(InstructionRow):
    """An answer that somebody judged: `label` says whether it is a good one. The label is that of the whole completion."""

    label: bool


class PromptRow(_Row):
    """A prompt that the model answers itself, and a reward scores its answer.

    Attributes:
        accepted: the accepted answers, the usual one first; may be empty. Its column in datasets is `answers`.
    """

    prompt: list[Message]
    accepted: list[str] = Field(alias="answers")

    @property
    def answers(self) -> list[list[Message]]:
        """The first accepted answer; an answer without turns if there is none."""
        return [[Message(role="assistant", content=text) for text in self.accepted[:1]]]


Row = TextRow | InstructionRow | PreferenceRow | PromptRow
# The class of the rows of each kind.
ROW_CLASSES: dict[str, type[Row]] = {
    "text": TextRow,
    "instruction": InstructionRow,
    "preference": PreferenceRow,
    "prompt": PromptRow,
    "labelled": LabelledRow,
}
# The origin of rows of `data.replay` and `data.replay_instructions`. They are only trained on.
REPLAY = "replay"
# The start of the origin of rows that people made, in reviews or by feedback, e.g. `human:review`.
HUMAN = "human:"
# The start of the origin of their repetitions in the train split, see `data.human_weight`.
REPEATED = "again: "
# The start of the origin of questions that need two facts.
TWO_HOP = "two_hop"
# These functions read a record of a dataset.
instruction_row = InstructionRow.model_validate
preference_row = PreferenceRow.model_validate


def read_row(record: dict[str, Any], kind: str) -> Row:
    """Read a record of a dataset of a kind."""
    return ROW_CLASSES[kind].model_validate(record)


class Quarantined(BaseModel):
    """A document, passage or row that was read and not kept.

    Attributes:
        stage: `document`, `passage`, or a kind of rows; for the user's own test split the kind and `_test`, e.g.
            `instruction_test`.
        reason: the short name that is counted, e.g. `empty_answer`.
        source: the file or document it comes from.
        place: the place in the source, e.g. `line 7` or `characters 120-560`.
        detail: what exactly is wrong.
        text: the start of the text that was read.
    """

    model_config = ConfigDict(frozen=True)

    stage: str
    reason: str
    source: str
    place: str
    detail: str = ""
    text: str = ""

    @classmethod
    def of_row(cls, row: Row, stage: str, reason: str, detail: str) -> Quarantined:
        """The quarantine record of a row. It quotes the last turn of the prompt, or the text, without secrets and personal data."""
        # The patterns of keys take a quarter of a second to import, and documents need none.
        from llm_engineering.data.private import redacted

        # Redact before cutting: a key that is cut in two is not recognised.
        text = redacted((row.prompt or row.answers[0])[-1].content)[:QUOTED_CHARS]
        return cls(stage=stage, reason=reason, source=row.source, place=row.id, detail=detail, text=text)

    def describe(self) -> str:
        """`source, place: reason (detail)`, for messages."""
        return f"{self.source}, {self.place}: {self.reason}{f' ({self.detail})' if self.detail else ''}"


def is_blank(text: str) -> bool:
    """Whether a text has no visible character: it is empty, or has only white space and characters of no width."""
    return all(
        # Z is white space. Cc and Cf are control and formatting characters, such as the zero-width space.
        character in _INVISIBLE or unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp", "Zs")
        for character in text
    )


def words(text: str) -> list[str]:
    """The words of a text in lower case and without punctuation; in scripts without spaces, its characters.

    Unicode writes many characters in several ways, for example `é` as one character or as two. All ways of writing a
    text have the same words (normal form NFKC).
    """
    if not text.isascii():
        text = _JOINERS.sub("", unicodedata.normalize("NFKC", text))
    return _WORD.findall(text.lower())


def normalised(text: str) -> str:
    """A text's words, joined by single spaces, to compare texts without case, punctuation and white space."""
    return " ".join(words(text))


def same_text(one: str, other: str) -> bool:
    """Whether two texts are equal but for the Unicode form of their characters and for white space around them."""
    return one == other or unicodedata.normalize("NFC", one).strip() == unicodedata.normalize("NFC", other).strip()


def folded(messages: Sequence[Message]) -> str:
    """The normalised text of messages; the text itself if it consists of punctuation."""
    text = "\n".join(message.content for message in messages)
    return normalised(text) or unicodedata.normalize("NFKC", text)


def written_as(row: Row) -> str:
    """What a row is, as reports count it.

    `documents`, a kind of rewriting, `questions`, `two_hop`, `general`, `pairs`, `prompts`, `good answers` or `bad answers`.

    The `origin` of a derived row begins with its kind.
    """
    first = row.origin.removeprefix(REPEATED).partition(" ")[0]
    if row.origin == REPLAY:
        return "general"
    if isinstance(row, TextRow):
        # What a reviewer edited.
        return "documents" if first == "document" or first.startswith(HUMAN) else first
    if isinstance(row, PreferenceRow):
        return "pairs"
    if isinstance(row, PromptRow):
        return "prompts"
    if isinstance(row, LabelledRow):
        return "good answers" if row.label else "bad answers"
    return first if first == TWO_HOP else "questions"


def row_text(row: Row) -> str:
    """The text by which near duplicates are found: the prompt, and the completion or the chosen answer."""
    return "\n".join(message.content for message in (*row.prompt, *row.answers[0]))


def split_key(row: Row) -> str:
    """The text that decides a row's split: the name of its document, or else its normalised prompt or text."""
    return row.document or folded(row.prompt or row.answers[0])


def split_of(key: str, config: SplitConfig, has_own_test: bool = False) -> str:
    """The split of a key: its SHA-256 as a number in [0, 1); the test share comes first, then validation.

    The split depends on the key alone, so a row keeps its split when other rows are added or removed. If the user
    supplies a test split, the test share goes to training.
    """
    position = _position(key)
    if position < config.test_fraction:
        return "train" if has_own_test else "test"
    return "validation" if position < config.test_fraction + config.validation_fraction else "train"


def _position(key: str) -> float:
    return int.from_bytes(hashlib.sha256(key.encode(errors="surrogatepass")).digest()[:8]) / 2**64


# A user with few documents wants most of them trained on.
_MOST_HELD_OUT = 0.5


def with_held_out_documents(config: SplitConfig, documents: Iterable[str]) -> SplitConfig:
    """Raise the fractions just as far as each held-out split needs to have one of the documents.

    Of 15 documents, a fraction of 0.1 holds out none in one of five cases. The fractions stay as they are if more than half of
    the hash range would have to be held out.
    """
    positions = sorted(map(_position, documents))
    raised = []
    held_out = 0.0
    for fraction in (config.test_fraction, config.validation_fraction):
        first = next((position for position in positions if position >= held_out), 1.0)
        # Rounded up to four digits, which are readable in the recipe.
        raised.append(max(fraction, (math.floor((first - held_out) * 1e4) + 1) / 1e4))
        held_out += raised[-1]
    if held_out > _MOST_HELD_OUT:
        return config
    return config.model_copy(update={"test_fraction": raised[0], "validation_fraction": raised[1]})
