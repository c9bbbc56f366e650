"""Asks the questions of training rows in other words, by rule.

A model that reads one wording of a question many times learns the wording. It is then as sure of a wrong answer as of a right
one, so a preference stage cannot teach it what it does not know. With other wordings, each one is read less often.

The rules are for short English questions about one fact, such as `generation.questions: fact` writes them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from llm_engineering.data.rows import REPLAY, InstructionRow, Message, normalised
from llm_engineering.data.similarity import EvaluationIndex

# The start of the origin of such rows.
OTHER_WORDING = "other wording by rule"
# What someone does or did, and what this person is called.
_AGENTS = {
    "created": "creator", "designed": "designer", "edits": "editor", "founded": "founder", "invented": "inventor",
    "leads": "leader", "manages": "manager", "owns": "owner", "wrote": "author",
}  # fmt: skip
_AUXILIARY = r"(?:is|are|was|were|do|does|did|will|can)\b"
# "Where is the lamp made?" does not ask for the location of the lamp.
_NO_PARTICIPLE = r"(?!.* (?:\w+ed|made|built|held|kept|sold|found|lost|from)\?)"
# A question, and other questions with the same answer.
_RULES: tuple[tuple[re.Pattern[str], tuple[str, ...]], ...] = tuple(
    (re.compile(question), others)
    for question, others in (
        *((rf"(?:Who|Which person) {verb} (.+)\?", (rf"Who is the {noun} of \1?",)) for verb, noun in _AGENTS.items()),
        *((rf"(?:Who|Which person) is the {noun} of (.+)\?", (rf"Who {verb} \1?",)) for verb, noun in _AGENTS.items()),
        (r"Who (\w+ .+)\?", (r"Which person \1?", r"What is the name of the person who \1?")),
        (r"Which person (\w+ .+)\?", (r"Who \1?", r"What is the name of the person who \1?")),
        (r"What is the name of the (\w+) (?:that|which|who) ((?:is|are|was|were|has) .+)\?", (r"Which \1 \2?",)),
        (rf"Where ({_AUXILIARY}) (.+)\?", (r"In which place \1 \2?",)),
        (rf"{_NO_PARTICIPLE}Where (?:is|are|was|were) (.+)\?", (r"What is the location of \1?",)),
        (r"Where (?:is|are|was|were) (.+) located\?", (r"What is the location of \1?",)),
        (r"In which (?:place|town|building|city|village) (.+)\?", (r"Where \1?",)),
        (r"In which (?:month|year|season) (.+)\?", (r"When \1?",)),
        (r"On which (?:day|date) (.+)\?", (r"When \1?",)),
        (r"At what time (.+)\?", (r"When \1?", r"At which hour \1?")),
        (r"(?:How much|What price) (?:does|do) (.+) (?:cost|have)\?", (r"What is the price of \1?", r"What does \1 cost?")),
        (r"(?:Which|What) colou?r (?:is|are) (.+)\?", (r"What is the colour of \1?", r"Which colour has \1?")),
        (r"(?:Which|What) colou?r does (.+) have\?", (r"What is the colour of \1?", r"What colour is \1?")),
        (r"(?:Which|What) colou?r do (.+) have\?", (r"What is the colour of \1?", r"What colour are \1?")),
        (r"What is the (?!name)(\w+) of (?!.* made of\?)(.+)\?", (r"Which \1 does \2 have?",)),
        (r"What is (.+) made of\?", (r"What material is \1 made of?", r"Which material is used for \1?")),
        (r"For how (?:long|many \w+) (.+)\?", (r"How long \1?",)),
        (r"How long (?:does|do) (.+) take\?", (r"How much time does \1 take?", r"What is the duration of \1?")),
        (rf"Which (?!person|colou?r|of|{_AUXILIARY})(\w+) (.+)\?", (r"What \1 \2?",)),
        (rf"What (?!colou?r|price|{_AUXILIARY})(\w+) (.+)\?", (r"Which \1 \2?",)),
    )
)  # fmt: skip


def other_wordings(
    rows: Sequence[InstructionRow], most: int, evaluation: EvaluationIndex | None = None
) -> list[InstructionRow]:
    """For each row up to `most` rows with the same answer, whose questions are the row's in other words.

    There are none for conversations, for rows of `data.replay_instructions`, and for questions that no rule fits.

    Args:
        evaluation: no question is made that an evaluation asks.
    """
    taken = {normalised(row.prompt[-1].content) for row in rows}
    made: list[InstructionRow] = []
    for row in rows:
        if row.origin == REPLAY or len(row.prompt) != 1:
            continue
        origin = f"{OTHER_WORDING}: {row.origin}"
        new: list[InstructionRow] = []
        for question in in_other_words(row.prompt[0].content):
            other = row.model_copy(update={"prompt": [Message(role="user", content=question)], "origin": origin})
            asked = evaluation is not None and evaluation.match(other)
            if normalised(question) not in taken and not asked:
                taken.add(normalised(question))
                new.append(other)
        made += new[:most]
    return made


def in_other_words(question: str) -> list[str]:
    """The question in other words, by each rule that fits."""
    return [
        match.expand(other)
        for pattern, others in _RULES
        if (match := pattern.fullmatch(question)) is not None
        for other in others
    ]
