"""Makes questions that need two facts, by rule for English, from two accepted questions that share a name.

"Who looks after the Tool Loft?" (Irene Marrop) and "Where does Irene Marrop live?" (Dunvey) give "Where does the person who
looks after the Tool Loft live?" (Dunvey). The first question becomes a description, which takes the place of its answer in
the second one. A small model's questions often say more than their sentence, and two of them together double that. So every
word of both questions must be in its own sentence, besides those that any question has.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence, Set
from itertools import zip_longest
from typing import NamedTuple

from llm_engineering.data.rows import TWO_HOP, InstructionRow, Message, normalised
from llm_engineering.documents.passages import Passage
from llm_engineering.documents.sentences import FUNCTION_WORDS
from llm_engineering.generation.answers import EXACT, WORD, Kind, choose_answers
from llm_engineering.generation.instructions import FROM_DOCUMENT

# Questions about the same two facts, in other words each.
_WORDINGS = 4
# Words with the same beginning count as the same word: "manager" and "manages".
_STEM = 4
# Words that say what kind of answer is asked for.
_ASKING = frozenset([
    "person", "place", "town", "city", "village", "name", "called", "located", "month", "year", "day", "price", "long",
    "much", "many", "take",
])  # fmt: skip
# Forms of verbs whose beginnings differ.
_SAME = {"made": "make", "built": "buil", "sold": "sell", "held": "hold", "ground": "grin", "taught": "teac"}
_PARTICIPLE = r"(?:\w+ed|made|built|sold|held|grown|ground|kept|taught|written)"
_NO_PARTICIPLES = ("located", "situated", "called")
# A question with "is the doors", or about the price of a price.
_NO_ENGLISH = re.compile(r"\b(?:is|does) the (?:[a-z]+ )?[a-z]+[^s]s |How much (?:is|does) the price")
_ENDS_WITH_PREPOSITION = re.compile(r"\b(?:by|of|at|in|from|for|to|with|on)$")
_WHERE = r"(?:Where|In (?:which|what) (place|town|city|village))"
_PHRASE = r"((?:the |a |an )?[\w'-]+(?: [\w'-]+)*?)"
# "… stands in Oskby": a mill is somewhere, and a product is only made there.
_STANDS = r" (?:is|stands|lies|sits)(?: \w+){0,2} (?:in|at|on|near) "
_NAME = r"(?:the |an? )?(?P<name>(?:[A-Z][\w'-]+ )+[A-Z][\w'-]+)"
# Questions about a name, and the phrase for the name that has the answer in it.
_IN = "the {head} in {answer}"
_OF_PERSONS = {
    rf"(?:Who|Which person) (?:is|was) the (?P<verb>[a-z]+) (?:of|at) {_NAME}": "the {head} whose {verb} is {answer}",
    rf"(?:Who|Which person) (?P<verb>[a-z]+ed) {_NAME}": "the {head} that {answer} {verb}",
}
_OF_THINGS = {rf"What is the (?P<verb>[a-z]+) (?:of|for) {_NAME}(?: made of)?": "the {head} whose {verb} is {answer}"}
_OF_PRICES = {rf"(?:How much does|What price does) {_NAME} cost": "the {head} that costs {answer}"}
_OF_PLACES = {
    rf"{_WHERE} is {_NAME} (?P<verb>{_PARTICIPLE})": "the {head} {verb} in {answer}",
    rf"{_WHERE} (?:is|does) {_NAME}(?: located| situated| stand)?": _IN,
}
_PHRASES: Mapping[Kind, Mapping[str, str]] = {
    "person": _OF_PERSONS,
    "thing": _OF_THINGS,
    "price": _OF_PRICES,
    "place": _OF_PLACES,
}
# What may stand before a name that a description replaces.
_BEFORE = r"\b(of|at|in|from|by|for|with|to|is|was|does|did|will|has)"


class _Fact(NamedTuple):
    """An accepted question with the sentence that answers it."""

    row: InstructionRow
    question: str
    answer: str
    kind: Kind
    sentence: str


def two_hop_questions(
    rows: Sequence[InstructionRow],
    passages: Sequence[Passage],
    number: int,
    seed: int,
    part_of: Callable[[str], str],
) -> list[InstructionRow]:
    """Make questions that need two facts of different documents.

    Args:
        rows: the accepted questions about facts.
        passages: the sentences that they were written from.
        number: how many to make, drawn with the seed; fewer if the facts give fewer.
        part_of: the split of a document. Both documents of a question are in one split, because a question that is
            trained on must not tell a fact that is held out.
    """
    facts = _facts(rows, passages)
    drawn = random.Random(seed)
    common = {word for passage in passages for word in WORD.findall(passage.text) if word.islower()}
    pairs = []
    for fact in facts:
        described = _description(fact)
        if described:
            pairs.append((fact, fact.answer, described))
        name, described = _by_other_fact(fact, common)
        if described:
            pairs.append((fact, name, described))
    drawn.shuffle(pairs)
    drawn.shuffle(facts)
    asked = {normalised(fact.question) for fact in facts}
    # Two facts have several questions each, so they give many with the same words.
    by_facts: dict[tuple[str, ...], list[InstructionRow]] = defaultdict(list)
    for first, name, description in pairs:
        for last in facts:
            question = _joined(last.question, name, name == first.answer and first.kind == "place", description)
            if not question or normalised(question) in asked or not _fit(first, last, name, description):
                continue
            if part_of(first.row.document) == part_of(last.row.document):
                asked.add(normalised(question))
                by_facts[name, last.answer, *sorted(_names(description))].append(_row(question, first, last))
    rounds = zip_longest(*(drawn.sample(made, min(len(made), _WORDINGS)) for made in by_facts.values()))
    return [row for made in rounds for row in made if row is not None][:number]


def _row(question: str, first: _Fact, last: _Fact) -> InstructionRow:
    return InstructionRow(
        prompt=[Message(role="user", content=question)],
        completion=[Message(role="assistant", content=last.answer)],
        source=f"{first.row.source} and {last.row.source}",
        origin=f"{TWO_HOP} by rule, {FROM_DOCUMENT}",
        document=last.row.document,
    )


def _facts(rows: Sequence[InstructionRow], passages: Sequence[Passage]) -> list[_Fact]:
    """The questions that say nothing besides their sentence, each with the kind of its answer."""
    kinds = {(one.sentence, one.answer): one.kind for one in choose_answers([passage.text for passage in passages])}
    places: dict[str, list[int]] = {}
    for index, passage in enumerate(passages):
        places.setdefault(passage.source, []).append(index)
    facts = []
    for row in rows:
        question, answer = row.prompt[0].content, row.completion[0].content
        found = next((index for index in places.get(row.source, []) if (index, answer) in kinds), None)
        if found is not None and _is_grounded(question, passages[found].text):
            facts.append(_Fact(row, question, answer, kinds[found, answer], passages[found].text))
    return facts


def _is_grounded(question: str, sentence: str) -> bool:
    """Whether every word of the question is in the sentence, in any form, besides those that ask, and none is there twice.

    "Where is the mill of Sorrel Mill?" says a word twice, as small models do.
    """
    known = {_stem(word) for word in WORD.findall(sentence.casefold())}
    words = [word for word in WORD.findall(question.casefold()) if word not in FUNCTION_WORDS]
    return len(set(words)) == len(words) and all(_stem(word) in known for word in words if word not in _ASKING)


def _stem(word: str) -> str:
    word = re.sub(r"['’]s$", "", word)
    return _SAME.get(word, word[:_STEM])


def _names(text: str) -> set[str]:
    """The capitalised words after the first word."""
    return {word for word in WORD.findall(text.partition(" ")[2]) if word[0].isupper()}


def _fit(first: _Fact, last: _Fact, name: str, description: str) -> bool:
    """Whether the second question asks for something else about the name, and nothing gives its answer away."""
    asks_exactly = (
        last.kind in EXACT
        or (last.kind == "place" and first.kind != "place" and _description(last) != "")
        or (last.kind == "thing" and _is_stated(last))
    )
    return (
        asks_exactly
        and (last.kind != "person" or _does(last))
        and not _NO_ENGLISH.search(last.question)
        and first.row.document != last.row.document
        and f" {normalised(last.answer)} " not in f" {normalised(first.sentence)} {normalised(description)} "
        and f" {normalised(name)} " not in f" {normalised(description)} "
        and not _names(last.question) & _names(description)
    )


def _description(fact: _Fact) -> str:
    """A phrase for the answer of a question, which begins with "the"; empty if no rule fits the question."""
    question = fact.question.removesuffix("?")
    if fact.kind == "person":
        return _of_person(question, fact)
    if fact.kind == "place":
        return _of_place(question, fact)
    called = re.fullmatch(r"What is (?:the name of )?(the .+?)( called)?", question)
    is_name = called is not None and (called[2] is not None or question.startswith("What is the name of"))
    return called[1] if called is not None and is_name and _says(fact, called[1]) else ""


def _of_person(question: str, fact: _Fact) -> str:
    asked = re.fullmatch(r"(?:Who|Which person) (.+)", question)
    if asked is None or not _does(fact) or _ENDS_WITH_PREPOSITION.search(asked[1]):
        return ""
    role = re.fullmatch(r"(?:is|was) (the .+)", asked[1])
    return role[1] if role else f"the person who {asked[1]}"


def _does(fact: _Fact) -> bool:
    """Whether the sentence says that a person is, or does, what the question asks.

    "Who gave applause to the designer?" is wrong if the sentence says that the meeting gave it to her.
    """
    asked = re.fullmatch(r"(?:Who|Which person) ([a-z]+) .+", fact.question)
    answer = re.escape(fact.answer)
    # "The Wisp Skiff" is no person, although both of its words begin with a capital.
    if asked is None or re.search(rf"\b(?:the|an?) {answer}\b", fact.sentence, re.IGNORECASE):
        return False
    verb = asked[1]
    if verb in ("is", "was"):
        return True
    return re.search(rf"\b{answer}(?:,[^,]*,| who)? {verb}\b|\b{verb}\b.* by {answer}\b", fact.sentence) is not None


def _is_stated(fact: _Fact) -> bool:
    """Whether the question asks for what its sentence says with "is": "The fuel for the Pebble Stove is oat husks."

    A small model asks for many other words as if they were that.
    """
    asked = re.fullmatch(r"What is (.+?)(?: made of)?\?", fact.question)
    return asked is not None and _says(fact, asked[1], rf" is (?:made of |an? |the )?{re.escape(fact.answer)}")


def _of_place(question: str, fact: _Fact) -> str:
    def place(noun: str | None) -> str:
        return noun if noun and re.search(rf"\b{noun}\b", fact.sentence) else "place"

    stated = re.fullmatch(r"Where is (the (?:place|town) (?:where|in which) .+)", question)
    if stated:
        return stated[1]
    done = re.fullmatch(rf"{_WHERE} (is|are) {_PHRASE} ({_PARTICIPLE})", question)
    if done and done[4] not in _NO_PARTICIPLES:
        return f"the {place(done[1])} where {done[3]} {done[2]} {done[4]}" if _says(fact, done[3]) else ""
    doing = re.fullmatch(rf"{_WHERE} does {_PHRASE} (live|work|stand)", question)
    if doing:
        return f"the {place(doing[1])} where {doing[2]} {doing[3]}s" if _says(fact, doing[2], f" {doing[3]}s ") else ""
    being = re.fullmatch(rf"{_WHERE} is {_PHRASE}(?: located| situated)?", question)
    if being and _says(fact, being[2], f"{_STANDS}{re.escape(fact.answer)}"):
        return f"the {place(being[1])} where {being[2]} is"
    return ""


def _says(fact: _Fact, phrase: str, after: str = "") -> bool:
    """Whether the sentence has the phrase, with the pattern `after` right behind it."""
    bare = re.sub(r"^(?:the|an?) ", "", phrase)
    return re.search(rf"\b{re.escape(bare)}\b{after}", fact.sentence, re.IGNORECASE) is not None


def _head(name: str, common: Set[str]) -> str:
    """The common noun that a name of several words ends with, e.g. "lamp" of "Kelp Lamp"; empty if it has none."""
    head = name.rpartition(" ")[2].lower()
    return head if " " in name and head in common else ""


def _by_other_fact(fact: _Fact, common: Set[str]) -> tuple[str, str]:
    """A name in the question, and a phrase for it that holds the answer; empty if no rule fits.

    "Who designed the Kelp Lamp?" (Alice Corven) gives "the lamp that Alice Corven designed".
    """
    question, answer = fact.question.removesuffix("?"), fact.answer
    for pattern, phrase in _PHRASES.get(fact.kind, {}).items():
        found = re.fullmatch(pattern, question)
        head = _head(found["name"], common) if found else ""
        if found is None or not head:
            continue
        if fact.kind == "person" and not _does(fact):
            continue
        if found.groupdict().get("verb") in _NO_PARTICIPLES:
            continue
        if fact.kind == "thing" and not _is_stated(fact):
            continue
        if phrase == _IN and not _says(fact, found["name"], f"{_STANDS}{re.escape(answer)}"):
            continue
        verb = found.groupdict().get("verb") or ""
        return found["name"], phrase.format(head=head, answer=answer, verb=verb)
    return "", ""


def _joined(question: str, name: str, is_place: bool, description: str) -> str:
    """The question with the description in the place of the name; empty if it would be no English."""
    spelled = re.escape(name)
    if len(re.findall(rf"\b{spelled}\b", question)) != 1:
        return ""
    # "the Dunvey site" becomes "the site in the place where …".
    before_noun = re.fullmatch(rf"(.*\bthe ){spelled} ([a-z]+)\?", question)
    if is_place:
        return f"{before_noun[1]}{before_noun[2]} in {description}?" if before_noun else ""
    before = rf"(.*{_BEFORE} |(?:Who|Which person) \w+ )(?:(?:[Tt]he|an?) )?"
    found = re.fullmatch(rf"{before}{spelled}((?: [a-z]+){{0,3}}\?)", question)
    return f"{found[1]}{description}{found[3]}" if found else ""
