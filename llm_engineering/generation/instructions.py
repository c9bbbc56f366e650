"""Writes instruction rows from passages.

A client writes a question or task for each passage. The passage itself is the answer, or the client writes that too.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from llm_engineering.data.rows import InstructionRow, Message, Quarantined
from llm_engineering.documents.passages import Passage
from llm_engineering.generation.prompts import ANSWER_EXAMPLES, FACT_EXAMPLES, prompt_hash, read_prompt
from llm_engineering.generation.question_rules import is_contentless, points_at_text
from llm_engineering.generation.types import Answer, Client, Failure, Messages, Sampling
from llm_engineering.recipe.generation_blocks import InstructionWriting, Style

# If a row's answer is text of the document, the row's `origin` ends with these words.
FROM_DOCUMENT = "answer from the document"
# Strings that end a small model's question or task: without them the model continues with an answer.
STOP: dict[Style, tuple[str, ...]] = {"question": ("?",), "how_to": ("?",), "task": ("\n",)}

MIN_QUESTION_CHARS = 15
MAX_QUESTION_CHARS = 200
# Share of a question's content words that the passage must contain: below it, small models ask about something else.
MIN_GROUNDED_SHARE = 0.5
_QUESTION_WORD = re.compile(
    r"(what|which|when|where|who|whose|why|how|is|are|was|were|do|does|did|can|could|should|will|would|has|have|may|in)\b",
    re.IGNORECASE,
)
_WORD = re.compile(r"[a-z_]{3,}")
# Words that occur in any question: they do not show that a question is about its passage.
_COMMON_WORDS = frozenset([
    "what", "which", "when", "where", "who", "whose", "why", "how", "are", "was", "were", "does", "did", "can", "could",
    "should", "will", "would", "has", "have", "may", "the", "and", "for", "with", "that", "this", "from", "not", "you",
    "your", "use", "used", "using", "purpose", "difference", "between", "value", "type", "object", "python", "name",
    "meaning", "mean", "result", "example", "called", "main", "function",
])  # fmt: skip


def generate_instructions(
    passages: Sequence[Passage], client: Client, writing: InstructionWriting, seed: int
) -> tuple[list[InstructionRow], list[Quarantined]]:
    """Have the client write a row for each passage; unusable ones are quarantined with the reason."""
    styles = [draw_style(passage, writing, seed) for passage in passages]
    questions: dict[int, str] = {}
    outcomes: dict[int, Answer | Failure] = {}
    seen: set[str] = set()
    written = _instructions(passages, styles, client, writing, seed)
    for index, (passage, style, instruction) in enumerate(zip(passages, styles, written, strict=True)):
        if isinstance(instruction, Failure):
            outcomes[index] = instruction
            continue
        # Small models often announce what they write.
        question = instruction.text.removeprefix("Question:").removeprefix("Task:").strip()
        normalised = " ".join(_WORD.findall(question.lower()))
        reason = instruction_problem(question, passage.text, style)
        if not reason and normalised in seen:
            reason = "repeated_question"
        if reason:
            outcomes[index] = Failure(reason, "", question)
            continue
        seen.add(normalised)
        questions[index] = question
        outcomes[index] = Answer(passage.text)
    if writing.answers == "model":
        outcomes |= _answers(passages, questions, client, writing, seed)

    rows: list[InstructionRow] = []
    quarantine: list[Quarantined] = []
    answered = _versioned("answer", client)
    for index, (passage, style) in enumerate(zip(passages, styles, strict=True)):
        asked, outcome = _versioned(style, client), outcomes[index]
        if isinstance(outcome, Failure):
            prompt = answered if index in questions else asked
            detail = f"{prompt}: {outcome.detail}" if outcome.detail else prompt
            quarantine.append(passage.set_aside("instruction", outcome.reason, detail, outcome.text))
            continue
        origin = f"{asked} by {client.identity}, {FROM_DOCUMENT}"
        if writing.answers == "model":
            origin = f"{asked} and {answered} by {client.identity}"
        rows.append(
            InstructionRow(
                prompt=[Message(role="user", content=questions[index])],
                completion=[Message(role="assistant", content=outcome.text)],
                source=passage.source,
                origin=origin,
                document=passage.document,
            )
        )
    return rows, quarantine


def prompt_versions(client: Client, writing: InstructionWriting) -> dict[str, str]:
    """The hash of every prompt that the recipe uses, by the name of its file."""
    if writing.questions == "fact":
        return {file: prompt_hash(file) for file in (*FACT_EXAMPLES, ANSWER_EXAMPLES)}
    names: list[str] = [style for style, weight in writing.styles.items() if weight]
    if writing.answers == "model":
        names.append("answer")
    return {file: prompt_hash(file) for file in (_prompt_name(name, client) for name in names)}


def draw_style(passage: Passage, writing: InstructionWriting, seed: int) -> Style:
    """Draw a style by its weight. The draw depends on the passage and the seed, not on the other passages."""
    names = sorted(writing.styles)
    return random.Random(f"{seed} {passage.id}").choices(names, [writing.styles[name] for name in names])[0]


def _prompt_name(name: str, client: Client) -> str:
    """The prompt file for this client: endpoints have longer prompts than the small local model."""
    return f"{name}_endpoint" if client.writes_json else name


def _versioned(name: str, client: Client) -> str:
    """A prompt's name and hash, as rows and quarantine record them."""
    return f"{name} (prompt {prompt_hash(_prompt_name(name, client))})"


