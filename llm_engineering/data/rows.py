"""The canonical rows: conversational, in TRL's columns, with an id and where they come from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from datasets import Dataset, Features, List, Value
from pydantic import BaseModel, ConfigDict, field_validator

ROLES = ("system", "user", "assistant")
_MESSAGES = List({"role": Value("string"), "content": Value("string")})
_ORIGIN = {"id": Value("string"), "source": Value("string"), "origin": Value("string"), "document": Value("string")}
INSTRUCTION_FEATURES = Features({**_ORIGIN, "prompt": _MESSAGES, "completion": _MESSAGES})
PREFERENCE_FEATURES = Features({**_ORIGIN, "prompt": _MESSAGES, "chosen": _MESSAGES, "rejected": _MESSAGES})


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
