"""Blind comparisons of the answers of two models: the session, the verdicts, and the rows that are made of them.

A session is one append-only file. Its first record names the models and the questions; the others are answers and verdicts in
the order in which they came. A reviewer who changes a verdict adds a record, and the last one counts.
"""

from __future__ import annotations

import hashlib
import random
import re
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel

from llm_engineering.data.private import redacted
from llm_engineering.data.rows import (
    AT_LAST_SENTENCE,
    HUMAN,
    QUOTED_CHARS,
    InstructionRow,
    Message,
    PreferenceRow,
    Quarantined,
    split_key,
)
from llm_engineering.documents.sentences import rejected_end
from llm_engineering.errors import RequestError
from llm_engineering.feedback import journal
from llm_engineering.feedback.human_rows import HumanRow, Said
from llm_engineering.recipe.data_blocks import REVIEW
from llm_engineering.recipe.generation_blocks import RejectedCut

FOLDER = "comparisons"
# The verdicts on two answers. `undone` takes an earlier verdict back.
Choice = Literal["first", "second", "tie", "bad", "written", "undone"]


class Compared(BaseModel):
    """A model of a comparison.

    Attributes:
        key: what the review server finds it by, e.g. `3:sft`.
        name: how it is shown when the names are revealed, e.g. `version 3 (sft)`.
        identity: what tells this very model apart from all others, see `evaluation.measures.human_preference.identities`.
        retrieval: whether it answered with passages of the documents in its prompt.
    """

    key: str
    name: str
    identity: str
    retrieval: bool = False

    @property
    def described(self) -> str:
        """The name, with a note on retrieval."""
        return f"{self.name} with retrieval" if self.retrieval else self.name


class Question(BaseModel):
    """A question of a comparison.

    Attributes:
        document: `split_key` of the row that asks it, so that rows about it stay in its split; empty for a reviewer's own.
        split: the split of this row; empty for a reviewer's own, but `test` if it is held out.
        reference: the answer of this row, which is shown when the names are revealed.
    """

    prompt: list[Message]
    source: str
    document: str = ""
    split: str = ""
    reference: str = ""

    @property
    def id(self) -> str:
        """Hash of the prompt."""
        text = "\n".join(f"{message.role}: {message.content}" for message in self.prompt)
        return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]


class Verdict(NamedTuple):
    """A reviewer's last word on a question; `text` is the better answer of the choice `written`."""

    choice: Choice
    at: str
    text: str = ""


class Comparison:
    """A session as its file tells it.

    Attributes:
        models: the two models; in a verdict `first` and `second`.
        questions: by id, in the order in which everyone answers them.
        answers: by question and model (0 or 1).
        cuts: for each answer the number of tokens at which it was cut; None if it ended by itself.
        verdicts: by question and reviewer, without those that were undone.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.reload()

    def reload(self) -> None:
        """Read the file again, to which other processes may have written."""
        head, *records = journal.read(self.path)
        self.models = [Compared.model_validate(model) for model in head["models"]]
        questions = [Question.model_validate(question) for question in head["questions"]]
        self.questions = {question.id: question for question in questions}
        self.asked: str = head["asked"]
        self.seed: int = head["seed"]
        self.at: str = head["at"]
        self.answers: dict[tuple[str, int], str] = {}
        self.cuts: dict[tuple[str, int], int | None] = {}
        self.verdicts: dict[tuple[str, str], Verdict] = {}
        for record in records:
            if record["record"] == "answer":
                place = (record["question"], record["model"])
                if place not in self.answers:
                    self.answers[place], self.cuts[place] = record["text"], record.get("cut")
                continue
            place = (record["question"], record["reviewer"])
            self.verdicts.pop(place, None)
            if record["choice"] != "undone":
                # Popped and added again, so that the last verdict is the last entry.
                self.verdicts[place] = Verdict(record["choice"], record["at"], record.get("text", ""))

    @property
    def id(self) -> str:
        """The name of the session's file."""
        return self.path.stem

    @property
    def reviewers(self) -> list[str]:
        """Everyone who has judged a question, by name."""
        return sorted({reviewer for _, reviewer in self.verdicts})

    def is_swapped(self, question: str, reviewer: str) -> bool:
        """Whether the second model's answer stands on the left, for this question and reviewer."""
        return random.Random(f"{self.seed} {question} {reviewer}").random() < 0.5

    def next_question(self, reviewer: str) -> str | None:
        """The first question that a reviewer has not judged; None if all are judged."""
        return next((question for question in self.questions if (question, reviewer) not in self.verdicts), None)

    def is_answered(self, question: str) -> bool:
        """Whether both models have answered a question."""
        return all((question, model) in self.answers for model in (0, 1))

    def answer(self, question: str, model: int, text: str, cut: int | None = None) -> None:
        """Store the answer of a model, and the number of tokens at which it was cut."""
        self._append({"record": "answer", "question": question, "model": model, "text": text, "cut": cut})

    def judge(self, question: str, reviewer: str, choice: Choice, text: str = "") -> None:
        """Store a reviewer's verdict.

        Raises:
            RequestError: a better answer was chosen and none was written, or the models have not answered the question.
        """
        if not self.is_answered(question):
            raise RequestError("The models have not answered this question yet: wait until both answers are shown.")
        if choice == "written" and not text.strip():
            raise RequestError("The better answer is empty: write one, or choose another verdict.")
        self._append(
            {"record": "verdict", "question": question, "reviewer": reviewer, "choice": choice, "text": text.strip()}
        )

    def undo(self, reviewer: str) -> str | None:
        """Take back the last verdict of a reviewer; returns its question, or None if there is no verdict."""
        last = next((question for question, name in reversed(self.verdicts) if name == reviewer), None)
        if last is not None:
            self._append({"record": "verdict", "question": last, "reviewer": reviewer, "choice": "undone"})
        return last

    def _append(self, record: dict[str, Any]) -> None:
        journal.append(self.path, {**record, "at": _now()})
        self.reload()


