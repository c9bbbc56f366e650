"""Instruction rows from passages: the model writes a question for each, the passage is the answer."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from llm_engineering.data.quarantine import Quarantined
from llm_engineering.data.rows import InstructionRow, Message
from llm_engineering.documents.passages import Passage
from llm_engineering.generation.local import LocalModel

QUESTION_PROMPT = Path(__file__).parent / "prompts" / "question.txt"

MIN_QUESTION_CHARS = 15
MAX_QUESTION_CHARS = 200
_QUESTION_WORD = re.compile(
    r"(what|which|when|where|who|whose|why|how|is|are|was|were|do|does|did|can|could|should|will|would|has|have|may|in)\b",
    re.IGNORECASE,
)
# A reader of the question alone does not see the passage, so the question must not speak of it.
_MENTIONS_PASSAGE = re.compile(
    r"\b(passage|text|excerpt|extract|paragraph|context|sentence|this (question|code|example)|following|above|below)\b",
    re.IGNORECASE,
)
_WORD = re.compile(r"[a-z_]{3,}")
# Words that any question has: sharing only these with the passage says nothing about it.
_COMMON_WORDS = frozenset(
    [
        "what",
        "which",
        "when",
        "where",
        "who",
        "whose",
        "why",
        "how",
        "are",
        "was",
        "were",
        "does",
        "did",
        "can",
        "could",
        "should",
        "will",
        "would",
        "has",
        "have",
        "may",
        "the",
        "and",
        "for",
        "with",
        "that",
        "this",
        "from",
        "not",
        "you",
        "your",
        "use",
        "used",
        "using",
        "purpose",
        "difference",
        "between",
        "value",
        "type",
        "object",
        "python",
        "name",
        "meaning",
        "mean",
        "result",
        "example",
        "called",
        "main",
        "function",
    ]
)


def prompt_hash() -> str:
    """Version of the question prompt: the hash of its file."""
    return hashlib.sha256(QUESTION_PROMPT.read_bytes()).hexdigest()[:12]


def generate_instructions(
    passages: Sequence[Passage], model: LocalModel, question_max_new_tokens: int
) -> tuple[list[InstructionRow], list[Quarantined]]:
    """Ask for a question for each passage and keep the usable ones; the others are quarantined with the reason."""
    template = QUESTION_PROMPT.read_text(encoding="utf-8").strip()
    requests = [
        [{"role": "user", "content": template.format(title=passage.title, passage=passage.text)}]
        for passage in passages
    ]
    answers = model.answer(requests, question_max_new_tokens, "questions", stop=["?"])
    # Small models like to announce what they write.
    questions = [answer.removeprefix("Question:").strip() for answer in answers]
    rows: list[InstructionRow] = []
    quarantine: list[Quarantined] = []
    seen: dict[str, str] = {}
    for passage, question in zip(passages, questions, strict=True):
        reason = question_problem(question, passage.text)
        normalised = " ".join(_WORD.findall(question.lower()))
        if not reason and normalised in seen:
            reason = "repeated_question"
        if reason:
            quarantine.append(
                Quarantined(
                    stage="instruction",
                    reason=reason,
                    source=passage.document,
                    place=passage.place,
                    detail=f"asked for with prompt {prompt_hash()}",
                    text=question[:200],
                )
            )
            continue
        seen[normalised] = passage.id
        rows.append(
            InstructionRow(
                prompt=[Message(role="user", content=question)],
                completion=[Message(role="assistant", content=passage.text)],
                source=f"{passage.document}:{passage.place}",
                origin=f"question by {model.identity}, answer from the document",
                document=passage.document,
            )
        )
    return rows, quarantine


def question_problem(question: str, passage: str) -> str:
    """The reason why a generated question is of no use, or an empty string."""
    if not question.endswith("?"):
        return "not_a_question"
    if not MIN_QUESTION_CHARS <= len(question) <= MAX_QUESTION_CHARS or "\n" in question:
        return "question_length"
    if not _QUESTION_WORD.match(question):
        return "not_a_question"
    if _MENTIONS_PASSAGE.search(question):
        return "mentions_passage"
    words = set(_WORD.findall(question.lower())) - _COMMON_WORDS
    if not words & set(_WORD.findall(passage.lower())):
        return "not_grounded"
    return ""
