"""Chooses the words of sentences that questions can ask for, by rules for English.

Names, numbers, weekdays and months are good answers. In a sentence without any of these, another word is one, if it stands
beside the same name in other sentences too: documents repeat their facts in other words. What a word is shows in all
sentences together: the first word of a sentence is a name only if it has a capital inside another sentence.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

from llm_engineering.documents.sentences import FUNCTION_WORDS

_NUMBER = r"\d+(?:[.,:]\d+)*\w*"
# "1,200" and "9:30" are one word, and so are "best-known" and "Ondrel's".
WORD = re.compile(rf"{_NUMBER}|\w+(?:[-'’]\w+)*")
# E-mail addresses, web addresses and telephone numbers.
_CONTACT = re.compile(r"\S+@\S+\w|(?:https?://|www\.)\S+\w|(?:\+|\(?0)\d+\)?(?:[ -]\d{2,})+|\(?\d{3}\)?[ -]\d{3}-\d{4}")
# "Model: K12; Price: 30 EUR.", as `documents.document.table_text` writes it.
TABLE_ROW = re.compile(r"[^:;]{1,60}: [^;]+(?:; [^:;]{1,60}: [^;]+)+")
_DATE = r"\b(?:\d{4}-\d\d-\d\d|\d\d?[./]\d\d?[./]\d{4})\b"
_AMOUNT = rf"{_NUMBER}(?: (?:dozen|hundred|thousand|million|billion|trillion|bn|mn)\b)?"
# A contact, a date, a price, an hour or a percentage counts as one word.
_TOKEN = re.compile(
    rf"{_CONTACT.pattern}|{_DATE}|[€$£] ?{_AMOUNT}|{_NUMBER} ?(?:[€$£%]|[ap]\.m\.)|{_AMOUNT}|{WORD.pattern}"
)
# What may stand beside an answer. Other signs belong to it: "-18", "120 km/h", "1'000", "Dr." inside of a sentence.
_BEFORE = re.compile(r"(?:^|[\s(\[{\"“‘„«—])$")
_AFTER = re.compile(r"[,;:!?)\]}\"'”’»…—]*(?:\s(?![°‰])|\W*$)")
# "less than 14 days" is another answer than "14 days", and so are "14 days or more" and "14 or 15 days".
_BOUND_BEFORE = re.compile(r"\b(?:than|at least|at most|or) $", re.IGNORECASE)
_BOUND_AFTER = re.compile(
    r",? or (?:more|less|fewer|over|under|above|below|older|younger|later|[€$£]?\d)|,? and (?:over|under|above|older)\b"
)
# "2.5" and "9:30" have two parts; three are a version or a time in seconds, unless they are groups of three digits.
_PARTS = 2
_GROUPED = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d{1,3}(?:\.\d{3})+(?:,\d+)?"

Kind = Literal[
    "person", "place", "day", "month", "year", "duration", "price", "measure", "hour", "number", "contact", "thing"
]

_ANSWERS_OF_A_SENTENCE = 2
# A name in more of the sentences is what the documents are about, and seldom an answer.
_SUBJECT_SHARE, _SUBJECT_SENTENCES = 0.15, 10
# A sentence with more persons is a list, and "who" asks for none of them.
_PERSONS = 2
# Of the rarer of two words, how many of its sentences must hold the other one too.
_SHARED_BY_NAME, _SHARED_BY_NOUN = 0.2, 0.5
# Two words that share one sentence alone may do so by accident.
_ONCE = 0.4
# Kinds that a question can ask for most exactly.
EXACT: frozenset[Kind] = frozenset([
    "person", "day", "month", "year", "duration", "price", "measure", "hour", "number", "contact",
])  # fmt: skip
# Two of these with "to" or "and" between them are one answer: "Monday to Friday".
_RANGES = EXACT - {"person", "contact"}
_RANGE_MARKS = (" to ", " and ", "-", "–")

_DAYS = frozenset(["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"])
_MONTHS = frozenset([
    "january", "february", "march", "april", "may", "june", "july", "august", "september", "october", "november",
    "december",
])  # fmt: skip
# Units without a plural s. The number and its unit are one answer.
_UNITS: dict[Kind, frozenset[str]] = {
    "price": frozenset(["crown", "euro", "dollar", "pound", "cent", "franc", "yen", "rupee", "peso", "yuan"]),
    "duration": frozenset(["second", "minute", "hour", "day", "night", "week", "month", "year", "decade"]),
    "measure": frozenset([
        "gram", "kilogram", "kilo", "kg", "tonne", "ton", "millimetre", "centimetre", "metre", "kilometre", "millimeter",
        "centimeter", "meter", "kilometer", "km", "mile", "litre", "liter", "degree", "percent", "watt", "kilowatt",
    ]),
    "hour": frozenset(["o'clock", "o’clock", "am", "pm"]),
}  # fmt: skip
_YEAR = re.compile(r"1[4-9]\d\d|20\d\d")
_STREETS = frozenset(["street", "road", "lane", "avenue", "square"])
# Words that say little by themselves, besides the function words.
_WEAK = FUNCTION_WORDS | frozenset([
    "be", "been", "being", "not", "only", "very", "more", "just", "also", "over", "under", "after", "before", "since",
    "while", "because", "about", "up", "out", "off", "own", "one", "two", "three", "four", "five", "six", "seven",
    "eight", "nine", "ten", "twenty", "thirty", "forty", "fifty", "another", "such", "same", "first", "last", "next",
    "new", "old", "many", "much", "few", "little", "like", "other", "others", "always", "never", "again", "too",
])  # fmt: skip
_BEGINNING_NAMES = frozenset(["little", "new", "old"])
_ARTICLES = frozenset(["a", "an", "the"])
_BEFORE_PLACES = frozenset(["in", "at", "near"])
# Nouns, and adjectives of nouns, follow these words; verbs do not.
_BEFORE_NOUNS = _ARTICLES | frozenset([
    "of", "in", "on", "at", "for", "from", "with", "by", "its", "his", "her", "our", "your", "their", "any", "every",
    "each", "some", "no",
])  # fmt: skip


class AnswerSpan(NamedTuple):
    """Words of a sentence to ask for.

    Attributes:
        sentence: the number of the sentence.
        answer: the words, as the sentence spells them.
        kind: what the words say.
        topic: the name that the question is about. It is in the sentence, or it is what all documents are about.
    """

    sentence: int
    answer: str
    kind: Kind
    topic: str


class _Span(NamedTuple):
    text: str
    kind: Kind
    start: int
    end: int


class _Word(NamedTuple):
    """A word of a sentence, and what is between the word before and this one."""

    text: str
    start: int
    end: int
    gap: str

    @property
    def key(self) -> str:
        return _folded(self.text)

    @property
    def opens(self) -> bool:
        """Whether a capital may mean no more than that something begins here, such as a sentence or a cell of a table."""
        return ":" in self.gap or ";" in self.gap

    @property
    def is_number(self) -> bool:
        return self.text[0].isdigit() or self.text[0] in "€$£"

    @property
    def is_capitalised(self) -> bool:
        # "May" is a month, and "Little Ashby" a town.
        is_name = self.key not in _WEAK or self.key in _MONTHS | _BEGINNING_NAMES
        return self.text[0].isupper() and len(self.text) > 1 and is_name


def choose_answers(sentences: Sequence[str], most_nouns: int = 1) -> list[AnswerSpan]:
    """Choose up to two answers of each sentence, in the order of the sentences. Some sentences have none.

    A question among the sentences has none, for it states nothing, and neither has a row of a table, for its cells are no
    statement: `statements.questions_of_row` has those.

    Args:
        most_nouns: how many nouns to choose in a sentence that has no name and no number.
    """
    usage = _Usage([_words(text) for text in sentences])
    found = [_spans(text, words, usage) for text, words in zip(sentences, usage.sentences, strict=True)]
    limit = max(_SUBJECT_SENTENCES, _SUBJECT_SHARE * len(sentences))
    counts = {span.text: len(usage.holding(span.text)) for names, _ in found for span in names}
    most = max(counts, key=lambda name: counts[name], default="")
    subject = [most] if counts and counts[most] > limit else []

    def best(number: int, spans: Sequence[_Span], topics: Sequence[str], shared_at_least: float) -> list[AnswerSpan]:
        rated = []
        for span in spans:
            if len(usage.holding(span.text)) > limit or not _is_whole(sentences[number], span):
                continue
            apart = [topic for topic in topics if _apart(topic, span.text)] or subject * (span.kind == "person")
            shared, topic = max(((usage.shared(span.text, topic), topic) for topic in apart), default=(0.0, ""))
            if topic and (span.kind in EXACT or shared >= shared_at_least):
                # New information comes at the end of an English sentence, so later words are better.
                order = (span.kind not in EXACT, -shared, -span.start)
                rated.append((order, AnswerSpan(number, span.text, span.kind, topic)))
        # A sentence may say an answer twice.
        return list(dict.fromkeys(one for _, one in sorted(rated)))

    asked = []
    for number, (names, nouns) in enumerate(found):
        topics = [span.text for span in names if span.kind in ("person", "place", "thing")]
        if sum(span.kind == "person" for span in names) > _PERSONS:
            names = [span for span in names if span.kind != "person"]
        if not sentences[number].endswith("?") and not TABLE_ROW.fullmatch(sentences[number]):
            # A noun is asked for only in a sentence without a name or number to ask for.
            asked += (
                best(number, names, topics, _SHARED_BY_NAME)[:_ANSWERS_OF_A_SENTENCE]
                or best(number, nouns, topics, _SHARED_BY_NOUN)[:most_nouns]
            )
    return asked


class _Usage:
    """How words are used in all sentences together."""

    def __init__(self, sentences: Sequence[list[_Word]]) -> None:
        self.sentences = sentences
        self.containing: dict[str, set[int]] = defaultdict(set)
        # Words in small letters, and those that begin a name inside a sentence.
        self.small: set[str] = set()
        self.beginning: set[str] = set(_DAYS)
        # The words that stand before a word.
        self.before: dict[str, set[str]] = defaultdict(set)
        # How often two words stand together, and how often each stands at the end or beginning of a name.
        self.pairs: Counter[tuple[str, str]] = Counter()
        self.ends: Counter[str] = Counter()
        self.begins: Counter[str] = Counter()
        for number, words in enumerate(sentences):
            for before, word in pairwise([_NO_WORD, *words, _NO_WORD]):
                self.containing[word.key].add(number)
                if word.gap == " ":
                    self.before[word.key].add(before.key)
                    self.pairs[before.key, word.key] += 1
                if word.text[0].islower():
                    self.small.add(word.key)
                if _may_continue(before, word):
                    continue
                self.ends[before.key] += before.is_capitalised
                self.begins[word.key] += word.is_capitalised
                if word.is_capitalised and not word.opens:
                    self.beginning.add(word.key)

    def is_known(self, word: _Word) -> bool:
        return not word.opens or word.key in self.beginning

    def continues(self, word: _Word, following: _Word) -> bool:
        """Whether both are words of one name. In "On Tuesdays Ondrel rests", other sentences show that they are two."""
        if not _may_continue(word, following):
            return False
        together = self.pairs[word.key, following.key]
        is_end = word.key in _DAYS | _MONTHS or self.ends[word.key] > together or not self.is_known(word)
        return not (is_end and self.begins[following.key] > together)

    def kind_of_name(self, parts: Sequence[_Word]) -> Kind:
        first = parts[0].key
        if len(parts) == 1 and first in _DAYS | _MONTHS:
            return "day" if first in _DAYS else "month"
        # "Thimble Mill" has a word that the documents also write in small letters, and "the Bramble Ride" has an article.
        is_thing = any(part.key in self.small for part in parts) or self.before[first] & _ARTICLES
        if len(parts) > 1 and is_thing:
            return "thing"
        if self.before[first] & _BEFORE_PLACES:
            return "place"
        return "person" if len(parts) > 1 else "thing"

    def holding(self, phrase: str) -> set[int]:
        """Numbers of the sentences that hold every word of the phrase."""
        return set.intersection(*(self.containing[word.key] for word in _words(phrase)))

    def shared(self, phrase: str, other: str) -> float:
        """Share of the sentences of the rarer phrase that hold both."""
        holding, others = self.holding(phrase), self.holding(other)
        both = len(holding & others)
        share = both / max(1, min(len(holding), len(others)))
        return share if both > 1 else share * _ONCE


def _words(text: str) -> list[_Word]:
    words: list[_Word] = []
    for match in _TOKEN.finditer(text):
        gap = text[words[-1].end : match.start()] if words else ":"
        words.append(_Word(match.group(), match.start(), match.end(), gap))
    return words


def _spans(text: str, words: list[_Word], usage: _Usage) -> tuple[list[_Span], list[_Span]]:
    """The names and numbers of a sentence, and its other words that end a phrase, with the word before them."""
    names: list[_Span] = []
    nouns: list[_Span] = []
    taken: set[int] = set()
    index = 0
    while index < len(words):
        kind, last = _name_or_number(words, index, usage)
        if kind:
            taken.update(range(index, last + 1))
            # "minus 18 degrees" is another answer than "18 degrees".
            is_negative = index > 0 and words[index - 1].key == "minus" and words[index].is_number
            start = words[index - is_negative].start
            between = text[names[-1].end : start] if names else ""
            if between in _RANGE_MARKS and kind in _RANGES and names[-1].kind in (kind, "number"):
                start = names.pop().start
            # "Ondrel's" answers with Ondrel, and "on Fridays" with Friday.
            name = re.sub(r"(?<=day)s\b" if kind == "day" else r"['’]s$", "", text[start : words[last].end])
            names.append(_Span(name, kind, start, words[last].end))
        index = last + 1
    for index, (before, word, following) in enumerate(
        zip([_NO_WORD, *words], words, [*words[1:], _NO_WORD], strict=False)
    ):
        ends_phrase = following.gap != " " or following.key in _WEAK or index + 1 in taken
        if index in taken or not ends_phrase or word.key in _WEAK or not word.text[0].islower():
            continue
        has_adjective = word.gap == " " and before.text[0].islower() and before.key not in _WEAK
        first = before if has_adjective and usage.before[before.key] & _BEFORE_NOUNS else word
        if usage.before[first.key] & _BEFORE_NOUNS:
            nouns.append(_Span(text[first.start : word.end], "thing", first.start, word.end))
    return names, nouns


def _name_or_number(words: Sequence[_Word], index: int, usage: _Usage) -> tuple[Kind | None, int]:
    """What begins at a word, and its last word; None for words that are neither a name nor a number."""
    word, last = words[index], index
    if _CONTACT.fullmatch(word.text):
        return "contact", index
    if word.is_number:
        kind, last = _number(words, index)
        street = _end_of_name(words, last + 1, usage)
        return ("place", street) if kind == "number" and words[street].key in _STREETS else (kind, last)
    if not word.is_capitalised:
        return None, index
    last = _end_of_name(words, index, usage)
    if last == index and not usage.is_known(word):
        return None, index
    kind = usage.kind_of_name(words[index : last + 1])
    # "Tanner Row 14" and "March 14", but not "In Mossgate 17 people"
    following = [*words, _NO_WORD][last + 1]
    has_number = following.gap == " " and following.is_number and kind != "day" and not _counted(words, last + 1)
    if has_number and _number(words, last + 1) == ("number", last + 1):
        return ("day" if kind == "month" else kind), last + 1
    return kind, last


def _is_whole(text: str, span: _Span) -> bool:
    """Whether the words are all of a value, and no part of a longer or a bounded one."""
    before, after = text[: span.start], text[span.end :]
    if not _BEFORE.search(before) or not _AFTER.match(after):
        return False
    for number in (word.text for word in _words(span.text) if word.text[0].isdigit() and span.kind != "contact"):
        if not re.fullmatch(rf"{_DATE}|{_GROUPED}", number) and len(re.findall(r"\d+", number)) > _PARTS:
            return False
    # "1 500 euros", and the groups of digits of an IBAN
    goes_on = re.search(r"\d\s\d", f"{text[: span.start + 1][-3:]}|{text[span.end - 1 :][:3]}")
    is_bounded = _BOUND_BEFORE.search(before) or _BOUND_AFTER.match(after)
    return not goes_on and not (is_bounded and span.kind in EXACT)


def _end_of_name(words: Sequence[_Word], index: int, usage: _Usage) -> int:
    last = min(index, len(words) - 1)
    while last + 1 < len(words) and usage.continues(words[last], words[last + 1]):
        last += 1
    return last


def _number(words: Sequence[_Word], index: int) -> tuple[Kind, int]:
    """What a number says, and its last word: a unit and a month belong to it."""
    number, following = words[index].text, [*words, _NO_WORD][index + 1]
    if re.fullmatch(_DATE, number):
        return "day", index
    if re.search("[€$£]", number):
        return "price", index
    if number.endswith("%"):
        return "measure", index
    if re.fullmatch(r"\d\d?:\d\d", number) or number.endswith(".m."):
        return "hour", index
    if following.gap == " ":
        if following.key in _MONTHS:
            return "day", index + 1
        for kind, units in _UNITS.items():
            if following.key.removesuffix("s") in units:
                return kind, index + 1
    return ("year" if _YEAR.fullmatch(number) and not _counted(words, index) else "number"), index


def _counted(words: Sequence[_Word], index: int) -> bool:
    """Whether a number says how many there are of something: `people` in "17 people"."""
    following = [*words, _NO_WORD][index + 1]
    return following.gap == " " and following.text.islower() and following.key not in _WEAK


def _may_continue(word: _Word, following: _Word) -> bool:
    is_genitive = re.search(r"['’]s$", word.text) is not None
    return word.is_capitalised and following.is_capitalised and following.gap == " " and not is_genitive


def _folded(word: str) -> str:
    """The word as it is compared: in small letters, without a genitive, and a day as a single one."""
    folded = re.sub(r"['’]s$", "", word.casefold())
    return folded.removesuffix("s") if folded.removesuffix("s") in _DAYS else folded


def _apart(name: str, answer: str) -> bool:
    """Whether a name and an answer have no word in common."""
    return not {word.key for word in _words(name)} & {word.key for word in _words(answer)}


# Before the first word of a sentence, and after the last one.
_NO_WORD = _Word(".", 0, 0, "")
