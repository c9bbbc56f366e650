"""Requests and answers of `make serve`, what people said about the answers, and the rows that training makes of it.

A folder holds a journal of answers for each day (UTC), and `feedback.jsonl`. Personal data and secrets are masked before
anything is written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from llm_engineering.data.ledger import Quarantined
from llm_engineering.data.private import redacted
from llm_engineering.data.rows import LabelledRow, Message, PreferenceRow, normalised
from llm_engineering.feedback import journal

FEEDBACK_FILE = "feedback.jsonl"
ANONYMOUS = "anonymous"
_DAYS = "[0-9]*-[0-9]*-[0-9]*.jsonl"
# OpenAI's name of the reason for an answer that reached its limit of tokens.
_CUT = "length"


def served_folder(outputs: Path, recipe_name: str) -> Path:
    """The folder of what a recipe's server writes, in the output folder."""
    return outputs / "served" / recipe_name


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


class Judged(NamedTuple):
    """The last feedback of a person on an answer, and this answer's record; None if its log was deleted."""

    feedback: Mapping[str, Any]
    served: Mapping[str, Any] | None


def read_answers(folder: Path) -> list[dict[str, Any]]:
    """All requests with their answers, the oldest first.

    Raises:
        WorkError: a line of a file is damaged.
    """
    return [record for path in sorted(folder.glob(_DAYS)) for record in journal.read(path)]


def read_feedback(folder: Path) -> list[Judged]:
    """The last feedback of each person on each answer, in the order of the answers' first feedback.

    Raises:
        WorkError: a line of a file is damaged.
    """
    last = {(said["id"], said["user"]): said for said in journal.read(folder / FEEDBACK_FILE)}
    answers = {record["id"]: record for record in read_answers(folder)} if last else {}
    return [Judged(said, answers.get(said["id"])) for said in last.values()]


def feedback_hash(folder: Path) -> str | None:
    """A hash of all feedback that counts, with its answers; None without any. Requests without feedback do not change it."""
    judged = read_feedback(folder)
    return hashlib.sha256(json.dumps(judged, sort_keys=True).encode()).hexdigest()[:16] if judged else None


def labelled_rows(folder: Path) -> list[LabelledRow | Quarantined]:
    """Answers with the label that people gave them, and corrections, which are good answers.

    A good answer that reached its limit of tokens is set aside as `cut_answer`: training would teach to end there.
    """
    rows: list[LabelledRow | Quarantined] = []
    for said, served in read_feedback(folder):
        good = said["thumbs"] == "up"
        if served is None:
            rows.append(_aside(said, "labelled", "no_answer"))
            continue
        shared = _shared(said, served)
        if good and served["finish_reason"] in (_CUT, None):
            rows.append(_aside(said, "labelled", "cut_answer"))
        else:
            rows.append(LabelledRow(**shared, completion=[_answer(served)], label=good))
        if said["correction"] is not None:
            rows.append(LabelledRow(**shared, completion=[_correction(said)], label=True))
    return rows


def preference_rows(folder: Path) -> list[PreferenceRow | Quarantined]:
    """Pairs of a correction, which is chosen, and the answer that it corrects.

    A pair whose answer reached its limit of tokens is set aside as `cut_answer`: it would teach where that limit was.
    """
    rows: list[PreferenceRow | Quarantined] = []
    for said, served in read_feedback(folder):
        if said["correction"] is None:
            continue
        if served is None or served["finish_reason"] in (_CUT, None):
            rows.append(_aside(said, "preference", "no_answer" if served is None else "cut_answer"))
        else:
            shared = _shared(said, served)
            rows.append(PreferenceRow(**shared, chosen=[_correction(said)], rejected=[_answer(served)]))
    return rows


def _shared(said: Mapping[str, Any], served: Mapping[str, Any]) -> dict[str, Any]:
    prompt = [Message(**message) for message in served["messages"]]
    return {"prompt": prompt, "source": f"served {said['id']}", "origin": f"human:{said['user']}"}


def _answer(served: Mapping[str, Any]) -> Message:
    return Message(role="assistant", **served["answer"])


def _correction(said: Mapping[str, Any]) -> Message:
    return Message(role="assistant", content=said["correction"])


_ASIDE = {
    "no_answer": "the log has no answer with this id any more",
    "cut_answer": "the answer is not complete: it reached its limit of tokens, or its client left",
}


def _aside(said: Mapping[str, Any], kind: str, reason: str) -> Quarantined:
    return Quarantined(stage=kind, reason=reason, source=FEEDBACK_FILE, place=said["id"], detail=_ASIDE[reason])


class Asked(NamedTuple):
    """What people ask.

    Attributes:
        questions: each question once, in the words of its first request, with how often it was asked.
        follow_ups: requests that continue a conversation. Alone, their last question does not say what it asks.
    """

    questions: dict[str, int]
    follow_ups: int


def asked_questions(folder: Path) -> Asked:
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
    return Asked(counts, follow_ups)
