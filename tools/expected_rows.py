"""Counts the documents and passages of a recipe, and the rows that a run can expect from them. `--dry-run` prints this."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

from llm_engineering.data.rows import MIN_ROWS, Quarantined, split_of
from llm_engineering.documents.document import Document
from llm_engineering.documents.passages import Passage, cut_passages
from llm_engineering.documents.read import read_documents
from llm_engineering.generation.facts import ROUNDS, questions_asked, questions_by_rule
from llm_engineering.recipe.evaluation_blocks import MIN_QUESTIONS
from llm_engineering.recipe.generation_blocks import GenerationConfig
from llm_engineering.recipe.recipe import Recipe

# English text has about four characters to a token, in tokenizers with vocabularies of 32,000 and more.
CHARACTERS_PER_TOKEN = 4
# The share of questions of the embedded model that were usable: 168 of 320 about passages of the Python reference, and 359
# of at most 2,012 about facts of the handbook. Endpoints have larger models, so all of their questions are expected.
USABLE = {"passage": 0.5, "fact": 0.18}
# Questions of a generated exam for each question that is asked for: 24 of at most 560 about the files of examples/company. An endpoint
# writes one for each passage, and all are expected to be usable.
EXAM_SHARE = {"passage": 1.0, "fact": 0.04}

# Questions in new words for each question about the handbook: 465 and 490.
_REWORDED = 0.95
# How many tokens the rewritings of a kind have for each token of the documents, measured on the embedded handbook for
# those by rule. An endpoint's are estimated by what their prompts ask for.
TEXT_OF_KIND = {"faq": 1.2, "dialogue": 2.1, "list": 1.3, "reordered": 1.0, "summary": 0.5, "reworded": 1.0}

# Held-out documents that are named. The others are counted.
_NAMED = 12


class Expected(NamedTuple):
    """The rows of a kind to expect: at most, about, and how they are made."""

    most: int
    about: int
    how: str


class Source:
    """A recipe's documents, the passages cut from them, and the rows to expect; each is computed once, when it is needed."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe

    @cached_property
    def documents(self) -> tuple[list[Document], list[Quarantined]]:
        """`read_documents`."""
        return read_documents(self._recipe.documents)

    @cached_property
    def passages(self) -> tuple[list[Passage], list[Quarantined]]:
        """`cut_passages`."""
        return cut_passages(self.documents[0], self._recipe.documents, self._recipe.seed)

    @cached_property
    def instructions(self) -> Expected:
        """The rows that are written about the passages."""
        writing, passages = self._recipe.generation, self.passages[0]
        most = questions_asked(passages) if writing.questions == "fact" else len(passages)
        share = USABLE[writing.questions] if writing.client == "local" else 1.0
        how = f"the embedded model writes a usable question in {share:.0%} of its tries" if share < 1 else ""
        by_rule = questions_by_rule(passages) if writing.questions == "fact" else 0
        how += f", rules write at most {by_rule}" if by_rule else ""
        how += f"{', and ' if how else ''}at most {writing.two_hop} questions need two facts" if writing.two_hop else ""
        more = by_rule + writing.two_hop
        return Expected(most + more, math.floor(most * share) + more, how)


