"""Turns statements into questions by rule, for English: "The prize of the fair is a spoon." into "What is the prize of the fair?".

A small model writes no usable question for some sentences, however often it is asked. Many of them have one of these forms,
from which a question follows word for word. A sentence in another form gets no question here.
"""

from __future__ import annotations

import re

from llm_engineering.generation.answers import Asked, Kind

# The start of the origin of such questions.
BY_RULE = "statement turned by rule"
_ARTICLE = r"(?:an? |the )?"
# What may begin a sentence and as well end a question: "In earlier times the site was …", "Before the flood, the site was …".
_LEAD = (
    r"(?P<lead>(?:After|At|Before|During|For|In|Long|On|Once|Since|Today|Until)"
    rf" {_ARTICLE}(?!an? |the )\w[^,]{{0,40}}?),? (?=an? |the |[A-Z])"
)
_TO_BE = r" (?P<be>is|are|was|were)(?P<adverb>(?: (?:always|currently|formerly|now|once|originally|still))?)"
_PLACE = r"(?P<place>(?: (?:at|in|near|on))?) "
# The answer is all that is said: "a spoon" does not answer for "a spoon or a cup".
_END = r"(?:[.;!]|, (?!(?:and|or) \w+[.,;]))"
# What may follow an answer and as well end its question: "gets a spoon at the fair".
_REST = r"(?P<rest>(?: (?:as|at|for|in|on|to) [^,;:]+?)?)[,.;!]"
# A participle and what belongs to it.
_DONE = r"(?:[a-z]+(?:ed|en|wn)|born|built|cut|found|ground|held|kept|made|sold|spun|taught|told|wrought)(?: [a-z]+)?"
_NO_VERBS = frozenset(["is", "was", "has", "does", "remains", "stays", "as", "its", "his", "this"])
_WHEN: frozenset[Kind] = frozenset(["day", "month", "year", "hour"])
_COLOURS = frozenset([
    "beige", "black", "blue", "brown", "crimson", "golden", "gray", "green", "grey", "orange", "pink", "plum", "purple", "red",
    "scarlet", "silver", "turquoise", "violet", "white", "yellow",
])  # fmt: skip
# Several things may be or stand in a place, or say something, so such a statement is not the answer of its question.
_DOES = r"(?!(?:is|was|stands|stood|lies) (?:at|in|near|on)\b)(?P<does>(?:is|was|has|had|[a-z]+(?:s|ed)) (?!that\b)[^,;:]+?)"


def question_by_rule(sentence: str, asked: Asked) -> str | None:
    """The question that `sentence` answers with the asked words; None if the sentence has none of the forms."""
    answer, topic = re.escape(asked.answer), re.escape(asked.topic)
    person = asked.kind == "person"
    subject = rf"(?P<subject>(?:(?:An?|The|an?|the) |{topic})[^,;:()]*?)"

    # "The prize of the fair is a spoon.", "Before the flood, the site was a brewery."
    for start in (_LEAD, ""):
        if said := re.match(rf"{start}{subject}{_TO_BE}{_PLACE}{_ARTICLE}{answer}{_END}", sentence):
            word = "Who" if person else "What colour" if asked.answer in _COLOURS else "What"
            if said["place"]:
                word = "When" if asked.kind in _WHEN else "Where"
            lead = f" {said['lead'][0].lower()}{said['lead'][1:]}" if start else ""
            return f"{word} {said['be']} {_inside(said['subject'])}{said['adverb']}{lead}?"

    # "The flour is ground at the mill.", "The lamp was designed by Alice."
    said = re.match(
        rf"{subject} (?P<be>is|are|was|were) (?P<done>{_DONE}) (?P<how>\w+) {_ARTICLE}{answer}{_END}", sentence
    )
    if said and (word := _asking(asked, said["how"])):
        kept = f" {said['how']}" if word in ("Who", "What") else ""
        return f"{word} {said['be']} {_inside(said['subject'])} {said['done']}{kept}?"

    # "The fair takes place in June.", "The winner gets a spoon at the fair."
    said = re.match(
        rf"{subject} (?P<does>[a-z]+s)(?P<more>(?: place)?)(?P<how>(?: in| at| on| near)?) {_ARTICLE}{answer}{_REST}",
        sentence,
    )
    if said and said["does"] not in _NO_VERBS and (word := _asking(asked, said["how"].strip())):
        return f"{word} does {_inside(said['subject'])} {_infinitive(said['does'])}{said['more']}{said['rest']}?"

    # "The site used to be a brewery."
    if said := re.match(rf"{subject} used to be {_ARTICLE}{answer}{_END}", sentence):
        return f"What did {_inside(said['subject'])} use to be?"

    # "Ruth Crole, the manager of the site, asked for a crane."
    if person and (said := re.search(rf"{answer}, (the [^,]+),", sentence)):
        return f"Who is {said[1]}?"

    # "Ruth Crole manages the site.", "Woodworm closed the mill, and it was costly."
    said = re.match(rf"{_ARTICLE}{answer} {_DOES}[,.;!]", sentence, re.IGNORECASE)
    if said and asked.kind in ("person", "thing") and " and " not in said["does"]:
        return f"{'Who' if person else 'What'} {said['does']}?"
    return None


def _asking(asked: Asked, preposition: str) -> str | None:
    """The first word of a question for an answer after a preposition."""
    if preposition in ("", "by", "of", "with", "from"):
        if asked.kind == "duration":
            return "How long" if not preposition else None
        return "Who" if asked.kind == "person" else "What"
    if preposition in ("in", "at", "on", "near"):
        return "When" if asked.kind in _WHEN else "Where" if asked.kind in ("place", "thing") else None
    return None


def _infinitive(verb: str) -> str:
    """The infinitive of a regular verb in the third person."""
    if verb.endswith("ies"):
        return f"{verb[:-3]}y"
    return verb[:-2] if re.search("(?:ss|sh|ch|x|oe|zz)es$", verb) or verb.endswith("goes") else verb[:-1]


def _inside(subject: str) -> str:
    """A subject as it stands inside a sentence: with its article in small letters."""
    return re.sub("^(?:An?|The) ", lambda article: article[0].lower(), subject)