def start(folder: Path, models: Sequence[Compared], questions: Sequence[Question], asked: str, seed: int) -> Comparison:
    """Begin a session in the folder of a recipe's reviews. The seed shuffles the questions.

    Args:
        asked: where the questions come from: `held-out`, `training`, `own`, or `own held-out`.

    Raises:
        RequestError: there are no questions, or the two models are the same.
    """
    if not questions:
        raise RequestError(f"There are no {asked} questions to compare answers to: choose another source of questions.")
    if models[0] == models[1]:
        raise RequestError(f"Both models are {models[0].described}: choose two that differ.")
    now = _now()
    # The time first, so that the files are in the order of their beginning.
    path = folder / FOLDER / f"{re.sub('[^0-9T]', '', now[:23])}-{secrets.token_hex(3)}.jsonl"
    shuffled = list({question.id: question for question in questions}.values())
    random.Random(seed).shuffle(shuffled)
    head = {
        "record": "session",
        "at": now,
        "models": [model.model_dump() for model in models],
        "asked": asked,
        "seed": seed,
        "questions": [question.model_dump(exclude_none=True) for question in shuffled],
    }
    journal.append(path, head)
    return Comparison(path)


def drawn(questions: Sequence[Question], count: int, seed: int) -> list[Question]:
    """`count` questions, drawn with the seed; all of them if there are no more."""
    different = list({question.id: question for question in questions}.values())
    return random.Random(seed).sample(different, min(count, len(different)))


def sessions(folder: Path, only: str = "") -> list[Comparison]:
    """All sessions in the folder of a recipe's reviews, the oldest first. `only` is the id of a session to read alone."""
    files = [path for path in sorted((folder / FOLDER).glob("*.jsonl")) if only in ("", path.stem)]
    # A process that was killed while it began a session leaves a file without a whole record.
    return [Comparison(path) for path in files if b"\n" in path.read_bytes()]


