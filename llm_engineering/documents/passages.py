"""Cuts documents into passages at paragraph and sentence borders, and keeps the passages that are prose.

With `documents.unit: sentence` a passage is a single sentence, and those that name something are kept.
"""

from __future__ import annotations

import hashlib
import logging
import random
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import PurePath

from pydantic import BaseModel, ConfigDict
from semantic_text_splitter import TextSplitter

from llm_engineering.data.rows import QUOTED_CHARS, Quarantined
from llm_engineering.data.wording import order_to_model, turn_mark
from llm_engineering.documents.document import Document
from llm_engineering.documents.sentences import FENCED, known_names, names_something, sentences
from llm_engineering.recipe.data_blocks import DocumentsConfig

logger = logging.getLogger(__name__)

# A passage with a smaller share of letters and spaces is a table, code or grammar. Chosen on the Python reference: 0.85
# keeps prose with inline code, and removes operator tables and listings.
MIN_PROSE_SHARE = 0.85
# The words of a claim. Shorter phrases recur in ordinary text.
_CLAIM_WORDS = 6
# A claim in more than this share of the passages, and in at least so many, is worth a look. In the handbook, where each fact
# stands in four to seven documents, no six words stand in more than 1 %.
_FLOOD_SHARE = 0.1
_FLOOD_PASSAGES = 20
# A sentence with fewer words is a label or an exclamation.
MIN_SENTENCE_WORDS = 4
# Documents whose lines with `#` are headings. The headings of other formats than Markdown are read as such lines.
_WITH_HEADINGS = (".md", ".markdown", ".html", ".htm", ".pdf", ".docx", ".pptx", ".epub", ".ipynb")
_HEADING = re.compile(r"^#{1,6}[ \t]+(.+?)[ \t#]*$", re.MULTILINE)
_ITEM_MARK = re.compile(r"\s*[-*+•]\s+(?=\S)")


class Passage(BaseModel):
    """A piece of a document, its white space folded. `start` and `end` are positions in the document's text.

    `title` is the title of the document, with the heading of the passage's section if it has one. `part` is the page, slide,
    section or cell that the passage is in; empty if the format has none.
    """

    model_config = ConfigDict(frozen=True)

    id: str
    document: str
    title: str
    start: int
    end: int
    text: str
    part: str = ""

    @property
    def place(self) -> str:
        """The part of the document that the passage is in, or its characters in a document without parts."""
        return self.part or f"characters {self.start}-{self.end}"

    @property
    def source(self) -> str:
        """The document and the place, as rows name their source: `manual.pdf, page 3`, or `guide.md:characters 0-120`."""
        return f"{self.document}, {self.part}" if self.part else f"{self.document}:{self.place}"

    def set_aside(self, stage: str, reason: str, detail: str, text: str) -> Quarantined:
        """The quarantine record of the passage, or of what was made of it: `text`."""
        return Quarantined(
            stage=stage, reason=reason, source=self.document, place=self.place, detail=detail, text=text[:QUOTED_CHARS]
        )


def cut_passages(
    documents: Sequence[Document], config: DocumentsConfig, seed: int
) -> tuple[list[Passage], list[Quarantined]]:
    """Cut all documents. Passages that are no prose, too short or repeated are quarantined.

    A model writes questions from the passages, so those that give it orders or spell marks of a chat format are too.

    Sentences are quarantined if they are too short, too long or repeated, or name nothing, and so is code in fences. All
    documents together show which words are names.
    With `max_passages`, that many passages are drawn with the seed, and the others are quarantined as `not_drawn`.
    """
    kept: list[Passage] = []
    quarantine: list[Quarantined] = []
    first_place: dict[str, str] = {}
    by_sentence = config.unit == "sentence"
    passages = list(_sentences(documents)) if by_sentence else chunks(documents, config)
    if by_sentence:
        quarantine += [
            _passage(document, "", *code.span(), code[0]).set_aside("passage", "not_prose", "code in a fence", code[0])
            for document in documents
            for code in FENCED.finditer(document.text)
        ]
    names = known_names(passage.text for passage in passages) if by_sentence else set()
    for passage in passages:
        if by_sentence:
            reason, detail = _sentence_problem(passage.text, config.passage_max_chars, names)
        else:
            reason, detail = _problem(passage.text, config.passage_min_chars)
        if order := order_to_model(passage.text):
            reason, detail = "order_to_model", f"contains “{order}”"
        elif mark := turn_mark(passage.text):
            reason, detail = "turn_mark", f"contains {mark}"
        if not reason and passage.id in first_place:
            reason, detail = "exact_duplicate", f"first seen in {first_place[passage.id]}"
        if reason:
            quarantine.append(passage.set_aside("passage", reason, detail, passage.text))
        else:
            first_place[passage.id] = passage.source
            kept.append(passage)
    if config.max_passages is not None and len(kept) > config.max_passages:
        drawn = set(random.Random(seed).sample(range(len(kept)), config.max_passages))
        detail = f"documents.max_passages is {config.max_passages}"
        quarantine += [
            p.set_aside("passage", "not_drawn", detail, p.text) for i, p in enumerate(kept) if i not in drawn
        ]
        kept = [p for i, p in enumerate(kept) if i in drawn]
    return kept, quarantine


