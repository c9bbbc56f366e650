"""The exam: questions about documents that were trained on, in wordings that were not.

Held-out rows are about documents that no model was trained on, and show style and likelihood. The exam shows whether a model
can answer questions about the documents that it has learned.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from llm_engineering.data.exam_answers import abstains, answers_right
from llm_engineering.data.rows import Message, Row, normalised, words
from llm_engineering.data.similarity import Clusters
from llm_engineering.documents.passages import Passage
from llm_engineering.documents.read import HANDBOOK
from llm_engineering.errors import RequestError
from llm_engineering.evaluation.measures.json_lines import read_json_lines, refuse
from llm_engineering.evaluation.statistics import Rows
from llm_engineering.recipe.data_blocks import EMBEDDED_HANDBOOK
from llm_engineering.recipe.evaluation_blocks import EMBEDDED_CONTROL, EXAM_MEASURES, GENERATED_EXAM, ExamConfig

if TYPE_CHECKING:
    from llm_engineering.evaluation.models import Models, Sample

# Added to the name of a model that answers with passages of the documents: `base+retrieval`.
RETRIEVAL = "+retrieval"
# The file of questions in the artifact of a generated exam. It has the format of a user's own file.
EXAM_FILE = "exam.jsonl"
# Questions that the summary of a run shows.
DRAWN = 3
# Questions without passages have a few dozen tokens, so more of them share a batch. On one CPU core, 46 questions of the
# embedded exam took half the time in batches of 46 that they took in batches of 10.
_SHORT = 4
_EMBEDDED = {EMBEDDED_HANDBOOK: HANDBOOK / "exam.jsonl", EMBEDDED_CONTROL: HANDBOOK / "control.jsonl"}

_Text = Annotated[str, Field(min_length=1)]


class ExamRow(BaseModel):
    """One line of the file: a question and its accepted answers.

    Attributes:
        id: a short name for the question; without one, `line N`.
        answers: the accepted answers, the usual one first. An unanswerable question has none.
        kind: `single` asks for one fact, `multi_hop` needs two, `unanswerable` is not answered by the documents, and
            `control` has nothing to do with the documents.
        facts: names of the facts that the answer needs. Questions about the same fact are not independent, so intervals
            resample them together.
        documents: names of the documents that state these facts.
        evidence: words of a document that give the answer.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    id: str = ""
    question: _Text
    answers: list[_Text] = []
    kind: Literal["single", "multi_hop", "unanswerable", "control"] = "single"
    facts: list[_Text] = []
    documents: list[_Text] = []
    evidence: str = ""

    @model_validator(mode="after")
    def _answerable(self) -> Self:
        if self.kind == "unanswerable" and self.answers:
            raise ValueError("an unanswerable question has no answers: remove `answers`, or choose another `kind`")
        if self.kind != "unanswerable" and not self.answers:
            raise ValueError(f"a question of the kind {self.kind} needs `answers`")
        return self

    @property
    def measure(self) -> str:
        """The measure that the question counts for."""
        return EXAM_MEASURES[self.kind]

    def is_right(self, answer: str) -> bool:
        """Whether an answer is right; for an unanswerable question, whether it declines to answer."""
        return abstains(answer) if self.kind == "unanswerable" else answers_right(answer, self.answers, self.question)


@dataclass(frozen=True)
class Exam:
    """The questions of an exam.

    Attributes:
        rows: the questions about the documents, then the general ones.
        retrieved: the passages that BM25 finds for each question, the best one first. Without retrieval, and for general
            questions, there are none.
    """

    rows: Sequence[ExamRow]
    retrieved: Sequence[Sequence[Passage]]
    max_new_tokens: int

    @cached_property
    def clusters(self) -> list[int]:
        """The cluster of each question: questions of one kind that share a fact are in one, also through other questions.

        A question without facts is in a cluster with those that name the same documents; without documents too, it is
        a cluster of its own.
        """
        return cluster_numbers(
            [
                [(row.measure, "fact", fact) for fact in row.facts]
                or [(row.measure, "documents", *sorted(row.documents)) if row.documents else ("row", number)]
                for number, row in enumerate(self.rows)
            ]
        )

    def values(self, answers: Mapping[int, Sample]) -> dict[str, Rows]:
        """1 for each right answer and 0 for each wrong one, by measure.

        Args:
            answers: by the index of the question.
        """
        found: dict[str, Rows] = {}
        for measure in EXAM_MEASURES.values():
            indices = [index for index in answers if self.rows[index].measure == measure]
            if indices:
                right = [self.rows[index].is_right(answers[index].text) for index in indices]
                found[measure] = Rows.of(right).in_clusters([self.clusters[index] for index in indices])
        return found


