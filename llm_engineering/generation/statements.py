"""Turns statements into questions by rule, for English: "The prize of the fair is a spoon." into "What is the prize of the fair?".

A small model writes no usable question for some sentences, however often it is asked. Many of them have one of these forms,
from which a question follows word for word. A sentence in another form gets no question here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from llm_engineering.documents.sentences import FUNCTION_WORDS
from llm_engineering.generation.answers import TABLE_ROW, AnswerSpan, Kind

# The origin of such questions.
BY_RULE = "statement turned by rule"
_ARTICLE = r"(?:an? |the )?"
# What may begin a sentence and as well end a question: "In earlier times the site was …", "Before the flood, the site was …".
_LEAD = (
    r"(?P<lead>(?:After|At|Before|During|For|In|Long|On|Once|Since|Today|Until)"
    rf" {_ARTICLE}(?!an? |the )\w[^,]{{0,40}}?),? (?=an? |the |[A-Z])"
)
_BE = r"(?P<be>is|are|was|were)"
_ADVERB = r"(?P<adverb>(?: (?:always|currently|formerly|now|once|originally|still))?)"
# The answer is all that is said: "a spoon" does not answer for "a spoon or a cup".
_END = r"(?:[.;!]|, (?!(?:and|or) \w+[.,;]))"
# What may follow an answer and as well end its question: "was a port before the flood", "gets a spoon at the fair".
_SINCE = rf"(?P<rest>(?: (?:after|before|in|since|until) [^,;:]+?)?){_END}"
_REST = rf"(?P<rest>(?: (?:as|at|for|in|on|to) [^,;:]+?)?){_END}"
_PLACED = "(?:at|by|from|in|near|of|on|with)"
# A participle or its like, and what belongs to it.
_DONE = (
    r"(?P<done>(?:[a-z]+(?:ed|en|wn)|born|built|cut|found|ground|held|kept|made|open|sold|shut|spun|taught|told)"
    rf"(?: (?!{_PLACED} |an? |the )[a-z]+)?)"
)
# A verb in the third person. "has" is mostly a part of one.
_DOES = r"(?P<does>(?!(?:is|was|has|does|remains|stays|as|its|his|this|minus|plus) )[a-z]+s)"
# What something does, after it. Several things may be or stand in a place, so that is not the answer of its question.
_ACTS = r"(?P<acts>(?!(?:is|was|stands|stood|lies) (?:at|in|near|on)\b)(?:is|was|has|had|[a-z]+(?:s|ed)) (?!that\b)(?:[^,;:]|(?<=\d),(?=\d))+?)(?:[;!]|[,.](?!\d))"
# A part of a subject.
_NO_VERB = r"(?:(?! (?:is|are|was|were|has|have|had|will|can|may|must) )[^,;:()])"
_WORDS_OF_A_VALUE = 6
# Columns such as "Who", "Until" and "2023".
_NO_NOUN = re.compile(rf"\d|(?:until|since|{'|'.join(FUNCTION_WORDS)})\b", re.IGNORECASE)
_WHEN: frozenset[Kind] = frozenset(["day", "month", "year", "hour"])
_COLOURS = frozenset([
    "beige", "black", "blue", "brown", "crimson", "golden", "gray", "green", "grey", "orange", "pink", "plum", "purple", "red",
    "scarlet", "silver", "turquoise", "violet", "white", "yellow",
])  # fmt: skip


def question_by_rule(sentence: str, asked: AnswerSpan) -> str | None:
    """The question that `sentence` answers with the asked words; None if the sentence has none of the forms."""
    # "on Mondays" answers with Monday
    answer = rf"{_ARTICLE}{re.escape(asked.answer)}{'s?' * (asked.kind == 'day')}"
    of_it = rf"(?P<subject>(?:(?:An?|The|an?|the|Each|Every|each|every) |{re.escape(asked.topic)}){_NO_VERB}*?)"
    person = asked.kind == "person"
    who = "Who" if person else "What"

    # "The prize of the fair is a spoon.", "Before the flood, the site was a brewery."
    for start in (_LEAD, ""):
        if said := re.match(
            rf"{start}{of_it} {_BE}{_ADVERB}(?P<how>(?: (?:at|in|near|on))?) {answer}{_SINCE}", sentence
        ):
            word = _asking(asked, said["how"].strip())
            if asked.answer in _COLOURS:
                word = "What colour"
            elif asked.kind == "price" and "price" not in said["subject"]:
                word = "How much"
            lead = f" {said['lead'][0].lower()}{said['lead'][1:]}" if start else ""
            return f"{word} {said['be']} {_inside(said)}{said['adverb']}{said['rest']}{lead}?" if word else None

    # "The flour is ground at the mill.", "The lamp was designed by Alice.", "The ferry is named the Gull."
    if said := re.match(rf"{of_it} {_BE} {_DONE}(?P<how>(?: {_PLACED})?) {answer}{_END}", sentence):
        word = _asking(asked, said["how"].strip())
        kept = said["how"] if word == who else ""
        return f"{word} {said['be']} {_inside(said)} {said['done']}{kept}?" if word else None

    # "The fair takes place in June.", "The winner gets a spoon at the fair.", "The fund pays for lessons."
    if said := re.match(
        rf"{of_it} {_DOES}(?P<more>(?: place)?)(?P<how>(?: (?!an? |the )[a-z]+)?) {answer}{_REST}", sentence
    ):
        word = _asking(asked, said["how"].strip())
        kept = said["how"] if word == who else ""
        verb = _infinitive(said["does"])
        return f"{word} does {_inside(said)} {verb}{said['more']}{kept}{said['rest']}?" if word else None

    # "On Mondays the mill is shut.", "In Corvin the lamp is made."
    if said := re.match(rf"(?:At|In|Near|On) {answer},? {of_it} {_BE} (?P<rest>[^,;:]+?)[,.;!]", sentence):
        word = _asking(asked, "in")
        return f"{word} {said['be']} {_inside(said)} {said['rest']}?" if word else None

    # "The site used to be a brewery."
    if said := re.match(rf"{of_it} used to be {answer}{_END}", sentence):
        return f"What did {_inside(said)} use to be?"

    # "Ruth Crole, the manager of the site, asked for a crane.", "The prize of the fair, a spoon, hangs in the mill."
    if person and (said := re.search(rf"{answer}, (?:who (?P<acts>[a-z]+ [^,]+)|(?P<role>the [^,]+)),", sentence)):
        return f"Who is {said['role']}?" if said["role"] else f"Who {said['acts']}?"
    if said := re.match(rf"{of_it}, {answer}, (?!and\b|or\b)", sentence):
        return f"{who} is {_inside(said)}?"

    # "Ruth Crole manages the site.", "Woodworm closed the mill, and it was costly."
    said = re.match(rf"{answer} {_ACTS}", sentence, re.IGNORECASE)
    if said and asked.kind in ("person", "thing") and " and " not in said["acts"]:
        return f"{who} {said['acts']}?"
    return None


def questions_of_row(number: int, sentence: str) -> Iterator[tuple[AnswerSpan, str]]:
    """The questions about a row of a table, which its first cell names: "Model: K12; Price: 30 EUR." has the price of K12.

    A row's long cells are remarks, so nothing asks for them. A sentence that is no row has no questions.

    Args:
        number: of the sentence.
    """
    if not TABLE_ROW.fullmatch(sentence):
        return
    (_, subject), *others = (cell.split(": ", 1) for cell in sentence.rstrip(".").split("; "))
    for column, value in others:
        if len(value.split()) <= _WORDS_OF_A_VALUE and not _NO_NOUN.match(column):
            # "IBAN" keeps its capitals.
            name = column if column.isupper() else f"{column[0].lower()}{column[1:]}"
            yield (
                AnswerSpan(number, value, "thing", subject),
                f"What {'are' if re.search('[^s]s$', name) else 'is'} the {name} of {subject}?",
            )


def _asking(asked: AnswerSpan, preposition: str) -> str | None:
    """The first words of a question for an answer after a preposition, or directly after a verb."""
    if preposition in ("at", "in", "near", "on"):
        return "When" if asked.kind in _WHEN else "Where" if asked.kind in ("place", "thing") else None
    if asked.kind == "duration":
        return "How long" if not preposition else None
    if preposition in ("", "by", "for", "from", "of", "to", "with"):
        return "Who" if asked.kind == "person" else "What"
    return None


def _infinitive(verb: str) -> str:
    """The infinitive of a regular verb in the third person."""
    if verb.endswith("ies"):
        return f"{verb[:-3]}y"
    return verb[:-2] if re.search("(?:ss|sh|ch|x|zz|go)es$", verb) else verb[:-1]


def _inside(said: re.Match[str]) -> str:
    """The subject of a statement as it stands inside a sentence: with its article in small letters."""
    return re.sub("^(?:An?|The|Each|Every) ", lambda article: article[0].lower(), said["subject"])
