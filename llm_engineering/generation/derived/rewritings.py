"""Makes the rewritings of the documents that are trained on, as many as the recipe's budget of tokens allows."""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from llm_engineering.data.rows import REPLAY, InstructionRow, Quarantined, Row, TextRow, split_key, split_of
from llm_engineering.documents.document import Document
from llm_engineering.documents.passages import Passage
from llm_engineering.formatting.datasets import format_rows
from llm_engineering.generation.derived.by_endpoint import rewrite_by_endpoint
from llm_engineering.generation.derived.by_rule import rewrite_by_rule
from llm_engineering.generation.facts import distinct_trigrams
from llm_engineering.generation.types import Client
from llm_engineering.recipe.data_blocks import FormattingConfig, SplitConfig
from llm_engineering.recipe.recipe_keys import DerivingSetup

logger = logging.getLogger(__name__)


class Derived(NamedTuple):
    """The rewritings of documents.

    Attributes:
        rows: those to train on, in the order of the budget.
        rejected: those that say more than their passages, or that the budget has no room for.
        facts: `tokens_to_train`, and with a budget also `tokens_of_documents` and `tokens_of_questions`: all times their
            epochs.
    """

    rows: list[TextRow]
    rejected: list[Quarantined]
    facts: dict[str, Any]


def derive_texts(
    documents: Sequence[Document],
    passages: Sequence[Passage],
    sentences: Sequence[Passage],
    texts: Sequence[TextRow],
    questions: Sequence[InstructionRow],
    setup: DerivingSetup,
    split: SplitConfig,
    client: Client | None,
    tokenizer: PreTrainedTokenizerBase | None,
    seed: int,
) -> Derived:
    """Rewrite the documents of the training split.

    Args:
        passages: what an endpoint rewrites.
        sentences: what rules rewrite.
        texts: the rows of the documents.
        questions: the accepted instructions, of all splits; none if they are not needed.
        client: the endpoint; None if rules make the rewritings.
        tokenizer: counts tokens; None without a budget.
    """

    def trained(document: str) -> bool:
        return split_of(document, split) == "train"

    rejected: list[Quarantined] = []
    if client is not None:
        written, rejected = rewrite_by_endpoint(
            [p for p in passages if trained(p.document)], client, setup.writing, seed
        )
    else:
        asked = [row for row in questions if trained(row.document)]
        written = rewrite_by_rule(
            setup.writing.rewritings, documents, [s for s in sentences if trained(s.document)], asked, seed
        )
    written = in_rounds(written, seed)
    if tokenizer is None or setup.tokens is None:
        return Derived(written, rejected, {})

    # Count what is trained on without rewritings
    trained_texts = [row for row in texts if trained(split_key(row))]
    trained_questions = [row for row in questions if row.origin != REPLAY and trained(split_key(row))]
    read = setup.epochs["text"] * sum(_tokens(trained_texts, "text", tokenizer, setup.formatting))
    asked_tokens = setup.epochs["instruction"] * sum(
        _tokens(trained_questions, "instruction", tokenizer, setup.formatting)
    )
    total = read + asked_tokens
    if total > setup.tokens:
        logger.warning(
            "The documents have %s tokens to train on and the questions %s, in all epochs of all stages: %s, and "
            "knowledge.tokens is %s. No rewriting is added. Raise knowledge.tokens, or lower num_train_epochs.",
            *(f"{number:,.0f}" for number in (read, asked_tokens, total, setup.tokens)),
        )

    # Add rewritings until the budget is reached
    kept: list[TextRow] = []
    for row, tokens in zip(written, _tokens(written, "text", tokenizer, setup.formatting), strict=True):
        if total + setup.epochs["text"] * tokens > setup.tokens:
            break
        total += setup.epochs["text"] * tokens
        kept.append(row)
    over = [
        Quarantined.of_row(row, "text", "over_budget", f"knowledge.tokens is {setup.tokens}")
        for row in written[len(kept) :]
    ]
    facts = {"tokens_of_documents": read, "tokens_of_questions": asked_tokens, "tokens_to_train": total}
    return Derived(kept, [*rejected, *over], {name: round(number) for name, number in facts.items()})


def in_rounds(rows: Sequence[TextRow], seed: int) -> list[TextRow]:
    """The rewritings in an order in which every beginning has about as many of each kind and of each document.

    Each round has at most one rewriting of every kind for every document, in an order that is drawn with the seed.
    """
    drawn = random.Random(seed)
    rounds: Counter[tuple[str, str]] = Counter()
    keys: list[tuple[int, float]] = []
    for row in rows:
        kind = row.origin.partition(" ")[0]
        keys.append((rounds[kind, row.document], drawn.random()))
        rounds[kind, row.document] += 1
    return [rows[index] for index in sorted(range(len(rows)), key=keys.__getitem__)]


def text_diversity(
    rewritings: Sequence[TextRow], questions: Sequence[InstructionRow], facts: Sequence[Passage], split: SplitConfig
) -> dict[str, Any]:
    """How many wordings the facts have that are trained on. A fact is a sentence or a passage of the documents.

    Returns:
        the rewritings of each kind; `wordings_per_fact`, the mean number of texts with the fact: itself, its questions, and
        the rewritings that have one of these or were written from it; `facts_without_question`; and `distinct_trigrams`,
        the share of different ones among all sequences of three words of these texts.
    """
    facts = [fact for fact in facts if split_of(fact.document, split) == "train"]
    asked: dict[str, list[str]] = {}
    for question in questions:
        # A question that needs two facts names both places.
        for source in question.source.split(" and "):
            asked.setdefault(source, []).append(question.prompt[0].content)
    by_document: dict[str, list[TextRow]] = {}
    for row in rewritings:
        by_document.setdefault(row.document, []).append(row)
    wordings = 0
    for fact in facts:
        own = [fact.text, *asked.get(fact.source, [])]
        wordings += len(own) + sum(
            row.source == fact.source or any(text in row.text for text in own)
            for row in by_document.get(fact.document, [])
        )
    texts = [fact.text for fact in facts] + [row.text for row in rewritings]
    texts += [row.prompt[0].content for row in questions if split_of(split_key(row), split) == "train"]
    return {
        **{f"rewritings_{kind}": count for kind, count in _kinds(rewritings).items()},
        "wordings_per_fact": round(wordings / max(1, len(facts)), 2),
        "facts_without_question": sum(fact.source not in asked for fact in facts),
        "distinct_trigrams": distinct_trigrams(texts),
    }


def _kinds(rows: Sequence[TextRow]) -> Counter[str]:
    return Counter(row.origin.partition(" ")[0] for row in rows)


def _tokens(
    rows: Sequence[Row], kind: str, tokenizer: PreTrainedTokenizerBase, formatting: FormattingConfig
) -> list[int]:
    """The tokens of each row that are trained on, 0 for a row that formatting sets aside."""
    return [
        sum(len(record["input_ids"]) for record in formatted.records)
        for formatted in format_rows(rows, kind, tokenizer, formatting)
    ]