def cluster_numbers(shared: Sequence[Sequence[Any]]) -> list[int]:
    """Number the connected groups of items: two items are in one group if they have a key in common.

    Args:
        shared: the keys of each item.
    """
    first: dict[Any, int] = {}
    clusters = Clusters(len(shared))
    for item, keys in enumerate(shared):
        for key in keys:
            clusters.join(item, first.setdefault(key, item))
    return [clusters.find(item) for item in range(len(shared))]


def by_document(rows: Sequence[Row]) -> list[int]:
    """The cluster of each row: its document. A row without a document is one of its own."""
    return cluster_numbers([[row.document or number] for number, row in enumerate(rows)])


def with_written(config: ExamConfig, folder: Path | None) -> ExamConfig:
    """The exam with the file of questions that a run has written to a folder.

    A folder with too few questions has an empty file. The exam is then that of `read_exam` without a file.
    """
    file = folder / EXAM_FILE if folder is not None else None
    if not config.is_generated or file is None or not file.stat().st_size:
        return config
    return config.model_copy(update={"path": str(file)})


def read_exam(config: ExamConfig) -> list[ExamRow]:
    """Read the questions: those about the documents, then the general ones.

    A generated exam has no questions about the documents before a run has written them.

    Raises:
        RequestError: a file is missing or empty, some of its lines are wrong, or a question or an id is there twice. The
            message names the lines.
    """
    rows = [] if config.is_generated else _read(config.path, "exam.path", is_control=False)
    if config.control is not None:
        rows += _read(config.control, "exam.control", is_control=True)
    for what, texts in (
        ("question", [normalised(r.question) or r.question for r in rows]),
        ("id", [r.id for r in rows]),
    ):
        twice = [text for text, count in Counter(texts).items() if count > 1]
        if twice:
            raise RequestError(f"The exam has the {what} {twice[0]!r} twice. Remove one, or change it.")
    return rows


def _read(path: str, key: str, is_control: bool) -> list[ExamRow]:
    numbered = read_json_lines(_EMBEDDED.get(path, path), key, ExamRow, ("question", "`question` and `answers`"))
    place, rows, wrong = Path(path).name.partition(".")[0] if is_control else "", [], []
    for number, row in numbered:
        if is_control and row.kind not in ("control", "single"):
            wrong.append(f"{path}, line {number}: `kind`: a general question has the kind control, not {row.kind}.")
        update = {"id": row.id or f"{place} line {number}".strip(), **({"kind": "control"} if is_control else {})}
        rows.append(row.model_copy(update=update))
    refuse(wrong)
    return rows


def exam_hash(config: ExamConfig) -> str:
    """Hash of the files of an exam, to notice changed ones. Empty for an exam that is generated and has no other file.

    Raises:
        RequestError: a file is missing or has a wrong line.
    """
    read_exam(config)
    files = [path for path in (config.path, config.control) if path not in (None, GENERATED_EXAM)]
    contents = [Path(_EMBEDDED.get(path, path)).expanduser().read_bytes() for path in files]
    return "-".join(hashlib.sha256(content).hexdigest()[:12] for content in contents)


def open_exam(config: ExamConfig, passages: Sequence[Passage]) -> Exam:
    """Read the questions, and find the passages for each.

    Args:
        passages: all passages of the documents. Without any, there is no retrieval.
    """
    rows = read_exam(config)
    retrieved: list[list[Passage]] = [[] for _ in rows]
    asked = [index for index, row in enumerate(rows) if row.kind != "control"]
    if passages and config.retrieval_passages and asked:
        found = retrieve([rows[index].question for index in asked], passages, config.retrieval_passages)
        for index, best in zip(asked, found, strict=True):
            retrieved[index] = best
    return Exam(rows, retrieved, config.max_new_tokens)


