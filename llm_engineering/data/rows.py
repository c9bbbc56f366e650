"""Canonical rows: conversations in TRL's columns, with an id, a source, and the split that they fall into."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

from datasets import Dataset, Features, List, Value
from pydantic import BaseModel, ConfigDict, field_validator

from llm_engineering.recipe.data_blocks import SplitConfig

ROLES = ("system", "user", "assistant")
_MESSAGES = List({"role": Value("string"), "content": Value("string")})
_ORIGIN = {"id": Value("string"), "source": Value("string"), "origin": Value("string"), "document": Value("string")}
INSTRUCTION_FEATURES = Features({**_ORIGIN, "prompt": _MESSAGES, "completion": _MESSAGES})
PREFERENCE_FEATURES = Features({**_ORIGIN, "prompt": _MESSAGES, "chosen": _MESSAGES, "rejected": _MESSAGES})
# In scripts without spaces a run of letters is a sentence, not a word: each sign counts as one.
_SIGN = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_SIGN}]|[^\W{_SIGN}]+")


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: str
    content: str

    @field_validator("role")
    @classmethod
    def _known(cls, role: str) -> str:
        if role not in ROLES:
            raise ValueError(f"unknown role {role!r}, expected one of {', '.join(ROLES)}")
        return role


class _Row(BaseModel):
    """What both kinds of rows have.

    Attributes:
        source: file and place, or document and characters, that the row was made from.
        origin: who wrote the answer: `human`, `document`, or a model's name; `unknown` where the file does not say.
        document: what rows must share a split with: the source document; empty where there is none.
    """

    model_config = ConfigDict(frozen=True)

    prompt: list[Message]
    source: str
    origin: str
    document: str = ""

    @property
    def id(self) -> str:
        """Hash of the content alone: the same text has the same id wherever it comes from."""
        content = self.model_dump(exclude={"source", "origin", "document"})
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def record(self) -> dict[str, Any]:
        """The row as a dataset holds it."""
        return {"id": self.id, **self.model_dump()}


class InstructionRow(_Row):
    """`completion` starts with an assistant turn; every assistant turn in it is trained on."""

    completion: list[Message]


class PreferenceRow(_Row):
    """`chosen` and `rejected` are two answers to the same prompt."""

    chosen: list[Message]
    rejected: list[Message]


def to_dataset(records: Sequence[dict[str, Any]], features: Features) -> Dataset:
    """Records as a dataset, with the same columns also when there are none."""
    # Dataset.from_list loses the columns of an empty list.
    return Dataset.from_dict({name: [record[name] for record in records] for name in features}, features=features)


def instruction_dataset(rows: Sequence[InstructionRow]) -> Dataset:
    """Instruction rows as a dataset."""
    return to_dataset([row.record() for row in rows], INSTRUCTION_FEATURES)


def preference_dataset(rows: Sequence[PreferenceRow]) -> Dataset:
    """Preference rows as a dataset."""
    return to_dataset([row.record() for row in rows], PREFERENCE_FEATURES)


def instruction_row(record: dict[str, Any]) -> InstructionRow:
    """A dataset's record as a row."""
    return InstructionRow.model_validate({k: v for k, v in record.items() if k != "id"})


def preference_row(record: dict[str, Any]) -> PreferenceRow:
    """A dataset's record as a row."""
    return PreferenceRow.model_validate({k: v for k, v in record.items() if k != "id"})


# From what is trained on to what is held out most.
SPLITS = ("train", "validation", "test")


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation; in scripts without spaces, its signs."""
    return _WORD.findall(text.lower())


def normalised(text: str) -> str:
    """A text for comparing: its words, without case, punctuation and space."""
    return " ".join(words(text))


def split_key(row: InstructionRow | PreferenceRow) -> str:
    """What decides a row's split: its document, or its prompt with case, punctuation and space folded."""
    return row.document or prompt_text(row)


def split_of(key: str, config: SplitConfig, has_own_test: bool = False) -> str:
    """The split of a key: its SHA-256 as a number in [0, 1), the test share first, then validation.

    It depends on the key alone, so a row never changes sides when other rows come or go. With a test split of the
    user's own, the test share is trained on.
    """
    position = int.from_bytes(hashlib.sha256(key.encode(errors="surrogatepass")).digest()[:8]) / 2**64
    if position < config.test_fraction:
        return "train" if has_own_test else "test"
    return "validation" if position < config.test_fraction + config.validation_fraction else "train"


def prompt_text(row: InstructionRow | PreferenceRow) -> str:
    """The prompt with case, punctuation and space folded; as it is where it is nothing but punctuation."""
    text = "\n".join(message.content for message in row.prompt)
    return normalised(text) or text


def row_text(row: InstructionRow | PreferenceRow) -> str:
    """What near duplicates are judged by: the prompt and the answer that is learned."""
    answer = row.completion if isinstance(row, InstructionRow) else row.chosen
    return "\n".join(message.content for message in (*row.prompt, *answer))
