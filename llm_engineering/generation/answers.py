"""Chooses the words of sentences that questions can ask for, by rules for English.

Names, numbers, weekdays and months are good answers. In a sentence without any of these, another word is one, if it stands
beside the same name in other sentences too: documents repeat their facts in other words.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

from llm_engineering.documents.sentences import FUNCTION_WORDS

# "1,200" and "9:30" are one word, and so are "best-known" and "Ondrel's".
WORD = re.compile(r"\d+(?:[.,:]\d+)*\w*|\w+(?:[-'’]\w+)*")

Kind = Literal["person", "place", "day", "month", "year", "duration", "price", "number", "thing"]

_ANSWERS_OF_A_SENTENCE = 2
# A name in more of the sentences is what the documents are about, and seldom an answer.
_SUBJECT_SHARE, _SUBJECT_SENTENCES = 0.15, 10
# Of the rarer of two words, how many of its sentences must hold the other one too.
_SHARED_BY_NAME, _SHARED_BY_NOUN = 0.2, 0.5
# Two words that share one sentence alone may do so by accident.
_ONCE = 0.4
# Kinds that a question can ask for most exactly.
_EXACT: frozenset[Kind] = frozenset(["person", "day", "month", "year", "duration", "price", "number"])

_DAYS = frozenset(["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"])
_MONTHS = frozenset([
    "january", "february", "march", "april", "may", "june", "july", "august", "september", "october", "november",
    "december",
])  # fmt: skip
_CURRENCIES = frozenset(["crown", "euro", "dollar", "pound", "cent", "franc", "yen", "rupee", "peso", "yuan"])
_TIMES = frozenset(["second", "minute", "hour", "day", "night", "week", "month", "year", "decade"])
_BEFORE_PLACES = frozenset(["in", "at", "near", "from", "to"])
_YEAR = re.compile(r"1[4-9]\d\d|20\d\d")
# Words that say little by themselves, besides the function words.
_WEAK = FUNCTION_WORDS | frozenset([
    "be", "been", "being", "not", "only", "very", "more", "just", "also", "over", "under", "after", "before", "since",
    "while", "because", "about", "up", "out", "off", "own", "one", "two", "three", "four", "five", "six", "seven",
    "eight", "nine", "ten", "twenty", "thirty", "forty", "fifty", "another", "such", "same", "first", "last", "next",
    "new", "old", "many", "much", "few", "little", "like", "other", "others", "always", "never", "again", "too",
])  # fmt: skip


class Asked(NamedTuple):
    """Words of a sentence to ask for.

    Attributes:
        sentence: the number of the sentence.
        answer: the words, as the sentence spells them.
        kind: what the words say.
        topic: the name in the sentence that the question is about.
    """

    sentence: int
    answer: str
    kind: Kind
    topic: str


class _Span(NamedTuple):
    text: str
    kind: Kind
    start: int


def choose_answers(sentences: Sequence[str]) -> list[Asked]:
    """Choose up to two answers of each sentence, in the order of the sentences. Some sentences have none."""
    words = [[(match.group(), match.start(), match.end()) for match in WORD.finditer(text)] for text in sentences]
    in_lower_case = {word for found in words for word, _, _ in found if word[0].islower()}
    places = {
        word
        for found in words
        for (before, _, _), (word, _, _) in pairwise(found)
        if before in _BEFORE_PLACES and word[0].isupper()
    }
    containing: dict[str, set[int]] = defaultdict(set)
    for number, found in enumerate(words):
        for word, _, _ in found:
            containing[_folded(word)].add(number)
    subject = max(_SUBJECT_SENTENCES, _SUBJECT_SHARE * len(sentences))
    asked = []
    for number, text in enumerate(sentences):
        names, nouns = _spans(text, words[number], in_lower_case, places)
        spans = [span for span in (*names, *nouns) if text.count(span.text) == 1]
        topics = [span.text for span in names if span.kind in ("person", "place", "thing")]
        rated = []
        for span in spans:
            holding = _holding(span.text, containing)
            if len(holding) > subject:
                continue
            shared, topic = max(
                ((_shared(holding, _holding(name, containing)), name) for name in topics if _apart(name, span.text)),
                default=(0.0, ""),
            )
            is_name = span in names
            if shared >= (_SHARED_BY_NAME if is_name else _SHARED_BY_NOUN):
                # New information comes at the end of an English sentence, so later words are better.
                order = (0, -shared, -span.start) if is_name else (0, -round(shared, 1), -span.start)
                rated.append((not is_name, span.kind not in _EXACT, *order, Asked(number, span.text, span.kind, topic)))
        best = sorted(rated)[:_ANSWERS_OF_A_SENTENCE]
        # A noun is asked for only in a sentence without a name or number to ask for.
        asked += [one[-1] for one in (best if best and not best[0][0] else best[:1]) if one[0] == best[0][0]]
    return asked


def _spans(
    text: str, words: list[tuple[str, int, int]], in_lower_case: set[str], places: set[str]
) -> tuple[list[_Span], list[_Span]]:
    """The names and numbers of a sentence, and its other words that end a phrase, with the word before them."""
    names: list[_Span] = []
    nouns: list[_Span] = []
    taken: set[int] = set()

    def joined(index: int) -> bool:
        """Whether only a space is between this word and the next one."""
        return index + 1 < len(words) and text[words[index][2] : words[index + 1][1]] == " "

    index = 0
    while index < len(words):
        word, start, end = words[index]
        last = index
        if word[0].isdigit():
            unit = words[index + 1][0] if joined(index) else ""
            unit = unit if unit.islower() and unit not in _WEAK else ""
            one = unit.removesuffix("s")
            if _YEAR.fullmatch(word) and not unit:
                kind: Kind = "year"
            else:
                kind = "price" if one in _CURRENCIES else "duration" if one in _TIMES else "number"
            if kind in ("price", "duration"):
                end = words[index + 1][2]
            names.append(_Span(text[start:end], kind, start))
            taken.add(index)
        elif word[0].isupper() and len(word) > 1:
            while joined(last) and _continues_name(words[last][0], words[last + 1][0]):
                last += 1
            first = next((i for i in range(index, last + 1) if words[i][0].casefold() not in _WEAK), None)
            begins = first == last == 0 and word.casefold() in in_lower_case
            if first is not None and not begins:
                name = re.sub(r"['’]s$", "", text[words[first][1] : words[last][2]])
                parts = [words[i][0] for i in range(first, last + 1)]
                kind = _kind_of_name(name, parts, in_lower_case, places)
                # "on Fridays" answers with Friday.
                names.append(_Span(name.removesuffix("s") if kind == "day" else name, kind, words[first][1]))
            taken.update(range(index, last + 1))
        index = last + 1
    for index, (word, start, end) in enumerate(words):
        ends_phrase = not joined(index) or words[index + 1][0] in _WEAK or index + 1 in taken
        if index in taken or not ends_phrase or word.casefold() in _WEAK or len(word) < 3 or not word[0].islower():
            continue
        before = index - 1
        if before >= 0 and before not in taken and joined(before) and words[before][0].casefold() not in _WEAK:
            start = words[before][1]
        nouns.append(_Span(text[start:end], "thing", start))
    return names, nouns


def _kind_of_name(name: str, parts: list[str], in_lower_case: set[str], places: set[str]) -> Kind:
    folded = name.casefold()
    if folded.removesuffix("s") in _DAYS:
        return "day"
    if folded in _MONTHS:
        return "month"
    # "Thimble Mill" has a word that the documents also write in lower case, and "Rosa Fannow" has none.
    if len(parts) > 1 and not any(part.casefold() in in_lower_case for part in parts):
        return "person"
    return "place" if len(parts) == 1 and name in places else "thing"


def _continues_name(word: str, following: str) -> bool:
    return following[0].isupper() and len(following) > 1 and not re.search(r"['’]s$", word)


def _folded(word: str) -> str:
    """The word as it is compared: in small letters, without a genitive, and a day as a single one."""
    folded = re.sub(r"['’]s$", "", word.casefold())
    return folded.removesuffix("s") if folded.removesuffix("s") in _DAYS else folded


def _holding(phrase: str, containing: dict[str, set[int]]) -> set[int]:
    """Numbers of the sentences that hold every word of the phrase."""
    sets = [containing[_folded(word)] for word in WORD.findall(phrase)]
    return set.intersection(*sets) if sets else set()


def _shared(holding: set[int], others: set[int]) -> float:
    """Share of the sentences of the rarer phrase that hold both."""
    both = len(holding & others)
    share = both / max(1, min(len(holding), len(others)))
    return share if both > 1 else share * _ONCE


def _apart(name: str, answer: str) -> bool:
    """Whether a name and an answer have no word in common."""
    return not {_folded(word) for word in WORD.findall(name)} & {_folded(word) for word in WORD.findall(answer)}