def retrieve(questions: Sequence[str], passages: Sequence[Passage], count: int) -> list[list[Passage]]:
    """The `count` best passages of each question by BM25, the best one first. Words are compared without case.

    The ranking is Lucene's variant of BM25 (Kamphuis et al. 2020, arXiv:1911.07540), with k1 1.5 and b 0.75, the
    library's defaults. There must be a question and a passage.
    """
    found, _ = _search(questions, passages, count)
    return [[passages[number] for number in row] for row in found.tolist()]


def best_scores(questions: Sequence[str], passages: Sequence[Passage]) -> list[float]:
    """The score of the best passage of each question, as `retrieve` ranks them. 0 if they share no word."""
    _, scores = _search(questions, passages, 1)
    return [float(row[0]) for row in scores]


def _search(questions: Sequence[str], passages: Sequence[Passage], count: int) -> tuple[Any, Any]:
    """The numbers of the best passages of each question, and their scores: two arrays of `count` columns at most."""
    # Imported here, because reading the exam's file does without.
    import bm25s

    index = bm25s.BM25()
    # The title names the subject, which a passage from the middle of a document may not.
    index.index([words(f"{passage.title} {passage.text}") for passage in passages], show_progress=False)
    asked = [words(question) for question in questions]
    return tuple(index.retrieve(asked, k=min(count, len(passages)), show_progress=False))


def with_passages(question: str, passages: Sequence[Passage]) -> str:
    """A prompt that has passages, each with its title, before the question."""
    return "\n\n".join([*(f"{found.title}\n{found.text}" for found in passages), question])


def take_exam(
    models: Models, name: str, shown_as: str, exam: Exam, with_retrieval: bool
) -> dict[str, dict[int, Sample]]:
    """Have a model answer every question from memory and, `with_retrieval`, also with the passages before the question.

    Args:
        name: the model's name among `models`.
        shown_as: its name in the report and in progress lines.

    Returns:
        For `shown_as`, and for `shown_as+retrieval` if there are passages: the answers by the index of the question.
    """
    prompts = {shown_as: {index: row.question for index, row in enumerate(exam.rows)}}
    if with_retrieval and any(exam.retrieved):
        prompts[shown_as + RETRIEVAL] = {
            index: with_passages(text, exam.retrieved[index])
            for index, text in prompts[shown_as].items()
            if exam.retrieved[index]
        }
    taken = {}
    for arm, texts in prompts.items():
        conversations = [[Message(role="user", content=text)] for text in texts.values()]
        batch_size = models.batch_size * (_SHORT if arm == shown_as else 1)
        answers = models.answers(name, conversations, exam.max_new_tokens, f"exam, {arm}", batch_size)
        taken[arm] = dict(zip(texts, answers, strict=True))
    return taken


def exam_report(exam: Exam, taken: Mapping[str, Mapping[int, Sample]], newest: str, seed: int) -> dict[str, Any]:
    """The report's `exam`: every question with every answer.

    `drawn` has the indices of the questions that the summary shows, in an order drawn with the seed. The first one is the
    first of this order that `base` answers wrong and `newest` right, if there is one.

    Args:
        taken: the answers of each model by its name.
    """
    rows: list[dict[str, Any]] = []
    for index, row in enumerate(exam.rows):
        answers = {
            name: {"text": found[index].text, "cut": found[index].cut, "right": row.is_right(found[index].text)}
            for name, found in taken.items()
            if index in found
        }
        sources = [passage.source for passage in exam.retrieved[index]]
        rows.append({**row.model_dump(), "answers": answers, "accepted": row.answers, "retrieved": sources})
    order = [index for index, row in enumerate(exam.rows) if row.kind != "control"]
    random.Random(seed).shuffle(order)
    learned = [index for index in order if rows[index]["answers"][newest]["right"]]
    learned = [index for index in learned if not rows[index]["answers"]["base"]["right"]][:1]
    return {
        "models": list(taken),
        "max_new_tokens": exam.max_new_tokens,
        "retrieval_passages": max(map(len, exam.retrieved), default=0),
        "kinds": dict(Counter(row.kind for row in exam.rows)),
        "rows": rows,
        "drawn": (learned + [index for index in order if index not in learned])[:DRAWN],
        "first_learned": bool(learned),
    }
