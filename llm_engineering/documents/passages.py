"""Cuts documents into passages at paragraph and sentence borders, and keeps the passages that are prose."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import PurePath

from pydantic import BaseModel, ConfigDict
from semantic_text_splitter import TextSplitter

from llm_engineering.data.ledger import Quarantined
from llm_engineering.documents.read import Document
from llm_engineering.recipe.data_blocks import DocumentsConfig

# A passage with a smaller share of letters and spaces is a table, code or grammar. Chosen on the Python reference: 0.85
# keeps prose with inline code, and removes operator tables and listings.
MIN_PROSE_SHARE = 0.85
# Documents whose lines with `#` are headings. HTML headings are read as such lines.
_WITH_HEADINGS = (".md", ".markdown", ".html", ".htm")
_HEADING = re.compile(r"^#{1,6}[ \t]+(.+?)[ \t#]*$", re.MULTILINE)


class Passage(BaseModel):
    """A piece of a document, its white space folded. `start` and `end` are positions in the document's text.

    `title` is the title of the document, with the heading of the passage's section if it has one.
    """

    model_config = ConfigDict(frozen=True)

    id: str
    document: str
    title: str
    start: int
    end: int
    text: str

    @property
    def place(self) -> str:
        """The passage's characters in its document."""
        return f"characters {self.start}-{self.end}"


def cut_passages(
    documents: Sequence[Document], config: DocumentsConfig, seed: int
) -> tuple[list[Passage], list[Quarantined]]:
    """Cut all documents. Passages that are no prose, too short or repeated are quarantined.

    With `max_passages`, that many passages are drawn with the seed, and the others are quarantined as `not_drawn`.
    """
    kept: list[Passage] = []
    quarantine: list[Quarantined] = []
    first_place: dict[str, str] = {}
    for passage in chunks(documents, config):
        reason, detail = _problem(passage.text, config.passage_min_chars)
        if not reason and passage.id in first_place:
            reason, detail = "exact_duplicate", f"first seen in {first_place[passage.id]}"
        if reason:
            quarantine.append(_rejected(passage, reason, detail))
        else:
            first_place[passage.id] = f"{passage.document}, {passage.place}"
            kept.append(passage)
    if config.max_passages is not None and len(kept) > config.max_passages:
        drawn = set(random.Random(seed).sample(range(len(kept)), config.max_passages))
        detail = f"documents.max_passages is {config.max_passages}"
        quarantine += [_rejected(p, "not_drawn", detail) for i, p in enumerate(kept) if i not in drawn]
        kept = [p for i, p in enumerate(kept) if i in drawn]
    return kept, quarantine


def chunks(documents: Sequence[Document], config: DocumentsConfig) -> list[Passage]:
    """Cut all documents, and keep every passage, also tables, short ones and repetitions. Retrieval searches these."""
    splitter = TextSplitter((config.passage_min_chars, config.passage_max_chars))
    passages = []
    for document in documents:
        for title, start, chunk in _chunks(document, splitter):
            text = re.sub(r"\s+", " ", chunk).strip()
            passages.append(
                Passage(
                    id=hashlib.sha256(text.encode()).hexdigest()[:16],
                    document=document.source,
                    title=title,
                    start=start,
                    end=start + len(chunk),
                    text=text,
                )
            )
    return passages


def _chunks(document: Document, splitter: TextSplitter) -> Iterator[tuple[str, int, str]]:
    """Title, position and text of each piece. A heading is the title of its section and not a part of the text."""
    headings = list(_HEADING.finditer(document.text)) if PurePath(document.source).suffix in _WITH_HEADINGS else []
    borders = [(0, document.title), *((h.end(), _section_title(document.title, h[1])) for h in headings)]
    ends = [*(h.start() for h in headings), len(document.text)]
    for (start, title), end in zip(borders, ends, strict=True):
        for place, chunk in splitter.chunk_indices(document.text[start:end]):
            yield title, start + place, chunk


def _section_title(document: str, heading: str) -> str:
    return heading if document.casefold() in heading.casefold() else f"{document}: {heading}"


def _problem(text: str, min_chars: int) -> tuple[str, str]:
    if len(text) < min_chars:
        return "too_short", f"{len(text)} characters, documents.passage_min_chars is {min_chars}"
    share = sum(c.isalpha() or c == " " for c in text) / len(text)
    if share < MIN_PROSE_SHARE or "::=" in text:
        return "not_prose", f"{share:.2f} of it is letters and spaces"
    if not (text[0].isupper() or text[0] in "\"'“‘(") or text[-1] not in ".!?\"'”’)":
        return "cut_mid_sentence", "does not start and end like a sentence"
    return "", ""


def _rejected(passage: Passage, reason: str, detail: str) -> Quarantined:
    return Quarantined(
        stage="passage",
        reason=reason,
        source=passage.document,
        place=passage.place,
        detail=detail,
        text=passage.text[:200],
    )
