"""Says what documents say in other forms, by rule: the rewritings for writers that are too small to rewrite.

A fact that a model reads in one form is mostly not available to later questions (Allen-Zhu and Li, arXiv:2309.14316). The
words are those of the documents and of the accepted questions, so nothing has to be checked again.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from llm_engineering.data.rows import REPLAY, TWO_HOP, InstructionRow, TextRow
from llm_engineering.documents.document import Document
from llm_engineering.documents.passages import Passage
from llm_engineering.documents.sentences import known_names
from llm_engineering.generation.answers import WORD
from llm_engineering.recipe.generation_blocks import Rewriting

# Entries or sentences of one text. Longer texts would be divided when they are formatted, and lose their titles.
_ENTRIES = 6
ItemT = TypeVar("ItemT")


def rewrite_by_rule(
    kinds: Sequence[Rewriting],
    documents: Sequence[Document],
    sentences: Sequence[Passage],
    questions: Sequence[InstructionRow],
    seed: int,
) -> list[TextRow]:
    """Write every document in other forms.

    Args:
        kinds: some of `faq`, `dialogue`, `list` and `reordered`.
        sentences: those of the documents.
        questions: the accepted questions about the documents. `faq` and `dialogue` are made from them.
        seed: for the order of the sentences of `reordered`.
    """
    titles = {document.source: document.title for document in documents}
    by_document: dict[str, list[Passage]] = {source: [] for source in titles}
    for sentence in sentences:
        by_document[sentence.document].append(sentence)
    asked: dict[str, list[InstructionRow]] = {source: [] for source in titles}
    for row in questions:
        if row.document in asked and row.origin != REPLAY and not row.origin.startswith(TWO_HOP):
            asked[row.document].append(row)
    names = known_names(sentence.text for sentence in sentences)
    made: list[TextRow] = []
    for kind in kinds:
        for source, own in by_document.items():
            if kind in ("faq", "dialogue"):
                made += _question_texts(kind, titles[source], asked[source], own)
            elif kind == "list":
                made += _lists(own)
            else:
                made += _reordered(own, names, random.Random(f"{seed} {source}"))
    return made


def _question_texts(
    kind: Rewriting, title: str, rows: Sequence[InstructionRow], sentences: Sequence[Passage]
) -> Iterator[TextRow]:
    """The questions with their short answers under the title, or as a dialogue with whole sentences as answers."""
    by_source: dict[str, list[Passage]] = {}
    for sentence in sentences:
        by_source.setdefault(sentence.source, []).append(sentence)
    for part in _parts(rows):
        entries = []
        for row in part:
            question, answer = row.prompt[0].content, row.completion[0].content
            whole = next((one.text for one in by_source.get(row.source, []) if answer in one.text), answer)
            entries.append(f"A: {question}\nB: {whole}" if kind == "dialogue" else f"{question}\n{_sentence(answer)}")
        text = "\n".join(entries) if kind == "dialogue" else "\n\n".join([title, *entries])
        yield TextRow(text=text, source=_joined(part), origin=f"{kind} by rule", document=part[0].document)


def _lists(sentences: Sequence[Passage]) -> Iterator[TextRow]:
    """The sentences of each section as items under its title."""
    sections: dict[str, list[Passage]] = {}
    for sentence in sentences:
        sections.setdefault(sentence.title, []).append(sentence)
    for title, section in sections.items():
        for part in _parts(section):
            yield _row("list", "\n".join([title, *(f"- {sentence.text}" for sentence in part)]), part)


def _reordered(sentences: Sequence[Passage], names: set[str], drawn: random.Random) -> Iterator[TextRow]:
    """The sentences of a document, grouped by the names that they share, in another order."""
    known = [names & {word.removesuffix("'s") for word in WORD.findall(sentence.text)} for sentence in sentences]
    counts = Counter(name for found in known for name in found)
    groups: dict[str, list[Passage]] = {}
    for sentence, found in zip(sentences, known, strict=True):
        # A name of nearly every sentence groups nothing, and a name of one sentence shares nothing.
        shared = [name for name in sorted(found) if 1 < counts[name] <= len(sentences) / 2]
        groups.setdefault(max(shared, key=counts.__getitem__, default=""), []).append(sentence)
    for group in groups.values():
        drawn.shuffle(group)
    ordered = drawn.sample(list(groups.values()), len(groups))
    for part in _parts([sentence for group in ordered for sentence in group]):
        if len(part) > 1:
            yield _row("reordered", " ".join(sentence.text for sentence in part), part)


def _row(kind: Rewriting, text: str, sentences: Sequence[Passage]) -> TextRow:
    return TextRow(text=text, source=_joined(sentences), origin=f"{kind} by rule", document=sentences[0].document)


def _joined(parts: Iterable[Passage | InstructionRow]) -> str:
    """The places of the parts, each once; only the first and the last of more than two."""
    places = list(dict.fromkeys(part.source for part in parts))
    return " to ".join([places[0], places[-1]] if len(places) > 1 else places)


def _parts(items: Sequence[ItemT]) -> Iterator[Sequence[ItemT]]:
    """The items in parts of nearly equal size, of at most `_ENTRIES`."""
    count = -(-len(items) // _ENTRIES)
    for number in range(count):
        yield items[len(items) * number // count : len(items) * (number + 1) // count]


def _sentence(answer: str) -> str:
    """A short answer as a sentence: with a capital, and a full stop if it has no end."""
    capital = answer[:1].upper() + answer[1:]
    return capital if capital.endswith((".", "!", "?")) else f"{capital}."