def data_lines(recipe: Recipe, last: str, source: Source | None = None) -> list[str]:
    """Documents, passages and expected rows as lines of text, with a warning if they are too few to train on.

    The user's own datasets are not counted.

    Args:
        last: the last stage that the run trains.
        source: the recipe's documents, if they have been read.

    Raises:
        RequestError: the documents cannot be read.
    """
    kinds, data = recipe.kinds(last), recipe.data
    generated = "instruction" in kinds and data.file("instruction") is None
    if not generated and "text" not in kinds:
        return []
    source = source or Source(recipe)
    documents, unread = source.documents
    lines = [f"Documents: {len(documents)} read{_aside(unread)}"]
    has_own_test = data.test_file("instruction") is not None
    held_out = [d.source for d in documents if split_of(d.source, data.split, has_own_test) != "train"]
    if held_out:
        more = f" and {len(held_out) - _NAMED} more" if len(held_out) > _NAMED else ""
        lines.append(f"Held out, not trained on: {', '.join(held_out[:_NAMED])}{more}")
    by_sentence = recipe.documents.unit == "sentence"
    passages, rejected = source.passages if generated or by_sentence else ([], [])
    if generated or by_sentence:
        lines.append(f"{'Sentences' if by_sentence else 'Passages'}: {len(passages)} kept{_aside(rejected)}")
    if "text" in kinds:
        piece = recipe.formatting.max_length * CHARACTERS_PER_TOKEN
        texts = len(passages) if by_sentence else sum(math.ceil(len(document.text) / piece) for document in documents)
        lines += _rows("text", texts, texts, "")
        if recipe.generation.rewritings:
            limit = (
                "" if recipe.knowledge is None else f", until knowledge.tokens ({recipe.knowledge.tokens:,}) is reached"
            )
            lines.append(f"Rewritings of these texts: {', '.join(recipe.generation.rewritings)}{limit}")
    if generated:
        writing = recipe.generation
        rows = source.instructions
        lines += _rows("instruction", *rows)
        if "preference" in kinds and data.file("preference") is None:
            lines += _rows("preference", *pair_rows(writing, rows))
        if "labelled" in kinds and data.made_of("labelled") == "preference" and data.file("preference") is None:
            lines.append("Rows: labelled, two for each preference row")
        if "prompt" in kinds and data.file("prompt") is None:
            lines += _rows("prompt", rows.most, rows.about, "one prompt for each instruction row")
        if recipe.exam is not None and recipe.exam.is_generated:
            lines += _exam(recipe.exam.questions, math.floor(rows.most * EXAM_SHARE[writing.questions]))
    return lines


def pair_rows(writing: GenerationConfig, instructions: Expected) -> Expected:
    """The pairs that are made of instruction rows."""
    most, about, _ = instructions
    if not writing.unanswerable:
        limit = writing.max_preferences or most
        return Expected(min(most, limit), min(about, limit), "one pair for each instruction row")
    how = f"questions in new wordings, the instruction rows, and at most {writing.unanswerable} questions without an answer"
    # All answers may get a question in new words, and rules another one.
    known, known_about = most + 2 * (most // ROUNDS), math.floor(about * (1 + _REWORDED))
    unanswered = [min(writing.unanswerable, math.ceil(number / 2)) for number in (known, known_about)]
    return Expected(known + unanswered[0], known_about + unanswered[1], how)


def _rows(kind: str, most: int, expected: int, how: str) -> list[str]:
    number = f"at most {most}" if expected == most else f"about {expected}, at most {most}"
    lines = [f"Rows: {kind}, {number}{f' ({how})' if how else ''}"]
    if expected < MIN_ROWS:
        certain = "These are" if most < MIN_ROWS else "These are probably"
        lines.append(
            f"WARNING: {certain} too few {kind} rows to train on, which needs at least {MIN_ROWS}: the run would end before "
            "training. Add documents."
        )
    return lines


def _exam(wanted: int, expected: int) -> list[str]:
    lines = [f"Exam: about {min(wanted, expected)} questions about facts, at most {wanted}, written from the documents"]
    if expected < MIN_QUESTIONS:
        lines.append(
            f"WARNING: These are probably too few for an exam, which needs at least {MIN_QUESTIONS}: no model would be examined or "
            "promoted. Add documents, or write your own questions and set exam.path to their file."
        )
    return lines


def _aside(rejected: Sequence[Quarantined]) -> str:
    reasons = Counter(row.reason for row in rejected)
    return (
        f", {len(rejected)} set aside ({', '.join(f'{r} {n}' for r, n in reasons.most_common())})" if rejected else ""
    )
