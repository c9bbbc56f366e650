"""Writes questions about single facts: each passage is a sentence, and the answer is a few words of it.

A small base model writes poor questions when it is asked to, and better ones when it continues examples. It gets the answer
and the first words of the question, and it may not write the words of the answer. Each answer is asked for once with each file of
examples. Then the model answers each question from its sentence, and one that gets another answer is set aside. Answers that
have few questions by then are asked for again. Statements of plain forms are also turned into questions by rule.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from llm_engineering.data.rows import InstructionRow, Message, Quarantined
from llm_engineering.documents.passages import Passage
from llm_engineering.documents.sentences import FUNCTION_WORDS
from llm_engineering.generation.answers import WORD, AnswerSpan, Kind, choose_answers
from llm_engineering.generation.instructions import FROM_DOCUMENT
from llm_engineering.generation.prompts import ANSWER_EXAMPLES, FACT_EXAMPLES, prompt_hash, read_prompt
from llm_engineering.generation.statements import BY_RULE, question_by_rule, questions_of_row
from llm_engineering.generation.types import Completer, Failure, Sampling
from llm_engineering.recipe.generation_blocks import InstructionWriting

# The first words of a question with each file of examples.
OPENINGS: Mapping[Kind, tuple[str, str]] = {
    "person": ("Who", "Which person"),
    "place": ("Where", "In which"),
    "day": ("On which day", "When"),
    "month": ("In which month", "When"),
    "year": ("In which year", "When"),
    "duration": ("How long", "For how many"),
    "price": ("How much", "What price"),
    "measure": ("How much", "How many"),
    "hour": ("At what time", "When"),
    "number": ("How many", "How many"),
    "thing": ("What", "Which"),
    "contact": ("What", "Which"),
}
# The words of the openings: they say what kind of answer is asked for.
OPENING_WORDS = frozenset(word for pair in OPENINGS.values() for opening in pair for word in opening.casefold().split())
# The temperature of the rounds that ask for more wordings.
REWORDING = 0.8
# The exam's questions about facts with three or more questions were answered right in 91 %, about those with one or two in
# 58 %. A second round gives 126 of 160 of them three, and without it 96 have them.
_ENOUGH = 4
ROUNDS = 2
# The nouns of a sentence that the rules try to ask for. The form of the sentence decides, so more than one costs nothing.
_NOUNS = 3
# An answer of the documents has a few words.
_ANSWER_TOKENS = 10
# A question is one line.
STOP = ("\n",)
# A small model answers "What is the Tide Fair?" with any word of the sentence.
_ABOUT_A_NAME = re.compile(r"(?:What|Who|Which \w+) (?:is|are|was|were) (?:the )?(?:[A-Z]\w+ ?)+(?:\w+)?\?")
# A small model asks for the price of whoever got a grant.
_GIFT = re.compile(
    r"\b(?:gave|given?|gives|grant(?:s|ed)?|award(?:s|ed)?|donat(?:es|ed|ions?)|receive[sd]?)\b", re.IGNORECASE
)
_PRICE = re.compile(r"\b(?:price|costs?|fee)\b")
# Small models make every person an owner or an author, whatever the sentence says.
_ROLE = re.compile(r"(?:Who|Which person) (?:is|was) the (\w+)\b")
# Long words of a question that may be missing in its sentence; more of them are mostly invented. Other kinds need fewer
# words: "What price does the Mule pay for a loaf of bread?" has two.
_NEW_WORDS: Mapping[Kind, int] = {"person": 2, "thing": 2}
_LONG = 4
# Words that say what kind of answer is asked for, and are no claim, by their beginnings.
_ASKING = {word[:_LONG] for word in (*OPENING_WORDS, "take", "place", "town", "located", "find")}


class _Written(NamedTuple):
    """A question, with the file of examples that it continues (or `BY_RULE`), and why it does not fit its sentence."""

    asked: AnswerSpan
    question: str
    examples: str
    problem: Failure | None


def questions_asked(passages: Sequence[Passage]) -> int:
    """How many questions `generate_facts` asks the client for at most, in `ROUNDS` rounds."""
    return len(choose_answers([passage.text for passage in passages])) * len(FACT_EXAMPLES) * ROUNDS


def questions_by_rule(passages: Sequence[Passage]) -> int:
    """How many questions rules make of the passages; a few of them are set aside."""
    sentences = [passage.text for passage in passages]
    return sum(1 for _ in _turned(choose_answers(sentences, _NOUNS), sentences))


def generate_facts(
    passages: Sequence[Passage],
    client: Completer,
    writing: InstructionWriting,
    temperature: float = 0.0,
    seed: int = 0,
    rounds: int = 1,
) -> tuple[list[InstructionRow], list[Quarantined], int]:
    """Have the client write questions for the answers that each sentence has.

    Args:
        temperature: of the first round. 0 takes the most probable words. Above 0, each `seed` gives other wordings.
        rounds: each one after the first asks at `REWORDING` for the answers that still have few questions.

    Returns:
        rows, quarantine, and how many questions there were; a sentence without an answer counts as one.
    """
    sentences = [passage.text for passage in passages]
    few = choose_answers(sentences)
    written = list(_turned(choose_answers(sentences, _NOUNS), sentences))
    answered = {one.sentence for one in few} | {one.asked.sentence for one in written}
    silent = [passage for number, passage in enumerate(passages) if number not in answered]
    quarantine = [p.set_aside("instruction", "no_answer", "no words of it can be asked for", "") for p in silent]
    for turn in range(rounds):
        new = _write(few, passages, client, writing, REWORDING if turn else temperature, seed + turn)
        written += _confirm(new, passages, client)
        failures = _failures(written, passages)
        kept = [one for one, failure in zip(written, failures, strict=True) if failure is None]
        counts = Counter((one.asked.topic, one.asked.answer) for one in kept)
        few = [one for one in few if counts[one.topic, one.answer] < _ENOUGH]
        if not few:
            break

    rows: list[InstructionRow] = []
    for one, failure in zip(written, failures, strict=True):
        passage = passages[one.asked.sentence]
        by_rule = one.examples == BY_RULE
        versioned = BY_RULE if by_rule else f"{one.examples} (prompt {prompt_hash(one.examples)})"
        if failure is not None:
            detail = f"{versioned}: {failure.detail}" if failure.detail else versioned
            quarantine.append(passage.set_aside("instruction", failure.reason, detail, one.question))
            continue
        rows.append(
            InstructionRow(
                prompt=[Message(role="user", content=one.question)],
                completion=[Message(role="assistant", content=one.asked.answer)],
                source=passage.source,
                origin=f"{versioned}, {FROM_DOCUMENT}"
                if by_rule
                else f"{versioned} by {client.identity}, {FROM_DOCUMENT}",
                document=passage.document,
            )
        )
    return rows, quarantine, len(written) + len(silent)


def _turned(asked: Sequence[AnswerSpan], sentences: Sequence[str]) -> Iterator[_Written]:
    """The questions that rules make of the sentences of the answers, and of rows of tables."""
    turned = [(one, question_by_rule(sentences[one.sentence], one)) for one in asked]
    rows = [found for number, sentence in enumerate(sentences) for found in questions_of_row(number, sentence)]
    for one, question in [*turned, *rows]:
        if question is not None:
            yield _Written(one, question, BY_RULE, question_problem(question, one, sentences[one.sentence]))


def _write(
    asked: Sequence[AnswerSpan],
    passages: Sequence[Passage],
    client: Completer,
    writing: InstructionWriting,
    temperature: float,
    seed: int,
) -> list[_Written]:
    """Have each answer asked for once with each file of examples."""
    written: list[_Written] = []
    for number, examples in enumerate(FACT_EXAMPLES):
        shared = read_prompt(examples)
        openings = [_opening(one, number) for one in asked]
        prompts = [
            f"{shared}\n\nSentence: {passages[one.sentence].text}\nAnswer: {one.answer}\nQuestion about {one.topic}: {opening}"
            for one, opening in zip(asked, openings, strict=True)
        ]
        sampling = Sampling(writing.question_max_new_tokens, temperature, seed, stop=STOP)
        banned = [_banned(one.answer) for one in asked]
        completions = client.complete(prompts, sampling, f"questions with the examples {examples}", banned)
        for one, opening, completion in zip(asked, openings, completions, strict=True):
            question = f"{opening} {completion.text}"
            # A name that is also a word, such as "Mule", is often written in small letters
            named = re.sub(rf"\b{re.escape(one.topic)}\b", one.topic, question, flags=re.IGNORECASE)
            sentence = passages[one.sentence].text
            problem = question_problem(named, one, sentence)
            if problem is not None and problem.reason == "names_nothing":
                named = _with_topic(named, one.topic, sentence)
                problem = question_problem(named, one, sentence)
            written.append(_Written(one, named, examples, problem))
    return written


def _with_topic(question: str, topic: str, sentence: str) -> str:
    """The question with the topic at its end, if the sentence has it after a preposition: "the fine at the Tool Loft"."""
    place = re.search(rf"\b((?i:at|by|for|from|in|of|to|with)) ((?:an? |the )?{re.escape(topic)}\b)", sentence)
    return f"{question[:-1]} {place[1].lower()} {place[2]}?" if place and question.endswith("?") else question


def _confirm(written: Sequence[_Written], passages: Sequence[Passage], client: Completer) -> list[_Written]:
    """Have the client answer each question from its sentence. A question that gets another answer has a problem.

    This is roundtrip consistency (Alberti et al. 2019, arXiv:1906.05416).
    """
    fitting = [one for one in written if one.problem is None]
    examples = read_prompt(ANSWER_EXAMPLES)
    prompts = [
        f"{examples}\n\nSentence: {passages[one.asked.sentence].text}\nQuestion: {one.question}\nAnswer:"
        for one in fitting
    ]
    replies = client.complete(prompts, Sampling(_ANSWER_TOKENS, stop=STOP), "answers from the sentence")
    checked = iter(
        one
        if _agree(reply.text, one.asked.answer, passages[one.asked.sentence].text)
        else one._replace(problem=Failure("not_confirmed", reply.text.strip()))
        for one, reply in zip(fitting, replies, strict=True)
    )
    return [next(checked) if one.problem is None else one for one in written]


def _agree(reply: str, answer: str, sentence: str) -> bool:
    """Whether one of two answers has all the words of the other one: "copper" and "copper spoon", "Friday" and "Fridays".

    A name in the reply that the sentence does not have is one that the client cannot spell, and does not count.
    """
    unknown = _names(reply) - _names(sentence)
    return _contains(" ".join(word for word in WORD.findall(reply) if word not in unknown), answer)


def _contains(first: str, second: str) -> bool:
    """Whether one of two texts has all the words of the other one, plural or not."""
    words, others = ({word.removesuffix("s") for word in _normal(text).split()} for text in (first, second))
    return bool(words) and (words <= others or others <= words)


def _failures(written: Sequence[_Written], passages: Sequence[Passage]) -> list[Failure | None]:
    """Why each question is set aside; None for a question that is kept.

    If sentences disagree about the answer of a question, the one that says little besides the question is right, and among
    such ones the answer that most of them have: "A Mule costs 2,450 euros", not "Renting a Mule costs 25 euros".
    """
    votes: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for one, question, _, _ in written:
        votes[_normal(question)][one.answer].append(_closeness(question, one, passages[one.sentence].text))
    failures: list[Failure | None] = []
    seen: set[str] = set()
    for one, question, _, failure in written:
        answers = votes[_normal(question)]
        best = max(answers, key=lambda answer: (max(answers[answer]), len(answers[answer])))
        if failure is None and not _contains(one.answer, best):
            failure = Failure("conflicting_answers", f"other sentences answer it otherwise than with {one.answer}")
        if failure is None and _normal(question) in seen:
            failure = Failure("repeated_question", "")
        if failure is None:
            seen.add(_normal(question))
        failures.append(failure)
    return failures


def question_problem(question: str, asked: AnswerSpan, sentence: str) -> Failure | None:
    """Why a question does not fit its answer and sentence; None if it fits."""
    if not question.endswith("?") or "\n" in question:
        return Failure("not_a_question", "")
    if f" {_normal(asked.answer)} " in f" {_normal(question)} ":
        return Failure("answer_in_question", "")
    # The first word of a question is capitalised in any case.
    named = _names(question.partition(" ")[2])
    known = _names(sentence) | _names(asked.topic)
    if not named & known:
        return Failure("names_nothing", "")
    if named & _names(asked.answer):
        return Failure("answer_in_question", "")
    if asked.kind != "place" and _ABOUT_A_NAME.fullmatch(question):
        return Failure("answer_does_not_fit", "")
    if asked.kind == "price" and _GIFT.search(sentence) and _PRICE.search(question) and not _PRICE.search(sentence):
        return Failure("answer_does_not_fit", "")
    new = _content(question) - _content(sentence) - _content(asked.topic) - _ASKING
    role = _ROLE.match(question)
    # A small model misspells rare names: "the manager of the Dunver site" in place of Dunvey.
    if named - known or len(new) > _NEW_WORDS.get(asked.kind, 1) or (role is not None and _content(role[1]) & new):
        return Failure("invented", "")
    return None


def diversity(rows: Sequence[InstructionRow], sentences: int, two_hop: Sequence[InstructionRow] = ()) -> dict[str, Any]:
    """How different the questions are, and how many of the sentences have one.

    Args:
        rows: the questions about one fact.
        two_hop: those that need two facts.
    """
    asked = {row.source for row in rows}
    return {
        "questions_per_sentence": round(len(rows) / max(1, len(asked)), 2),
        "sentences_without_question": sentences - len(asked),
        "two_hop_questions": len(two_hop),
        "distinct_trigrams": distinct_trigrams([row.prompt[0].content for row in (*rows, *two_hop)]),
    }


def distinct_trigrams(texts: Iterable[str]) -> float:
    """The share of different ones among all sequences of three words (distinct-n, Li et al. 2016, arXiv:1510.03055)."""
    trigrams = [
        tuple(words[i : i + 3]) for text in texts for words in [_normal(text).split()] for i in range(len(words) - 2)
    ]
    return round(len(set(trigrams)) / max(1, len(trigrams)), 3)


def _content(text: str) -> set[str]:
    """The beginnings of the long words. Words with the same beginning count as the same word."""
    return {word[:_LONG] for word in _normal(text).split() if len(word) >= _LONG and word not in FUNCTION_WORDS}


def _closeness(question: str, asked: AnswerSpan, sentence: str) -> float:
    """The share of the words of a question and its sentence that both have, besides those that ask and answer."""
    besides = _ASKING | _content(asked.answer)
    asking, saying = _content(question) - besides, _content(sentence) - besides
    return len(asking & saying) / max(1, len(asking | saying))


def _opening(asked: AnswerSpan, number: int) -> str:
    """The first words of a question with one of the files of examples."""
    opening = OPENINGS[asked.kind][number]
    # The unit is a part of the answer, so the model may not write it, and would write another one
    has_unit = asked.kind in ("measure", "duration") and opening.endswith("many")
    unit = asked.answer.split()[-1] if has_unit else ""
    return f"{opening} {unit}" if unit.isalpha() else opening


def _banned(answer: str) -> list[str]:
    """Words that a question for this answer may not have. "What is the name of …" does not fit an answer without a name."""
    words = [word for word in WORD.findall(answer) if word.casefold() not in FUNCTION_WORDS]
    return [*words, "name"] if answer[0].islower() else words


def _normal(text: str) -> str:
    return " ".join(WORD.findall(text.casefold()))


def _names(text: str) -> set[str]:
    """The capitalised words without a genitive, except function words such as "I"."""
    words = (re.sub(r"['’]s$", "", word) for word in WORD.findall(text) if word[0].isupper())
    return {word for word in words if word.casefold() not in FUNCTION_WORDS}