def said(folder: Path, kind: str, rejected_cut: RejectedCut) -> Said:
    """Rows of a kind, made of all verdicts: pairs of answers, and the better answers that reviewers wrote.

    The winner of a question is what more reviewers chose. A written answer is chosen over both answers, and is an instruction
    row too. A question without a winner and without a written answer is set aside.

    A pair whose winner was cut is set aside as `cut_answer`, because training would teach to end there. A rejected answer that
    was cut ends as `rejected_cut` says, like that of a generated pair.
    """
    rows: list[HumanRow] = []
    aside: list[Quarantined] = []
    for session in sessions(folder):
        for number, (key, question) in enumerate(session.questions.items(), 1):
            verdicts = {name: verdict for (asked, name), verdict in session.verdicts.items() if asked == key}
            if not verdicts or kind not in ("instruction", "preference"):
                continue
            source = f"review {session.id}, question {number}"
            made, reasons = _rows(session, question, verdicts, kind, source, rejected_cut)
            rows += made
            if not made and not reasons and kind == "preference":
                choices = {verdict.choice for verdict in verdicts.values()}
                reasons = [("both_bad" if choices == {"bad"} else "tie", "by " + ", ".join(sorted(verdicts)))]
            text = redacted(question.prompt[-1].content)[:QUOTED_CHARS]
            aside += [
                Quarantined(stage=kind, reason=reason, source=source, place=key, detail=detail, text=text)
                for reason, detail in reasons
            ]
    return Said(rows, [], aside)


def _rows(
    session: Comparison,
    question: Question,
    verdicts: dict[str, Verdict],
    kind: str,
    source: str,
    rejected_cut: RejectedCut,
) -> tuple[list[HumanRow], list[tuple[str, str]]]:
    """The rows of a question, and the reason and detail of each row that its answers do not give."""
    shared: dict[str, Any] = {
        "prompt": question.prompt,
        "source": source,
        "origin": HUMAN + REVIEW,
        "document": question.document,
    }
    answers = [session.answers[question.id, model] for model in (0, 1)]
    cuts = [session.cuts[question.id, model] for model in (0, 1)]
    names = [model.described for model in session.models]
    made: list[tuple[InstructionRow | PreferenceRow, list[str], str]] = []
    # What is chosen, the tokens at which it was cut, the rejected model, who says so, and about what.
    pairs: list[tuple[str, int | None, int, list[str], str]] = []
    for name in [name for name, verdict in verdicts.items() if verdict.choice == "written"]:
        better = verdicts[name].text
        if kind == "instruction":
            row = InstructionRow(**shared, completion=_turn(better))
            made.append((row, [name], f"written instead of the answers of {names[0]} and {names[1]}"))
        pairs += [(better, None, loser, [name], f"written over {names[loser]}") for loser in (0, 1)]
    votes = [[name for name, verdict in verdicts.items() if verdict.choice == side] for side in ("first", "second")]
    if len(votes[0]) != len(votes[1]):
        winner = 0 if len(votes[0]) > len(votes[1]) else 1
        about = f"{names[winner]} over {names[1 - winner]}"
        pairs.append((answers[winner], cuts[winner], 1 - winner, votes[winner], about))
    aside: list[tuple[str, str]] = []
    for chosen, cut, loser, by, about in pairs if kind == "preference" else ():
        rejected, origin = answers[loser], shared["origin"]
        if cuts[loser] is not None:
            rejected = rejected_end(rejected, rejected_cut)
            origin += f", {AT_LAST_SENTENCE}" if rejected_cut != "keep" else ""
        if cut is not None:
            aside.append(("cut_answer", f"{about}, at {cut} tokens; by {', '.join(sorted(by))}"))
        elif cuts[loser] is not None and not rejected:
            aside.append(("rejected_cut", f"{about}, at {cuts[loser]} tokens; by {', '.join(sorted(by))}"))
        else:
            pair = PreferenceRow(**shared | {"origin": origin}, chosen=_turn(chosen), rejected=_turn(rejected))
            made.append((pair, by, about))
    rows = [
        HumanRow(
            row,
            by=", ".join(sorted(by)),
            at=max(verdicts[name].at for name in by),
            about=about,
            held_out=question.split == "test",
        )
        for row, by, about in made
    ]
    return rows, aside


def question_of(row: InstructionRow, split: str) -> Question:
    """The question of a row of a dataset."""
    return Question(
        prompt=row.prompt,
        source=row.source,
        document=split_key(row),
        split=split,
        reference="\n".join(message.content for message in row.completion),
    )


def own_question(text: str, source: str, held_out: bool = False) -> Question:
    """A reviewer's own question; `held_out` if it is asked to judge models, so that no row is made of it."""
    prompt = [Message(role="user", content=text)]
    return Question(prompt=prompt, source=source, split="test" if held_out else "")


def _turn(text: str) -> list[Message]:
    return [Message(role="assistant", content=text)]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
