"""Requests and answers of `make serve`, what people said about the answers, and the rows that training makes of it.

A folder holds a journal of answers for each day (UTC), and `feedback.jsonl`. Personal data and secrets are masked before
anything is written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from llm_engineering.data.private import redacted
from llm_engineering.data.rows import (
    HUMAN,
    InstructionRow,
    LabelledRow,
    Message,
    PreferenceRow,
    Quarantined,
    normalised,
)
from llm_engineering.feedback import journal
from llm_engineering.feedback.human_rows import HumanRow, Said

FEEDBACK_FILE = "feedback.jsonl"
ANONYMOUS = "anonymous"
_DAYS = "[0-9]*-[0-9]*-[0-9]*.jsonl"
# Why an answer ended before its end: it reached its limit of tokens, as OpenAI names it, or its client left.
_INCOMPLETE = ("length", None)


@dataclass(frozen=True)
class ServedLog:
    """Writes what one server is asked, what it answers, and what people say about its answers.

    Attributes:
        version: the number of the served version of the model.
        adapter: the hash of its trained weights.
    """

    folder: Path
    version: int
    adapter: str

    def write_answer(
        self,
        answer_id: str,
        messages: Sequence[Mapping[str, str]],
        answer: Mapping[str, str],
        finish_reason: str | None,
        usage: Mapping[str, int] | None,
    ) -> None:
        """Write a request and its answer.

        Args:
            answer: `content`, and `reasoning_content` if the model reasoned.
            finish_reason: why the answer ended; None if the client left or the engine failed before its end.
            usage: tokens of the prompt and of the answer.
        """
        now = datetime.now(UTC)
        record = {
            # First in its line: `has_answer` searches for it.
            "id": answer_id,
            "time": now.isoformat(timespec="seconds"),
            "version": self.version,
            "adapter": self.adapter,
            "messages": [{**message, "content": redacted(message["content"])} for message in messages],
            "answer": {name: redacted(text) for name, text in answer.items()},
            "finish_reason": finish_reason,
            "usage": usage,
        }
        self._append(f"{now:%Y-%m-%d}.jsonl", record)

    def has_answer(self, answer_id: str) -> bool:
        """Whether an answer with this id was written, also by an earlier server."""
        start = f'{{"id": {json.dumps(answer_id)}, '.encode()
        for path in sorted(self.folder.glob(_DAYS), reverse=True):
            with path.open("rb") as lines:
                if any(line.startswith(start) for line in lines):
                    return True
        return False

    def write_feedback(self, answer_id: str, thumbs: str, correction: str | None, user: str | None) -> None:
        """Write what a person said about an answer: `up` or `down`, and perhaps a better answer."""
        record = {
            "id": answer_id,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "thumbs": thumbs,
            "correction": redacted(correction) if correction is not None else None,
            "user": user or ANONYMOUS,
        }
        self._append(FEEDBACK_FILE, record)

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Only the user of this machine who serves the model may read what people ask.
        (self.folder / name).touch(mode=0o600)
        journal.append(self.folder / name, record)


class RatedAnswer(NamedTuple):
    """The last feedback of a person on an answer, and this answer's record; None if its log was deleted."""

    feedback: Mapping[str, Any]
    served: Mapping[str, Any] | None


def read_answers(folder: Path) -> list[dict[str, Any]]:
    """All requests with their answers, the oldest first.

    Raises:
        WorkError: a line of a file is damaged.
    """
    return [record for path in sorted(folder.glob(_DAYS)) for record in journal.read(path)]


def read_feedback(folder: Path) -> list[RatedAnswer]:
    """The last feedback of each person on each answer, in the order of the answers' first feedback.

    Raises:
        WorkError: a line of a file is damaged.
    """
    last = {(record["id"], record["user"]): record for record in journal.read(folder / FEEDBACK_FILE)}
    answers = {record["id"]: record for record in read_answers(folder)} if last else {}
    return [RatedAnswer(record, answers.get(record["id"])) for record in last.values()]


def said(folder: Path, kind: str) -> Said:
    """Rows of a kind, made of all feedback.

    An answer is a labelled row. A correction is chosen over the answer in a pair, a good labelled answer, and an instruction
    row. An answer that is not complete is neither a good answer nor a rejected one, because training would teach to end
    there: it is set aside as `cut_answer`.
    """
    rows: list[HumanRow] = []
    aside: list[Quarantined] = []
    for feedback, served in read_feedback(folder):
        reasons = _reasons(feedback, served, kind)
        aside += [
            Quarantined(stage=kind, reason=reason, source=FEEDBACK_FILE, place=feedback["id"], detail=detail)
            for reason, detail in reasons.items()
        ]
        if served is not None:
            made = _rows(feedback, served, kind, is_cut="cut_answer" in reasons)
            about = f"version {served['version']}"
            rows += [HumanRow(row, by=feedback["user"], at=feedback["time"], about=about) for row in made]
    return Said(rows, [], aside)


def _reasons(feedback: Mapping[str, Any], served: Mapping[str, Any] | None, kind: str) -> dict[str, str]:
    """Why a row that the feedback asks for cannot be made, by the reason's name."""
    has_pair = kind == "preference" and feedback["correction"] is not None
    has_label = kind == "labelled"
    if served is None:
        return {"no_answer": "the log has no answer with this id any more"} if has_pair or has_label else {}
    if served["finish_reason"] in _INCOMPLETE and (has_pair or (has_label and feedback["thumbs"] == "up")):
        return {"cut_answer": "the answer reached its limit of tokens, or the client left before its end"}
    return {}


def _rows(
    feedback: Mapping[str, Any], served: Mapping[str, Any], kind: str, is_cut: bool
) -> Iterator[InstructionRow | PreferenceRow]:
    shared: dict[str, Any] = {
        "prompt": [Message(**message) for message in served["messages"]],
        "source": f"served {feedback['id']}",
        "origin": HUMAN + feedback["user"],
    }
    answer = [Message(role="assistant", **served["answer"])]
    better = [Message(role="assistant", content=text)] if (text := feedback["correction"]) is not None else None
    if kind == "labelled" and not is_cut:
        yield LabelledRow(**shared, completion=answer, label=feedback["thumbs"] == "up")
    if better is None:
        return
    if kind == "labelled":
        yield LabelledRow(**shared, completion=better, label=True)
    elif kind == "preference" and not is_cut:
        yield PreferenceRow(**shared, chosen=better, rejected=answer)
    elif kind == "instruction":
        yield InstructionRow(**shared, completion=better)


class AskedQuestions(NamedTuple):
    """What people ask.

    Attributes:
        questions: each question once, in the words of its first request, with how often it was asked.
        follow_ups: requests that continue a conversation. Alone, their last question does not say what it asks.
    """

    questions: dict[str, int]
    follow_ups: int


def asked_questions(folder: Path) -> AskedQuestions:
    """The questions of all requests, without case and punctuation as the difference, in the order of their first request.

    Raises:
        WorkError: a line of a file is damaged.
    """
    first: dict[str, str] = {}
    counts: dict[str, int] = {}
    follow_ups = 0
    for record in read_answers(folder):
        turns = [message["content"] for message in record["messages"] if message["role"] == "user"]
        if len(turns) != 1:
            follow_ups += 1
            continue
        text = first.setdefault(normalised(turns[0]) or turns[0], turns[0])
        counts[text] = counts.get(text, 0) + 1
    return AskedQuestions(counts, follow_ups)
