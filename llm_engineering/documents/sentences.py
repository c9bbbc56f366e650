"""Splits the text of a document into sentences, with their positions, and says whether a sentence names something."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Set
from typing import NamedTuple

from llm_engineering.recipe.generation_blocks import RejectedCut

# Code in fences, where a line with `#` is a comment. A fence that is not closed is text: otherwise one stray mark would hide the
# rest of a document. More than three tildes alone, or three below a title as short, underline or divide.
FENCED = re.compile(
    r"^[ \t]*(`{3,}(?=[^`\n]*$)|(?<!^\S{3}\n)~~~(?!~+[ \t]*$)).*?^[ \t]*\1[`~]*[ \t]*$", re.MULTILINE | re.DOTALL
)
_HEADING = re.compile(r"#{1,6}[ \t]+\S")
# The line below a heading of Markdown or reStructuredText.
_UNDERLINE = re.compile(r"\s*([=\-~^*\"'+#`])\1{2,}\s*$")
# Rows of Markdown tables, and of tables that are drawn with + and -.
_TABLE_ROW = re.compile(r"\s*(\||\+[-=+]+\+)")
_LIST_ITEM = re.compile(r"\s*(?:>\s*)*(?:[-*+•]|\d{1,3}[.)])\s+(?=\S)")
_QUOTE_MARK = re.compile(r"\s*(?:>\s*)+")
_EMPHASIS = tuple(
    re.compile(
        r"(?<![\w{0}])({1})(?=[^\s{0}]){2}(?<=\S)({1})(?!\w)".format(re.escape(mark[0]), re.escape(mark), inner),
        re.DOTALL,
    )
    for mark, inner in (("***", ".+?"), ("**", ".+?"), ("*", "[^*]+?"), ("___", ".+?"), ("_", "[^_]+?"))
)
# Two underscores are emphasis only around several words: around a single one they are a name of Python.
_UNDERSCORES = re.compile(r"(?<!\w)(__)(?=[^\s_])[^_]*?\s[^_]*?(?<=\S)(__)(?!\w)")

_END = re.compile(r"[.!?…]+[\"'”’»)\]]*\s+(?=[\"'“‘«(\[]*[^\W_a-z])")
_LAST_WORD = re.compile(r"[^\s\"'“‘«(\[]+$")
_SPEECH = re.compile(
    r"(?:[A-Z]\w+\s){1,3}(?:said|says|asked|asks|answered|answers|replied|replies|cried|cries|called|calls|wrote|writes)\b"
)
# Characters before and after a full stop that decide whether it ends a sentence: more than a word, or a name and a verb.
_CONTEXT_CHARS = 80
# Abbreviations before a name or in the middle of a sentence.
_NEVER_LAST = frozenset([
    "mr", "mrs", "ms", "mx", "dr", "prof", "st", "messrs", "capt", "col", "gen", "lt", "sgt", "rev", "hon", "mt",
    "e.g", "i.e", "eg", "ie", "cf", "vs", "viz", "approx", "ca", "incl",
    "excl",
])  # fmt: skip
# Abbreviations before a number. Elsewhere they end a sentence: “No. The stove burns oat husks.”
_BEFORE_NUMBER = frozenset([
    "no", "nos", "nr", "fig", "figs", "p", "pp", "vol", "ch", "sec", "art", "eq", "tab", "max", "min", "tel",
    "ext", "jan", "feb", "mar", "apr", "jun", "jul", "aug", "sep", "sept", "oct", "nov", "dec",
])  # fmt: skip
# These and initials end a sentence only before a function word: “It belongs to Acme Ltd. The pump is blue.”
_IN_NAMES = frozenset(["ltd", "inc", "corp", "co"])
# “31. December” and “31. Dezember”, “9 a.m. Monday”.
_MONTH = re.compile(
    r"(?:Januar|Februar|M(?:arch|ärz)|April|Ma[iy]|Jun[ei]|Jul[iy]|August|September|O[ck]tober|November|De[cz]ember)y?\b"
)
_DAY = re.compile(r"(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day")
# Words that begin with a capital for other reasons than that they name something.
FUNCTION_WORDS = frozenset([
    "a", "an", "the", "i", "i'm", "i've", "i'll", "i'd", "it", "its", "he", "she", "we", "you", "they", "his", "her",
    "our", "your", "their", "this", "that", "these", "those", "there", "here", "who", "what", "which", "when",
    "where", "why", "how", "and", "but", "or", "so", "if", "as", "at", "by", "for", "from", "in", "into", "of", "on",
    "to", "with", "no", "not", "yes", "is", "are", "was", "were", "do", "does", "did", "can", "could", "may", "must",
    "shall", "should", "will", "would", "has", "have", "had", "all", "each", "every", "some", "any", "most", "then",
    "than",
])  # fmt: skip


class Sentence(NamedTuple):
    """A sentence without emphasis marks, its white space folded. `start` and `end` are positions in the document."""

    start: int
    end: int
    text: str


def sentences(text: str, with_headings: bool) -> Iterator[Sentence]:
    """The sentences of a document. Headings, rows of tables and code in fences are none; items of lists are.

    Args:
        with_headings: whether a line that begins with `#` is a heading.
    """
    begin = 0
    for fence_start, fence_end in [*(fence.span() for fence in FENCED.finditer(text)), (len(text), len(text))]:
        for start, end in _blocks(text[begin:fence_start], with_headings):
            yield from _split(text, begin + start, begin + end)
        begin = fence_end


# A digit before the last full stop may be the beginning of a number that was cut: "In Python 3."
_WHOLE = re.compile(r"(?:(?<!\d)\.|[!?…])[\"'”’»)\]]*$")


def whole_sentences(text: str) -> str:
    """A text that was cut somewhere, up to the end of its last whole sentence; empty if it has none."""
    end = 0
    # The mark closes a fence that was cut, and is no text elsewhere.
    found = list(sentences(f"{text}\n\n```", with_headings=True))
    for number, sentence in enumerate(found):
        # Only the last sentence can be cut within a number.
        if _WHOLE.search(sentence.text) or (number < len(found) - 1 and sentence.text.endswith(".")):
            end = sentence.end
    return text[:end]


def rejected_end(text: str, rule: RejectedCut) -> str:
    """A rejected answer that was cut, as `generation.rejected_cut` has it end; empty if no pair is made of it."""
    return {"keep": text, "drop": "", "sentence": whole_sentences(text)}[rule]


def names_something(sentence: str, names: Set[str] = frozenset()) -> bool:
    """Whether a word begins with a capital and is no function word. The first word counts only if it is one of `names`.

    A sentence of capital letters alone is a heading, and names nothing.
    """
    if sentence == sentence.upper():
        return False
    first, *later = _words(sentence) or [""]
    return first in names or any(map(_is_capitalised, later))


def known_names(texts: Iterable[str]) -> set[str]:
    """The words of these sentences that begin with a capital after the first word, and nowhere with a small letter.

    The first word of a sentence has a capital in any case, so only the other sentences show whether it is a name.
    """
    capitalised: set[str] = set()
    small: set[str] = set()
    for text in texts:
        words = _words(text)
        small.update(word.casefold() for word in words if word[0].islower())
        if text != text.upper():
            capitalised.update(filter(_is_capitalised, words[1:]))
    return {word for word in capitalised if word.casefold() not in small}


def _words(sentence: str) -> list[str]:
    """The words, with an apostrophe or a hyphen inside, and without the possessive ending of a name."""
    found = (word.replace("’", "'").rstrip("'.-") for word in re.findall(r"\w[\w'’.-]*", sentence))
    return [word.removesuffix("'s") for word in found]


def _is_capitalised(word: str) -> bool:
    return len(word) > 1 and word[0].isupper() and word.casefold() not in FUNCTION_WORDS


def _blocks(text: str, with_headings: bool) -> Iterator[tuple[int, int]]:
    """Start and end of each paragraph and list item of a text without fences."""
    lines = [(match.start(), match[0]) for match in re.finditer(r"[^\n]*\n?", text) if match[0]]
    start: int | None = None
    end = 0
    for index, (place, line) in enumerate(lines):
        following = lines[index + 1][1] if index + 1 < len(lines) else ""
        item = _LIST_ITEM.match(line)
        is_heading = with_headings and _HEADING.match(line)
        is_underlined = start is None and bool(_UNDERLINE.match(following)) and bool(line.strip())
        no_text = not line.strip() or _TABLE_ROW.match(line) or _UNDERLINE.match(line)
        if is_heading or is_underlined or no_text:
            if start is not None:
                yield start, end
            start = None
            continue
        if item and start is not None:
            yield start, end
            start = None
        if start is None:
            start = place + (item.end() if item else 0)
        end = place + len(line)
    if start is not None:
        yield start, end


def _split(text: str, start: int, end: int) -> Iterator[Sentence]:
    """The sentences of a paragraph."""
    removed = _marks(text, start, end)
    characters: list[str] = []
    places: list[int] = []
    for place in range(start, end):
        character = " " if text[place].isspace() else text[place]
        if place in removed or (character == " " and (not characters or characters[-1] == " ")):
            continue
        characters.append(character)
        places.append(place)
    folded = "".join(characters).rstrip()
    first = 0
    for border in [*_borders(folded), len(folded)]:
        sentence = folded[first:border].rstrip()
        if sentence:
            yield Sentence(places[first], places[first + len(sentence) - 1] + 1, sentence)
        first = border


def _marks(text: str, start: int, end: int) -> set[int]:
    """Positions of the marks of emphasis and of quoted lines in a paragraph."""
    paragraph = text[start:end]
    removed: set[int] = set()
    for pattern in (*_EMPHASIS, _UNDERSCORES):
        for match in re.finditer(pattern, paragraph):
            for group in (1, 2):
                removed.update(range(start + match.start(group), start + match.end(group)))
    offset = start
    for line in paragraph.splitlines(keepends=True):
        quoted = _QUOTE_MARK.match(line)
        removed.update(offset + i for i in range(quoted.end() if quoted else 0) if line[i] == ">")
        offset += len(line)
    return removed


def _borders(text: str) -> Iterator[int]:
    """Where the second and every later sentence of a paragraph begins."""
    is_balanced = text.count('"') % 2 == 0 and text.count("“") == text.count("”")
    straight = opened = read = 0
    for match in _END.finditer(text):
        part = text[read : match.end()]
        read = match.end()
        straight += part.count('"')
        opened += part.count("“") - part.count("”")
        is_quoted = is_balanced and (straight % 2 == 1 or opened > 0)
        if not is_quoted and not _continues(text, match):
            yield match.end()


def _continues(text: str, match: re.Match[str]) -> bool:
    """Whether a full stop, an exclamation mark or a question mark is inside a sentence."""
    mark, following = match[0].rstrip(), text[match.end() : match.end() + _CONTEXT_CHARS]
    if mark[-1] in '"”»' and mark[0] in "!?" and _SPEECH.match(following):
        return True
    if mark != ".":
        return False
    found = _LAST_WORD.search(text[max(0, match.start() - _CONTEXT_CHARS) : match.start()])
    word = found[0] if found else ""
    if word.casefold() in _NEVER_LAST:
        return True
    if word.casefold() in _BEFORE_NUMBER:
        return following[0].isdigit()
    if re.fullmatch(r"\d{1,2}", word):
        return _MONTH.match(following) is not None
    if re.fullmatch(r"[ap]\.m", word):
        return _DAY.match(following) is not None
    is_initials = word != "I" and word[-1:].isupper() and re.fullmatch(r"(?:[A-Z][a-z]?\.)*\w", word) is not None
    next_word = re.match(r"\W*(?:\w\.|([\w'’]*))", following)
    is_new = next_word is not None and (next_word[1] or "").casefold() in FUNCTION_WORDS
    return (is_initials or word.casefold() in _IN_NAMES) and not is_new
