"""Instruction rows from passages: a client writes a question or task for each, and the passage is the answer or the
client writes that too."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from llm_engineering.data.ledger import Quarantined
from llm_engineering.data.rows import InstructionRow, Message
from llm_engineering.documents.passages import Passage
from llm_engineering.generation.prompts import prompt_hash, read_prompt
from llm_engineering.generation.types import Answer, Client, Failure, Sampling
from llm_engineering.recipe.generation_blocks import InstructionWriting, Style

# How a row's origin ends whose answer is the document's own text.
FROM_DOCUMENT = "answer from the document"
# What ends a small model's question or task, after which it would go on to answer it.
STOP: dict[Style, tuple[str, ...]] = {"question": ("?",), "how_to": ("?",), "task": ("\n",)}

MIN_QUESTION_CHARS = 15
MAX_QUESTION_CHARS = 200
# Of a question's telling words, as many must stand in the passage: with fewer, small models ask about something else.
MIN_GROUNDED_SHARE = 0.5
# Of a raw text, as much as a person needs to see what went wrong.
RAW_CHARS = 200
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


def generate_instructions(
    passages: Sequence[Passage], client: Client, writing: InstructionWriting, seed: int
) -> tuple[list[InstructionRow], list[Quarantined]]:
    """Ask for an instruction for each passage and keep the usable ones; the others are quarantined with the reason."""
    styles = [draw_style(passage, writing, seed) for passage in passages]
    written = _instructions(passages, styles, client, writing, seed)
    rejected: dict[int, Failure] = {}
    questions: dict[int, str] = {}
    seen: set[str] = set()
    for index, (passage, style, outcome) in enumerate(zip(passages, styles, written, strict=True)):
        if isinstance(outcome, Failure):
            rejected[index] = outcome
            continue
        # Small models like to announce what they write.
        question = outcome.text.removeprefix("Question:").removeprefix("Task:").strip()
        reason = instruction_problem(question, passage.text, style)
        normalised = " ".join(_WORD.findall(question.lower()))
        if not reason and normalised in seen:
            reason = "repeated_question"
        if reason:
            rejected[index] = Failure(reason, "", question)
            continue
        seen.add(normalised)
        questions[index] = question
    answers: dict[int, Answer | Failure] = {index: Answer(passages[index].text) for index in questions}
    if writing.answers == "model":
        answers = _answers(passages, questions, client, writing, seed)
    rows: list[InstructionRow] = []
    quarantine: list[Quarantined] = []
    for index, (passage, style) in enumerate(zip(passages, styles, strict=True)):
        prompt = f"{style} (prompt {prompt_hash(_prompt(style, client))})"
        outcome = rejected[index] if index in rejected else answers[index]
        if isinstance(outcome, Failure):
            asked = prompt if index in rejected else f"answer (prompt {prompt_hash(_prompt('answer', client))})"
            quarantine.append(
                Quarantined(
                    stage="instruction",
                    reason=outcome.reason,
                    source=passage.document,
                    place=passage.place,
                    detail=f"{asked}{f': {outcome.detail}' if outcome.detail else ''}",
                    text=outcome.text[:RAW_CHARS],
                )
            )
            continue
        written_by = f"{prompt} by {client.identity}, {FROM_DOCUMENT}"
        if writing.answers == "model":
            answered = f"answer (prompt {prompt_hash(_prompt('answer', client))})"
            written_by = f"{prompt} and {answered} by {client.identity}"
        rows.append(
            InstructionRow(
                prompt=[Message(role="user", content=questions[index])],
                completion=[Message(role="assistant", content=outcome.text)],
                source=f"{passage.document}:{passage.place}",
                origin=written_by,
                document=passage.document,
            )
        )
    return rows, quarantine


def prompt_versions(client: Client, writing: InstructionWriting) -> dict[str, str]:
    """The hash of every prompt that the recipe uses, by its file's name."""
    used = [_prompt(style, client) for style, weight in writing.styles.items() if weight]
    used += [_prompt("answer", client)] if writing.answers == "model" else []
    return {name: prompt_hash(name) for name in used}


def draw_style(passage: Passage, writing: InstructionWriting, seed: int) -> Style:
    """A style by its weight, with the seed; the same for a passage whatever the others are."""
    names = sorted(writing.styles)
    return random.Random(f"{seed} {passage.id}").choices(names, [writing.styles[name] for name in names])[0]


def _prompt(name: str, client: Client) -> str:
    return f"{name}_endpoint" if client.writes_json else name


def _instructions(
    passages: Sequence[Passage], styles: Sequence[Style], client: Client, writing: InstructionWriting, seed: int
) -> list[Answer | Failure]:
    outcomes: dict[int, Answer | Failure] = {}
    for style in sorted(set(styles)):
        template = read_prompt(_prompt(style, client))
        chosen = [index for index, drawn in enumerate(styles) if drawn == style]
        requests = [
            [
                {
                    "role": "user",
                    "content": template.format(title=passages[index].title, passage=passages[index].text),
                }
            ]
            for index in chosen
        ]
        sampling = Sampling(
            writing.question_max_new_tokens,
            client.temperature,
            seed,
            () if client.writes_json else STOP[style],
            "instruction" if client.writes_json else None,
        )
        what = {"question": "questions", "task": "tasks", "how_to": "how-to questions"}[style]
        outcomes |= zip(chosen, client.answer(requests, sampling, what), strict=True)
    return [outcomes[index] for index in range(len(passages))]


def _answers(
    passages: Sequence[Passage], questions: dict[int, str], client: Client, writing: InstructionWriting, seed: int
) -> dict[int, Answer | Failure]:
    assert writing.answer_max_new_tokens is not None
    template = read_prompt(_prompt("answer", client))
    requests = [
        [
            {
                "role": "user",
                "content": template.format(
                    title=passages[index].title, passage=passages[index].text, instruction=question
                ),
            }
        ]
        for index, question in questions.items()
    ]
    field = "answer" if client.writes_json else None
    sampling = Sampling(writing.answer_max_new_tokens, client.temperature, seed, json_field=field)
    outcomes = client.answer(requests, sampling, "answers")
    return dict(zip(questions, outcomes, strict=True))


def instruction_problem(text: str, passage: str, style: Style) -> str:
    """The reason why a generated question or task is of no use, or an empty string."""
    is_question = text.endswith("?")
    if style == "task" and is_question:
        return "not_a_task"
    if style != "task" and not is_question:
        return "not_a_question"
    if not MIN_QUESTION_CHARS <= len(text) <= MAX_QUESTION_CHARS or "\n" in text:
        return "question_length"
    if style == "question" and not _QUESTION_WORD.match(text):
        return "not_a_question"
    if style == "how_to" and not text.lower().startswith("how"):
        return "not_a_how_to"
    if _MENTIONS_PASSAGE.search(text):
        return "mentions_passage"
    words = set(_WORD.findall(text.lower())) - _COMMON_WORDS
    shared = words & set(_WORD.findall(passage.lower()))
    if len(shared) < max(1, MIN_GROUNDED_SHARE * len(words)):
        return "not_grounded"
    return ""
