"""Finds claims of a rewriting that its passage does not make: names, numbers and dates that are not in the passage."""

from __future__ import annotations

import re
from collections.abc import Set

from llm_engineering.data.exam_answers import NUMBER_WORDS
from llm_engineering.documents.sentences import FUNCTION_WORDS
from llm_engineering.generation.answers import WORD

# Labels of the lines of dialogues and FAQs. They are no names.
_LABEL = re.compile(r"^[ \t]*(?:[-*#>]+[ \t]*)?(?:\*\*)?(?:[AQB]|Question|Answer)(?:\*\*)?:(?:\*\*)?", re.MULTILINE)
# The place after which a word begins with a capital in any case.
_START = re.compile(r"[.!?:;\n][\"'”’)*]*\s*[-*#>\"'“‘(]*\s*$")
_MARKS = " \n-*#>\"'“‘("
# More characters than stand between two sentences.
_BETWEEN = 8
_NUMBERS = {word: str(number) for word, number in NUMBER_WORDS.items()}
# Function words, and words that begin the questions of an FAQ.
_NO_NAMES = FUNCTION_WORDS | frozenset(["faq", "question", "questions", "answer", "answers", "summary"])


def missing_claims(text: str, passage: str, names: Set[str]) -> list[str]:
    """The names, numbers and dates of a text that are not in the passage, in the order of the text.

    Names are the words with a capital that do not begin a sentence; such a word counts if it is known as a name, or if
    the next one has a capital too. Months and weekdays are names, and "six" is the number 6. The number "one" is not
    checked, because it is mostly a pronoun.

    Args:
        passage: the passage with its title.
        names: the words of all documents that are names.
    """
    said = {_folded(word) for word in WORD.findall(passage)}
    said |= {part for word in said for part in word.split("-")}
    missing: dict[str, None] = {}
    text = _LABEL.sub("", text)
    words = list(WORD.finditer(text))
    for index, match in enumerate(words):
        word = _folded(match[0])
        is_number = word[0].isdigit() and word != "1"
        if not is_number and not _is_name(text, words, index, names):
            continue
        if word not in said and not all(part in said for part in word.split("-")):
            missing[match[0]] = None
    return list(missing)


def _is_name(text: str, words: list[re.Match[str]], index: int, names: Set[str]) -> bool:
    word = re.sub(r"['’]s$", "", words[index][0])
    if not word[0].isupper() or len(word) == 1 or word.casefold() in _NO_NAMES:
        return False
    start = words[index].start()
    begins = not text[:start].strip(_MARKS) or _START.search(text[max(0, start - _BETWEEN) : start])
    if not begins:
        return True
    following = words[index + 1] if index + 1 < len(words) else None
    # "Albert Renn built it" begins with a name, and "Visitors pay" does not.
    joined = following is not None and text[words[index].end() : following.start()] == " "
    return word in names or (joined and following is not None and following[0][0].isupper())


def _folded(word: str) -> str:
    """The word in small letters, without a genitive or the separators of thousands, and a number as digits."""
    folded = re.sub(r"['’]s$", "", word.casefold())
    folded = re.sub(r"(?<=\d),(?=\d{3})", "", folded)
    return _NUMBERS.get(folded, folded)
