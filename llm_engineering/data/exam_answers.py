"""Judges answers of the exam by rule: whether an answer is an accepted one, and whether it declines to answer.

An answer is right if its first sentence names an accepted answer, as a run of whole words, and no other candidate.
Both are normalised first: case, accents, punctuation and articles do not count, numbers are written in digits, dates as
day, month, year, times with hours up to 12, amounts before their currency, and common units by one name each.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence, Set
from itertools import takewhile

from llm_engineering.data.rows import MARKS, UNSPACED, words

# A longer sentence names too much to be the answer to a question about one fact.
MAX_WORDS = 25

_ARTICLES = {"a", "an", "the"}
# Stands for the letter A, which is no article.
_LETTER_A = "ᴀ"
_WEEKDAYS = words("monday tuesday wednesday thursday friday saturday sunday")
_MONTHS = words("january february march april may june july august september october november december")
_MONTH_NAMES = {month: month for month in _MONTHS} | {month[:3]: month for month in _MONTHS} | {"sept": "september"}
_TEENS = words("ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen")
_NUMBERS = {word: n for n, word in enumerate([*words("zero one two three four five six seven eight nine"), *_TEENS])}
_TENS = {word: 10 * n for n, word in enumerate(words("twenty thirty forty fifty sixty seventy eighty ninety"), 2)}
NUMBER_WORDS = _NUMBERS | _TENS
_SCALES = {"hundred": 100, "thousand": 1_000, "million": 1_000_000, "billion": 1_000_000_000}
_ORDINALS = words("first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth")
_UNITS = {
    "%": "percent", "pct": "percent",
    "€": "euro", "eur": "euro", "euros": "euro", "$": "dollar", "usd": "dollar", "dollars": "dollar",
    "£": "pound", "gbp": "pound", "pounds": "pound", "crowns": "crown",
    "kg": "kilogram", "kilo": "kilogram", "kilos": "kilogram", "kilograms": "kilogram",
    "g": "gram", "grams": "gram", "t": "tonne", "tonnes": "tonne",
    "km": "kilometre", "kilometres": "kilometre", "kilometer": "kilometre", "kilometers": "kilometre",
    "m": "metre", "metres": "metre", "meter": "metre", "meters": "metre",
    "cm": "centimetre", "centimetres": "centimetre", "centimeter": "centimetre", "centimeters": "centimetre",
    "mm": "millimetre", "millimetres": "millimetre", "millimeter": "millimetre", "millimeters": "millimetre",
    "l": "litre", "litres": "litre", "liter": "litre", "liters": "litre",
    "s": "second", "sec": "second", "seconds": "second", "min": "minute", "mins": "minute", "minutes": "minute",
    "h": "hour", "hr": "hour", "hrs": "hour", "hours": "hour",
    "days": "day", "weeks": "week", "months": "month", "years": "year",
}  # fmt: skip
# Marks that separate the items of a list.
_LIST_MARKS = {",", ";", "/", "|", "&", "–"}
# The token of a range that is not of two numbers: `Monday to Friday`. A range of two numbers is a list of two.
_RANGE = ".."
_RANGE_WORDS = {"to", "through", "until"}
_RANGE_ENDS = {*_WEEKDAYS, *_MONTHS, *_UNITS.values(), "am", "pm"}
_LIST_WORDS = {"and", "or", _RANGE}
# A part of a sentence that begins with one of these words says something about the answer, and is no other answer.
_FUNCTION_WORDS = set(
    words(
        "about above after all as at because before behind below beside by close during each every for from has have he "
        "her his i in inside into is it its just like near not of on our over she since so than that their there they "
        "this to under until was we were when where which while who whose with within you your"
    )
)
# With one of the first words a sentence does not decide; with one of the others before an answer, or behind it without a
# comma, it denies the answer.
_HEDGES = {"or", "either"}
_NEGATIONS = {"not", "never", "neither", "nor", "without"}

_WORD = rf"[{UNSPACED}][{MARKS}]*|[^\W\d_{UNSPACED}]\w*(?:[{MARKS}]+\w*)*(?:'\w+)*"
_TOKEN = re.compile(
    rf"(?P<number>(?:(?<!\w)[-−])?\d+(?:[.,:]\d+)*)(?P<suffix>[^\W\d_]+|%)?|(?P<word>{_WORD})|(?P<mark>[^\w\s{MARKS}])"
)
_AMOUNT = r"-?\d+(?:[.,]\d+)*(?!\w)(?: (?:hundred|thousand|million|billion)\b)?"
# The end of a sentence, but not the dot of an initial, of a common abbreviation, or of `a.m.` before a small letter.
_ABBREVIATIONS = "".join(
    rf"(?<!\b{word})" for word in ("[A-Z]", "Dr", "Mr", "Mrs", "Ms", "Prof", "St", "No", "ca", "approx")
)
_END = re.compile(rf"\n|{_ABBREVIATIONS}[.!?。！？]+(?=\s|$)(?!(?<=[ap]\.m\.)\s[a-z])")
_FILLERS = {"sure", "yes", "of course", "certainly", "ok", "okay", "well", "answer", "hello", "hi"}

# Phrases with which an answer declines, normalised. They must stand in the first sentence.
ABSTENTIONS = (
    *(f"{do} not {verb}" for do in ("do", "does") for verb in words("say mention state tell specify give contain provide know")),
    *(f"not have {which} information" for which in ("that", "this", "any")), "not have information",
    "not mentioned", "not stated", "not specified", "not said", "not given", "not known", "is unknown",
    "no information", "no mention", "cannot say", "cannot tell", "cannot answer", "not in documents",
)  # fmt: skip


def answers_right(answer: str, accepted: Sequence[str], question: str = "") -> bool:
    """Whether the first sentence of an answer gives one of the accepted answers, and nothing else.

    It is wrong if the sentence has more than 25 words, if it denies or does not decide (`not in Oskby`, `Oskby or Dunvey`),
    if it compares (`less than 14 days`), or if it lists another candidate beside the accepted answer: the next item after a
    comma, `and` or the like, with at most one word more than the accepted answer, that does not begin with a function word
    and is not from the question. Words of the question may stand everywhere.
    """
    # "Yes" is a filler before an answer, unless it is the answer.
    tokens = normalised_tokens(first_sentence(answer, {text.casefold() for text in accepted}))
    asked = set(_words(normalised_tokens(question)))
    places = [place for place, token in enumerate(tokens) if token not in _LIST_MARKS]
    if len(places) > MAX_WORDS:
        return False
    for text in accepted:
        wanted = _words(normalised_tokens(text))
        known = asked | set(wanted)
        if (_HEDGES & set(tokens)) - known:
            continue
        for start in range(len(places) - len(wanted) + 1):
            run = places[start : start + len(wanted)]
            if wanted and [tokens[place] for place in run] == wanted:
                left, right = tokens[: run[0]], tokens[run[-1] + 1 :]
                clause = [*left, *takewhile(lambda token: token not in _LIST_MARKS, right)]
                if (_NEGATIONS & set(clause)) - known:
                    continue
                if left[-1:] == [_RANGE] or right[:1] == [_RANGE]:
                    continue
                # `no more than 14 days` names the number.
                if left[-1:] == ["than"] and "than" not in known and left[-3:-2] != ["no"]:
                    continue
                before, after = _next_item(left[::-1])[::-1], _next_item(right)
                if not any(_is_candidate(item, len(wanted) + 1, known) for item in (before, after)):
                    return True
    return False


def named_in(answer: str, accepted: str) -> bool:
    """Whether an accepted answer stands anywhere in an answer, as a run of whole words."""
    said, wanted = _words(normalised_tokens(answer)), _words(normalised_tokens(accepted))
    return bool(wanted) and any(said[start : start + len(wanted)] == wanted for start in range(len(said)))


def abstains(answer: str) -> bool:
    """Whether the first sentence of an answer declines with one of `ABSTENTIONS`, and does not go on with `but`."""
    said = _words(normalised_tokens(first_sentence(answer)))
    text = f" {' '.join(said)} "
    return "but" not in said and any(f" {phrase} " in text for phrase in ABSTENTIONS)


def first_sentence(answer: str, accepted: Set[str] = frozenset()) -> str:
    """The first line or sentence of an answer that is neither a question nor a filler such as `Sure!`.

    Args:
        accepted: the accepted answers in small letters. None of them is a filler.
    """
    fillers = _FILLERS - accepted
    start = 0
    for end in (*_END.finditer(answer), None):
        part = answer[start : end.start() if end else len(answer)].strip()
        is_question = end is not None and "?" in end.group()
        filler = " ".join(re.findall(r"\w+", part.lower()))
        if part and not is_question and filler and filler not in fillers:
            return part
        start = end.end() if end else start
    return ""


def normalised_tokens(text: str) -> list[str]:
    """The words of a text as answers are compared, with the marks that separate the items of a list."""
    text = unicodedata.normalize("NFKD", text.replace("’", "'"))
    text = "".join(c for c in text if not unicodedata.combining(c))
    # `A` alone and a capital A after a word (`Plan A`) are no articles, but before a capital letter (`THIS IS A HARE`).
    text = re.sub(r"^A(?=\W*$)|(?<=\w )A\b(?! [A-Z])", _LETTER_A, text).casefold()
    text = re.sub(r"\b(can)'t\b|\bcan not\b", "cannot", text)
    text = re.sub(r"n't\b|\bno longer\b(?! than)", " not", text)
    text = re.sub(r"'s\b|(?<=s)'(?!\w)", "", text)
    text = re.sub(r"(?<=\d)[\u00a0\u202f '](?=\d{3}(?!\d))", "", text)
    text = re.sub(r"\b(?P<year>\d{4})-(?P<month>\d\d)-(?P<day>\d\d)\b", _date, text)
    text = re.sub(r"(?<![\w.])(?P<day>\d\d?)\.(?P<month>\d\d?)\.(?P<year>\d{4})\b(?!\.\d)", _date, text)
    text = re.sub(r"(?<=\d)\s?([ap])\.?\s?m\b\.?", r" \1m", text)
    text = re.sub(r"(?<![\w.:])([01]?\d|2[0-3]):([0-5]\d)(?![\w:])", _time, text)
    text = re.sub(rf"([€$£]|\b(?:eur|usd|gbp)\b)\s?({_AMOUNT})", r" \2 \1 ", text)
    # A range of numbers is a list of two.
    text = re.sub(r"(?<=\d)\s?[-–—]\s?(?=\d)", " – ", text)
    text = re.sub(r"\b([ap]m)\s?[-–—]\s?(?=\d)", r"\1 to ", text)
    # `KX-200` is `KX200`.
    text = re.sub(r"(?<=[a-z])-(?=\d)", "", text)
    tokens = [token for token in _numbers(list(_split(text))) if token not in _ARTICLES]
    return ["a" if token == _LETTER_A else token for token in _ranges(_dates(tokens))]


def _words(tokens: Sequence[str]) -> list[str]:
    return [token for token in tokens if token not in _LIST_MARKS]


def _split(text: str) -> Iterator[str]:
    """Words, numbers and list marks. A unit after a number has its common name, also if it is written without a space."""
    after_number = False
    for match in _TOKEN.finditer(text):
        number, suffix, word, mark = match["number"], match["suffix"], match["word"], match["mark"]
        if number:
            value = _digits(number)
            if suffix in ("st", "nd", "rd", "th"):
                yield f"{value}th"
            elif suffix and suffix not in _UNITS:
                yield value + suffix
            else:
                yield value
                yield from [_UNITS[suffix]] if suffix else []
            after_number = not suffix
        elif word:
            yield _UNITS.get(word, word) if after_number or len(word) > 3 else word.replace("'", "")
            after_number = word in NUMBER_WORDS or word in _SCALES or word == "half"
        elif mark in _UNITS:
            yield _UNITS[mark]
        elif mark in _LIST_MARKS:
            yield mark
            after_number = False


def _digits(number: str) -> str:
    """A number without thousands separators and trailing zeros. A single comma before one or two digits is decimal.

    A number with several dots is a version or an address, whose zeros count.
    """
    number = number.replace("−", "-")
    if re.fullmatch(r"-?\d+,\d{1,2}", number):
        number = number.replace(",", ".")
    number = number.replace(",", "")
    return number.rstrip("0").rstrip(".") if number.count(".") == 1 else number


def _numbers(tokens: list[str]) -> list[str]:
    """Replace number words by digits: `thirty-one`, `two and a half`, `nineteen seventy-one`, `minus 18`, `5 million`."""
    found: list[str] = []
    end = 0
    for match in _NUMBER.finditer("".join(map(_letter, tokens))):
        found += [_ordinal(token) for token in tokens[end : match.start()]]
        end = match.end()
        found.append(f"{_value(tokens[match.start() : end], is_year=match['year'] is not None):.12g}")
    return found + [_ordinal(token) for token in tokens[end:]]


# Tokens as letters, so that a regular expression finds the numbers that are written in words.
_SMALL_NUMBER = "(?:tu?|[eu])"
_HUNDREDS = f"(?:u?H(?:a?{_SMALL_NUMBER})?|{_SMALL_NUMBER})"
_NUMBER = re.compile(
    f"n?(?P<year>e(?:tu?|e)|t(?:tu|e))|d[HKM]+|nd[HKM]*"
    f"|n?(?:{_HUNDREDS}M(?:a?{_HUNDREDS}K)?(?:a?{_HUNDREDS})?|{_HUNDREDS}?K(?:a?{_HUNDREDS})?|{_HUNDREDS}|z)(?:aih)?"
)


def _letter(token: str) -> str:
    if token in _NUMBERS:
        return "z" if token == "zero" else "u" if _NUMBERS[token] < 10 else "e"
    if token in _TENS:
        return "t"
    if re.fullmatch(r"\d+(\.\d+)?", token):
        return "d"
    letters = {"hundred": "H", "thousand": "K", "million": "M", "billion": "M", "and": "a", "a": "i", "half": "h"}
    return (letters | {"minus": "n"}).get(token, ".")


def _value(number: Sequence[str], is_year: bool) -> float:
    if number[0] == "minus":
        return -_value(number[1:], is_year)
    total = current = 0.0
    for place, word in enumerate(number):
        if word in _SCALES:
            current = (current or 1) * _SCALES[word]
            if word != "hundred":
                total, current = total + current, 0.0
        elif word == "half":
            current += 0.5
        else:
            # The first two digits of a year are read as one number.
            current = current * (100 if is_year and place == 1 else 1) + (
                NUMBER_WORDS.get(word, 0) if word.isalpha() else float(word)
            )
    return total + current


def _ordinal(token: str) -> str:
    return f"{_ORDINALS.index(token) + 1}th" if token in _ORDINALS else token


def _date(match: re.Match[str]) -> str:
    year, month, day = (int(match[part]) for part in ("year", "month", "day"))
    return f"{day} {_MONTHS[month - 1]} {year}" if 1 <= month <= 12 else match.group()


def _time(match: re.Match[str]) -> str:
    """`17:30` as `5:30 pm`, and `9:00` as `9`."""
    hour, minutes = int(match[1]), match[2]
    time = f"{hour - 12 if hour > 12 else hour}" + (f":{minutes}" if minutes != "00" else "")
    return f"{time} pm" if hour > 12 else time


def _ranges(tokens: Sequence[str]) -> list[str]:
    """Write `to` and the like as one token if it stands between two numbers, times, amounts, weekdays or months."""
    found = list(tokens)
    for place in range(1, len(tokens) - 1):
        ends = (tokens[place - 1], tokens[place + 1])
        if tokens[place] in _RANGE_WORDS and all(end[-1].isdigit() or end in _RANGE_ENDS for end in ends):
            found[place] = "–" if all(end[-1].isdigit() for end in ends) else _RANGE
    return found


def _dates(tokens: list[str]) -> list[str]:
    """Write dates as day, month, year, without commas: `March 4, 1971` and `4th of March 1971` are `4 march 1971`."""
    found: list[str] = []
    place = 0
    while place < len(tokens):
        here, rest = tokens[place], tokens[place + 1 :]
        if _is_day(here) and rest[:1] == ["of"] and rest[1:2] and rest[1] in _MONTH_NAMES:
            rest = rest[1:]
            place += 1
        if _is_day(here) and rest and rest[0] in _MONTH_NAMES:
            found += [here.removesuffix("th"), _MONTH_NAMES[rest[0]]]
            place += 2
        elif here in _MONTH_NAMES and rest and _is_day(rest[0]):
            found += [rest[0].removesuffix("th"), _MONTH_NAMES[here]]
            place += 2
        else:
            found.append(here)
            place += 1
            continue
        is_year = re.compile(r"\d{4}").fullmatch
        if tokens[place : place + 1] == [","] and tokens[place + 1 : place + 2] and is_year(tokens[place + 1]):
            place += 1
    return found


def _is_day(token: str) -> bool:
    return re.fullmatch(r"([1-9]|[12]\d|3[01])(th)?", token) is not None


def _next_item(tokens: Sequence[str]) -> list[str]:
    """The item of a list that follows an answer, if `tokens`, which follow the answer, begin with a separator."""
    separators = _LIST_MARKS | _LIST_WORDS
    start = next((place for place, token in enumerate(tokens) if token not in separators), 0)
    return list(takewhile(lambda token: token not in separators, tokens[start:])) if start else []


def _is_candidate(item: Sequence[str], most_words: int, known: set[str]) -> bool:
    """Whether an item of a list is another answer, and not a remark on the answer before it."""
    return 0 < len(item) <= most_words and item[0] not in _FUNCTION_WORDS and not known.issuperset(item)
