"""Finds the passages that share the most telling words with a question: BM25, by the library bm25s."""

from __future__ import annotations

from collections.abc import Sequence

import bm25s

from llm_engineering.data.rows import words
from llm_engineering.documents.passages import Passage


def retrieve(questions: Sequence[str], passages: Sequence[Passage], count: int) -> list[list[Passage]]:
    """The `count` best passages of each question, the best one first. Words are compared without case.

    The ranking is Lucene's variant of BM25 (Kamphuis et al. 2020, arXiv:1911.07540), with k1 1.5 and b 0.75, the
    library's defaults. There must be a question and a passage.
    """
    index = bm25s.BM25()
    # The title names the subject, which a passage from the middle of a document may not.
    index.index([words(f"{passage.title} {passage.text}") for passage in passages], show_progress=False)
    asked = [words(question) for question in questions]
    found, _ = index.retrieve(asked, k=min(count, len(passages)), show_progress=False)
    return [[passages[number] for number in row] for row in found.tolist()]