def repeated_claim(passages: Sequence[Passage]) -> dict[str, str]:
    """Warn of six words in a row that stand in more than a tenth of the passages, and return the warning as metadata.

    Copies of one claim in other words pass the search for duplicates, and training would weight the claim by their number.
    """
    counts: Counter[tuple[str, ...]] = Counter()
    for passage in passages:
        words = re.findall(r"\w+", passage.text.casefold())
        # Each once for a passage, in the order of the text: the first of several claims with the same count is named.
        counts.update(
            list(dict.fromkeys(tuple(words[i : i + _CLAIM_WORDS]) for i in range(len(words) - _CLAIM_WORDS + 1)))
        )
    claim, count = counts.most_common(1)[0] if counts else ((), 0)
    if count < max(_FLOOD_PASSAGES, _FLOOD_SHARE * len(passages)):
        return {}
    warning = (
        f"{count:,} of {len(passages):,} passages contain the words “{' '.join(claim)}”: training would weight this claim by their "
        "number. Read these documents, and remove those that say nothing else."
    )
    logger.warning(warning)
    return {"repeated_claim": warning}


def chunks(documents: Sequence[Document], config: DocumentsConfig) -> list[Passage]:
    """Cut all documents, and keep every passage, also tables, short ones and repetitions. Retrieval searches these.

    `documents.unit` does not matter here: an answer often needs the sentences around it.
    """
    splitter = TextSplitter((min(config.passage_min_chars, config.passage_max_chars), config.passage_max_chars))
    passages = []
    for document in documents:
        for title, start, chunk in _chunks(document, splitter):
            text = re.sub(r"\s+", " ", chunk).strip()
            passages.append(_passage(document, title, start, start + len(chunk), text))
    return passages


def place_in(document: Document, source: str) -> tuple[int, int] | None:
    """The characters of a document that a row's source names, as `Passage.source` writes it; None if it names none of them."""
    place = source.removeprefix(document.source)
    if characters := re.fullmatch(r":characters (\d+)-(\d+)", place):
        return int(characters[1]), int(characters[2])
    part = place.removeprefix(", ")
    names = [part.name for part in document.parts]
    # The name of a part may contain " to ".
    first, _, last = (part, "", part) if part in names else part.partition(" to ")
    if first not in names or last not in names:
        return None
    start, end = document.parts[names.index(first)].start, names.index(last) + 1
    return start, document.parts[end].start if end < len(names) else len(document.text)


def _sentences(documents: Sequence[Document]) -> Iterator[Passage]:
    for document in documents:
        headings = _headings(document)
        borders = [heading.start() for heading in headings]
        for start, end, text in sentences(document.text, _has_headings(document)):
            section = bisect_right(borders, start)
            title = _section_title(document.title, headings[section - 1][1]) if section else document.title
            yield _passage(document, title, start, end, text)


def _passage(document: Document, title: str, start: int, end: int, text: str) -> Passage:
    number = hashlib.sha256(text.encode()).hexdigest()[:16]
    part = document.part_of(start, end)
    return Passage(id=number, document=document.source, title=title, start=start, end=end, text=text, part=part)


def _has_headings(document: Document) -> bool:
    return PurePath(document.source).suffix.lower() in _WITH_HEADINGS


def _headings(document: Document) -> list[re.Match[str]]:
    if not _has_headings(document):
        return []
    fences = [match.span() for match in FENCED.finditer(document.text)]
    starts = [start for start, _ in fences]
    found = []
    for match in _HEADING.finditer(document.text):
        index = bisect_right(starts, match.start()) - 1
        if index < 0 or match.start() >= fences[index][1]:
            found.append(match)
    return found


def _chunks(document: Document, splitter: TextSplitter) -> Iterator[tuple[str, int, str]]:
    """Title, position and text of each piece. A heading is the title of its section and not a part of the text."""
    headings = _headings(document)
    borders = [(0, document.title), *((h.end(), _section_title(document.title, h[1])) for h in headings)]
    ends = [*(h.start() for h in headings), len(document.text)]
    for (start, title), end in zip(borders, ends, strict=True):
        for place, chunk in splitter.chunk_indices(document.text[start:end]):
            # The mark of an item is no part of its sentence.
            mark = _ITEM_MARK.match(chunk)
            skipped = mark.end() if mark else 0
            yield title, start + place + skipped, chunk[skipped:]


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


def _sentence_problem(text: str, max_chars: int, names: set[str]) -> tuple[str, str]:
    words = len(text.split())
    if words < MIN_SENTENCE_WORDS:
        return "too_short", f"{words} words, a sentence needs {MIN_SENTENCE_WORDS}"
    if len(text) > max_chars:
        return "too_long", f"{len(text)} characters, documents.passage_max_chars is {max_chars}"
    if not names_something(text, names):
        return "names_nothing", "no word after the first one begins with a capital, and the first one is no known name"
    return "", ""
