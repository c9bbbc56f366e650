"""Writes questions about single facts: each passage is a sentence, and the answer is a few words of it.

A small base model writes poor questions when it is asked to, and better ones when it continues examples. Each sentence is
read once with each file of examples, so it gives up to one row for each file.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from llm_engineering.data.ledger import Quarantined
from llm_engineering.data.rows import InstructionRow, Message
from llm_engineering.documents.passages import Passage
from llm_engineering.generation.instructions import FROM_DOCUMENT, RAW_CHARS
from llm_engineering.generation.prompts import FACT_EXAMPLES, prompt_hash, read_prompt
from llm_engineering.generation.types import Completer, Failure, Sampling
from llm_engineering.recipe.generation_blocks import InstructionWriting

# A longer answer repeats most of its sentence.
MAX_ANSWER_WORDS = 6
# Examples are separated by a blank line, so the model writes one after the answer.
STOP = ("\n\n",)
# "1,200" and "9:30" are one word.
_WORD = re.compile(r"\d+(?:[.,:]\d+)*\w*|\w+")
# A small model answers "What is the Tide Fair?" with any word of the sentence.
_ABOUT_A_NAME = re.compile(r"(?:What|Who) (?:is|are|was|were) (?:the )?(?:[A-Z]\w+ ?)+\?")
# Words before an answer that do not change it. "before" and "until" do.
_LEADING = frozenset(["a", "an", "the", "at", "by", "for", "from", "in", "into", "of", "on", "to", "with", "within"])


def questions_asked(passages: Sequence[Passage]) -> int:
    """How many questions `generate_facts` has written: one for each sentence and file of examples."""
    return len(passages) * len(FACT_EXAMPLES)


def generate_facts(
    passages: Sequence[Passage], client: Completer, writing: InstructionWriting
) -> tuple[list[InstructionRow], list[Quarantined]]:
    """Have the client write a question and its answer for each sentence and each file of examples.

    Returns:
        rows and quarantine, together `questions_asked(passages)`.
    """
    rows: list[InstructionRow] = []
    quarantine: list[Quarantined] = []
    seen: set[str] = set()
    for examples in FACT_EXAMPLES:
        versioned = f"{examples} (prompt {prompt_hash(examples)})"
        shared = read_prompt(examples)
        prompts = [f"{shared}\n\nSentence: {passage.text}\nQuestion:" for passage in passages]
        sampling = Sampling(writing.question_max_new_tokens, stop=STOP)
        what = f"questions with the examples {examples}"
        for passage, written in zip(passages, client.complete(prompts, sampling, what), strict=True):
            fact = read_fact(written.text, passage.text)
            if not isinstance(fact, Failure) and _normal(fact[0]) in seen:
                fact = Failure("repeated_question", "", written.text)
            if isinstance(fact, Failure):
                quarantine.append(
                    Quarantined(
                        stage="instruction",
                        reason=fact.reason,
                        source=passage.document,
                        place=passage.place,
                        detail=versioned,
                        text=fact.text[:RAW_CHARS],
                    )
                )
                continue
            question, answer = fact
            seen.add(_normal(question))
            rows.append(
                InstructionRow(
                    prompt=[Message(role="user", content=question)],
                    completion=[Message(role="assistant", content=answer)],
                    source=passage.source,
                    origin=f"{versioned} by {client.identity}, {FROM_DOCUMENT}",
                    document=passage.document,
                )
            )
    return rows, quarantine


def read_fact(text: str, sentence: str) -> tuple[str, str] | Failure:
    """Read a question and its answer from a completion.

    Returns:
        the question, and the answer as the sentence spells it, without a leading article or preposition; or why the
        completion is unusable.
    """
    question, _, rest = text.strip().partition("\nAnswer:")
    question = question.strip()
    if not question.endswith("?") or "\n" in question:
        return Failure("not_a_question", "", text)
    answer = _quoted(rest.strip().partition("\n")[0], sentence)
    if not answer:
        return Failure("answer_not_in_sentence", "", text)
    if _contains(question, answer):
        return Failure("answer_in_question", "", text)
    if len(answer.split()) > MAX_ANSWER_WORDS:
        return Failure("answer_length", "", text)
    if _ABOUT_A_NAME.fullmatch(question) or _names(answer) & _names(question.partition(" ")[2]):
        return Failure("answer_does_not_fit", "", text)
    # The first word of a question is capitalised in any case.
    if not _names(sentence) & _names(question.partition(" ")[2]):
        return Failure("names_nothing", "", text)
    return question, answer


def _quoted(answer: str, sentence: str) -> str:
    """The words of the answer as the sentence spells them; empty if it does not contain them in this order."""
    words = _WORD.findall(answer.casefold())
    while words and words[0] in _LEADING:
        words = words[1:]
    places = list(_WORD.finditer(sentence))
    spelled = [place.group().casefold() for place in places]
    for first in range(len(spelled) - len(words) + 1 if words else 0):
        if spelled[first : first + len(words)] == words:
            return sentence[places[first].start() : places[first + len(words) - 1].end()]
    return ""


def _contains(text: str, words: str) -> bool:
    return f" {_normal(words)} " in f" {_normal(text)} "


def _normal(text: str) -> str:
    return " ".join(_WORD.findall(text.casefold()))


def _names(text: str) -> set[str]:
    """The capitalised words, except "I"."""
    return {word for word in _WORD.findall(text) if word[0].isupper()} - {"I"}
