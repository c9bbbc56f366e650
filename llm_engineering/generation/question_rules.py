"""Recognises generated questions that cannot be answered alone: they point at a text, or ask about nothing.

The question's reader does not see the passage that it was written from. The patterns were chosen on questions that the
embedded model and larger ones wrote: words such as "context" or "text" alone say nothing, since "in the context of
firmware" names its subject.
"""

from __future__ import annotations

import re

from llm_engineering.data.wording import CLAUSE_END, mention_of_text

# Words for a piece of text or code that a model has before it.
_PIECE = (
    r"(?:passage|excerpt|extract|text|paragraph|sentence|snippet|code|code snippet|code block|example|program|expression|statement"
    r"|question|assignment|script|quote|quotation|story|poem|section|article|document|context|topic|information|description|content|function|table)"
)
_NAMED = r"(?:mentioned|described|listed|shown|stated|discussed|given|provided|outlined|defined|quoted|explained|noted|written)"
# Words after "the following" that name a time.
_NO_PIECE = r"(?:days?|weeks?|months?|years?|mornings?|afternoons?|evenings?|nights?|seasons?)\b"
_POINTERS = (
    rf"\b(?:the|this|these) (?:following|aforementioned|above|below)(?![-\w])(?! {_NO_PIECE})",
    r"\b(?:which|what|one|any|all|each|none) of the (?:following|above)\b",
    rf"\b(?:the|this) (?:given|provided|preceding|previous|last) {_PIECE}\b",
    rf"\b(?:this|these) {_PIECE}s?\b",
    r"\b(?:of|about|in|by|from) (?:this|that)\s*\?",
    rf"\b{_NAMED} (?:above|below|here|earlier)\b",
    rf"\b{_PIECE} (?:above|below)\b",
    r"\bthe code (?:snippet|block|example|above|below)\b",
    rf"\b(?:in|of|by|from|to) the (?:sentence|code|example|context|snippet)\b{CLAUSE_END}",
    r"\bthe topic\b(?=\s*[\"“'?.,;]|\s*$)",
    r"\b(?:(?:according to|as (?:stated|described|mentioned|said) by) the (?:author|narrator|speaker|writer)|(?:does|did) the (?:author|narrator))\b(?! of\b)",
    rf"\b(?:according to|based (?:up)?on|from|given) the (?:information|details|facts|description|content|material|data)\b{CLAUSE_END}",
    r"\bin (?:the )?(?:information|details|description|content|material) (?:above|below|given|provided)\b",
)
_POINTER = re.compile("|".join(_POINTERS), re.IGNORECASE)

_WORD = re.compile(r"\w+")
# A question of these words alone has no subject.
# fmt: off
_EMPTY_WORDS = frozenset({
    "a", "an", "the", "this", "that", "these", "those", "it", "its", "i", "me", "my", "you", "your", "we", "us", "our", "here",
    "there", "what", "which", "who", "whose", "when", "where", "why", "how", "s", "t", "is", "are", "was", "were", "be", "do",
    "does", "did", "can", "could", "should", "will", "would", "may", "have", "has", "had", "to", "of", "in", "on", "for",
    "about", "from", "by", "with", "and", "or", "any", "some", "one", "all", "no", "not", "so", "like", "next", "first", "last",
    "following", "above", "below", "given", "correct", "right", "best", "main", "more", "please", "question", "questions",
    "answer", "answers", "answered", "ask", "asked", "asking", "topic", "subject", "idea", "point", "mean", "means", "meaning",
    "know", "tell", "help", "explain", "describe", "say", "said", "want", "need",
})
# fmt: on


def points_at_text(question: str) -> bool:
    """Whether the question points at a text, a code or an example that its reader does not see."""
    return bool(_POINTER.search(question) or mention_of_text(question))


def is_contentless(question: str) -> bool:
    """Whether the question has no subject, e.g. "What is the answer to this question?"."""
    return all(word in _EMPTY_WORDS for word in _WORD.findall(question.casefold()))
