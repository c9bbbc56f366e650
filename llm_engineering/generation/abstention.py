"""Makes questions that the documents do not answer, by rule, for pairs that teach a model to decline.

Most of them are written questions that get another name: "How much does a Pebble Stove cost?" becomes "How much does a Heron
Pump cost?". So the model has to know what the documents say about each name, and cannot tell by the kind of the question.
The others are common questions from a file.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

from llm_engineering.data.rows import REPLAY, InstructionRow, Message, PreferenceRow, Quarantined, normalised
from llm_engineering.documents.sentences import FUNCTION_WORDS
from llm_engineering.generation.answers import WORD
from llm_engineering.generation.derived.question_wordings import other_wordings
from llm_engineering.generation.prompts import read_prompt
from llm_engineering.generation.types import Answer, Client, Failure, Sampling
from llm_engineering.recipe.generation_blocks import PreferenceWriting

ABSTENTION = "The documents do not say."
# One word or several, each with a capital; the first word of a question is left out.
NAME = re.compile(r"(?<=\s)[A-Z][\w-]+(?: [A-Z][\w-]+)*")
# Words with the same beginning count as the same word: "designer" and "designed".
_STEM = 5
# Shorter words say little about what is asked.
_LONG = 4
# Share of the rows that the client answers right for which it shall not decline. With 0, a model declines half of the exam.
_DECLINING_SHARE = 0.25
# Of general questions few are needed: their answers were known before. In single runs, 0.62 of those in the exam were right
# with 0.1, 0.69 and 0.63 with 0.3.
_GENERAL_SHARE = 0.2
# Share of written questions with another name among those without an answer. With 0.5, 25 of 40 questions of the exam were
# declined, with this share 31. A common question gives itself away by its words.
_RENAMED_SHARE = 0.75
# Beginnings of words that any sentence about a name may answer: "What comes from Lumray?".
_VAGUE = frozenset([
    "built", "calle", "come", "comes", "held", "locat", "made", "make", "makes", "name", "place", "site", "stand", "take",
    "takes", "town",
])  # fmt: skip
# Draws for each question that is wanted. Most fail, because a document answers the question or it was made before.
_TRIES = 20
# A name in fewer questions may be a mistake of the writer.
_QUESTIONS = 2


def unanswerable(
    rows: Sequence[InstructionRow], texts: Sequence[str], number: int, seed: int, exclude: Sequence[str] = ()
) -> list[str]:
    """Make questions that no text answers: most are written questions with another name, the others are common ones.

    A question counts as unanswered if no sentence has its name together with another of its longer words. One without such words is
    not made.

    Args:
        rows: the written questions.
        texts: the sentences of the documents.
        number: how many questions to make; fewer if the documents name too little.
        exclude: questions that are not made.
    """
    drawn = random.Random(seed)
    questions = [row.prompt[0].content for row in rows]
    counts = Counter(name for question in questions for name in set(NAME.findall(question)))
    names = sorted(name for name, count in counts.items() if count >= _QUESTIONS)
    # A name about which much is asked also gets more questions that have no answer.
    weights = [counts[name] for name in names]
    known = [f" {normalised(text)} " for text in texts]
    made: dict[str, str] = {}
    taken = {normalised(question) for question in (*questions, *exclude)}

    def add(question: str, name: str) -> None:
        key = normalised(question)
        if key not in made and key not in taken and not _answered(question, name, known):
            made[key] = question

    if not names:
        return []
    for _ in range(_TRIES * number):
        if len(made) >= _RENAMED_SHARE * number:
            break
        question, name = drawn.choice(questions), drawn.choices(names, weights)[0]
        replaced = NAME.findall(question)
        if len(replaced) == 1 and replaced[0] != name:
            add(question.replace(replaced[0], name), name)
    templates = read_prompt("unanswerable").splitlines()
    for _ in range(_TRIES * number):
        if len(made) >= number:
            break
        name = drawn.choices(names, weights)[0]
        add(drawn.choice(templates).format(name=name), name)
    return list(made.values())


def generate_abstentions(
    rows: Sequence[InstructionRow],
    texts: Sequence[str],
    client: Client,
    writing: PreferenceWriting,
    seed: int,
    reworded: Sequence[InstructionRow] = (),
    exclude: Sequence[str] = (),
) -> tuple[list[PreferenceRow], list[Quarantined], int]:
    """Make pairs from the rows, from reworded ones, and from questions that the documents do not answer.

    Without `reworded` rows a model learns to decline the wordings that it does not know, instead of what it does not know.

    For a question without an answer, `ABSTENTION` is chosen, and the client's own answer is rejected. For a row, its answer
    is chosen. The client's own answer is rejected if it is wrong. If it is right, the rejected answer is that of another
    question with the same first word, or `ABSTENTION` for a share of the rows. For rows of `data.replay_instructions` it is
    `ABSTENTION`, whatever the client answers.

    `ABSTENTION` is not rejected for all rows: DPO would make it so improbable that no question gets it any more.

    Args:
        rows: the instructions, with the general ones.
        texts: the sentences of the documents.
        reworded: rows with the same answers in wordings that the client was not trained on. With them, few general rows are used.
        exclude: questions that are not made, because an exam asks them.

    Returns:
        pairs, quarantine, and how many questions there were.
    """
    drawn = random.Random(seed)
    taken = {normalised(question) for question in (*(row.prompt[0].content for row in rows), *exclude)}
    # Declining costs fewer right answers if each fact is asked in several wordings here.
    reworded = [*reworded, *other_wordings(reworded, 1)]
    reworded = [row for row in reworded if normalised(row.prompt[0].content) not in taken]
    written = [*(row for row in rows if row.origin != REPLAY), *reworded]
    if reworded:
        rows = [*reworded, *(row for row in rows if row.origin != REPLAY or drawn.random() < _GENERAL_SHARE)]
    # With more of them, known questions are declined too.
    most = math.ceil(len(rows) / 2)
    questions = unanswerable(written, texts, min(writing.unanswerable, most), seed, exclude)
    asked = [*((row.prompt[0].content, row) for row in rows), *((question, None) for question in questions)]
    sampling = Sampling(writing.rejected_max_new_tokens)
    requests = [[{"role": "user", "content": question}] for question, _ in asked]
    others: dict[str, list[str]] = defaultdict(list)
    for row in written:
        others[_first_word(row)].append(row.completion[0].content)
    pairs: list[PreferenceRow] = []
    quarantine: list[Quarantined] = []
    replies = client.answer(requests, sampling, "own answers")
    for (question, known), reply in zip(asked, replies, strict=True):
        chosen = known.completion[0].content if known is not None else ABSTENTION
        rejected = reply.text.strip() if isinstance(reply, Answer) else ""
        if known is not None and known.origin == REPLAY:
            # An own answer may be right in other words: "India" for "The Taj Mahal is in India.".
            rejected = ABSTENTION
        elif known is not None and f" {normalised(chosen)} " in f" {normalised(rejected)} ":
            wrong = [answer for answer in others[_first_word(known)] if normalised(answer) != normalised(chosen)]
            rejected = ABSTENTION if drawn.random() < _DECLINING_SHARE or not wrong else drawn.choice(wrong)
        if not rejected or rejected == chosen:
            reason = "no_rejected_answer"
            detail = (
                reply.detail if isinstance(reply, Failure) else "the model's own answer is empty, or the chosen one"
            )
            quarantine.append(Quarantined(stage="preference", reason=reason, source=question, place="", detail=detail))
            continue
        origin = known.origin if known is not None else "no document answers it"
        pairs.append(
            PreferenceRow(
                prompt=[Message(role="user", content=question)],
                chosen=[Message(role="assistant", content=chosen)],
                rejected=[Message(role="assistant", content=rejected)],
                source=known.source if known is not None else question,
                origin=f"chosen: {origin}; rejected by {client.identity}",
                document=known.document if known is not None else "",
            )
        )
    return pairs, quarantine, len(asked)


def _first_word(row: InstructionRow) -> str:
    return row.prompt[0].content.partition(" ")[0]


def _answered(question: str, name: str, known: Sequence[str]) -> bool:
    """Whether a sentence has the name and another longer word of the question, or the question has none: "Where is Corvin?"."""
    folded = f" {normalised(name)} "
    words = WORD.findall(normalised(question.replace(name, " ")).casefold())[1:]
    stems = {word[:_STEM] for word in words if len(word) >= _LONG and word not in FUNCTION_WORDS} - _VAGUE
    return not stems or any(folded in text and any(f" {stem}" in text for stem in stems) for text in known)