def _request(prompt: str, passage: Passage, instruction: str = "") -> Messages:
    text = prompt.format(title=passage.title, passage=passage.text, instruction=instruction)
    return [{"role": "user", "content": text}]


def _instructions(
    passages: Sequence[Passage], styles: Sequence[Style], client: Client, writing: InstructionWriting, seed: int
) -> list[Answer | Failure]:
    """One instruction for each passage, in their order. The instructions of one style are requested in one call."""
    outcomes: dict[int, Answer | Failure] = {}
    for style in sorted(set(styles)):
        prompt = read_prompt(_prompt_name(style, client))
        chosen = [index for index, drawn in enumerate(styles) if drawn == style]
        sampling = Sampling(
            writing.question_max_new_tokens,
            client.temperature,
            seed,
            () if client.writes_json else STOP[style],
            "instruction" if client.writes_json else None,
        )
        what = {"question": "questions", "task": "tasks", "how_to": "how-to questions"}[style]
        requests = [_request(prompt, passages[index]) for index in chosen]
        outcomes |= zip(chosen, client.answer(requests, sampling, what), strict=True)
    return [outcomes[index] for index in range(len(passages))]


def _answers(
    passages: Sequence[Passage], questions: dict[int, str], client: Client, writing: InstructionWriting, seed: int
) -> dict[int, Answer | Failure]:
    """The client's answers to the usable questions, by the passage's index."""
    assert writing.answer_max_new_tokens is not None
    prompt = read_prompt(_prompt_name("answer", client))
    requests = [_request(prompt, passages[index], question) for index, question in questions.items()]
    field = "answer" if client.writes_json else None
    sampling = Sampling(writing.answer_max_new_tokens, client.temperature, seed, json_field=field)
    return dict(zip(questions, client.answer(requests, sampling, "answers"), strict=True))


def instruction_problem(text: str, passage: str, style: Style) -> str:
    """Why a generated question or task is unusable, as the quarantine's reason; empty if it is usable."""
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
    if is_contentless(text):
        return "contentless"
    if points_at_text(text):
        return "mentions_passage"
    words = set(_WORD.findall(text.lower())) - _COMMON_WORDS
    shared = words & set(_WORD.findall(passage.lower()))
    if len(shared) < max(1, MIN_GROUNDED_SHARE * len(words)):
        return "not_grounded"
    return ""
