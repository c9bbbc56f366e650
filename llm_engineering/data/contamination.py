"""Finds training rows that stand in an evaluation file, by shared runs of words (Brown et al. 2020, appendix C)."""

from __future__ import annotations

import re
from collections.abc import Iterator

import xxhash

from llm_engineering.data.duplicates import normalised
from llm_engineering.data.rows import InstructionRow, Message, PreferenceRow

_WORD = re.compile(rb"[^ ]+")
# Longest quotation of what is shared, in characters.
QUOTE_CHARS = 100


class EvaluationIndex:
    """The n-grams of evaluation rows, as 64-bit hashes: about 90 bytes for each word of the evaluation files.

    Two rows share an n-gram if n words in a row are the same in both, but for case and punctuation. Prompts and answers
    count, each message by itself; system messages do not, as all rows of a dataset share them. An evaluation prompt of
    fewer than n words counts as a whole, and only against whole prompts. A short answer is no evidence.

    Args:
        n: words in an n-gram. GPT-3's evaluation used 13.
    """

    def __init__(self, n: int) -> None:
        self.n = n
        self.grams: set[int] = set()
        self.short_prompts: set[int] = set()

    def add(self, row: InstructionRow | PreferenceRow) -> None:
        """Add an evaluation row."""
        for message in _messages(row):
            self._add_grams(message.content)
        self._add_short(_prompt(row))

    def add_text(self, text: str) -> None:
        """Add a text that may be a prompt or an answer."""
        self._add_grams(text)
        self._add_short(normalised(text).encode())

    def _add_grams(self, text: str) -> None:
        self.grams.update(xxhash.xxh3_64_intdigest(gram) for gram in self._grams(text))

    def _add_short(self, prompt: bytes) -> None:
        if prompt and prompt.count(b" ") + 1 < self.n:
            self.short_prompts.add(xxhash.xxh3_64_intdigest(prompt))

    def match(self, row: InstructionRow | PreferenceRow) -> str:
        """The words that a training row shares with an evaluation row, at most QUOTE_CHARS characters; or empty."""
        if self.grams:
            for message in _messages(row):
                for gram in self._grams(message.content):
                    if xxhash.xxh3_64_intdigest(gram) in self.grams:
                        return gram.decode()[:QUOTE_CHARS]
        if self.short_prompts:
            prompt = _prompt(row)
            if xxhash.xxh3_64_intdigest(prompt) in self.short_prompts:
                return prompt.decode()[:QUOTE_CHARS]
        return ""

    def _grams(self, text: str) -> Iterator[bytes]:
        folded = normalised(text).encode()
        words = [match.span() for match in _WORD.finditer(folded)]
        for first, last in zip(words, words[self.n - 1 :], strict=False):
            yield folded[first[0] : last[1]]


def _messages(row: InstructionRow | PreferenceRow) -> Iterator[Message]:
    answers = row.completion if isinstance(row, InstructionRow) else [*row.chosen, *row.rejected]
    return (message for message in (*row.prompt, *answers) if message.role != "system")


def _prompt(row: InstructionRow | PreferenceRow) -> bytes:
    return normalised(" ".join(message.content for message in row.prompt if message.role != "system")).encode()
