"""The advice of the data report: what to change about the rows, and how the held-out rows are spread over documents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from llm_engineering.data.dataset_rules import MAX_DOCUMENT_SHARE
from llm_engineering.data.rows import AT_LAST_SENTENCE
from llm_engineering.formatting.datasets import Lengths
from llm_engineering.progress import counted

# LIMA (arXiv:2305.11206) tunes on 1,000 selected rows. From fewer rows a model learns a style rather than a subject.
FEW_ROWS = 1000
# Above this share, the length limit decides what the model learns.
MAX_SHARE_OVER_LENGTH = 0.1


def held_out(counts: Mapping[str, int]) -> dict[str, Any]:
    """The rows and documents of a held-out split, and the document with most rows.

    Args:
        counts: rows by document; "" for those without one, which `largest` never names.
    """
    documents = Counter({name: count for name, count in counts.items() if name})
    rows = sum(counts.values())
    largest, most = documents.most_common(1)[0] if documents else ("", 0)
    return {
        "rows": rows,
        "documents": len(documents),
        "largest": largest,
        "largest_rows": most,
        "largest_share": round(most / max(1, rows), 4),
    }


def advice(kind: str, lengths: Lengths, share_over: float, max_length: int, findings: Mapping[str, int]) -> list[str]:
    """What to change about the rows, each as a sentence with numbers.

    Args:
        share_over: the share of rows that are longer than `max_length` tokens.
        findings: rows by the rule that reports them.
    """
    lines = []
    train = lengths.kept.get("train", sum(lengths.kept.values(), Counter())).total()
    if train < FEW_ROWS and kind != "text":
        lines.append(
            f"{train:,} rows are left to train on. They are enough to learn a style of answering; to learn a subject, "
            f"use {FEW_ROWS:,} or more good rows."
        )
    test = lengths.kept.get("test", Counter()).total()
    if test:
        # The 95 % interval of a share of n independent rows at one half, where it is widest: 1.96 sqrt(0.25 / n).
        lines.append(
            f"{test:,} test rows are left: a percentage near 50 that is measured on them has a 95 % interval of "
            f"±{98 / test**0.5:.0f} points, and a wider one if several rows come from the same document."
        )
    for split, counts in lengths.documents.items():
        found = held_out(counts)
        if found["largest_rows"] > MAX_DOCUMENT_SHARE * found["rows"]:
            lines.append(
                f"{found['largest']} has {found['largest_rows']:,} of the {counted(found['rows'], f'{split} row')} "
                f"({found['largest_share']:.0%}; {counted(found['documents'], 'document')} in this split), so the results depend "
                f"on this document more than on others. Add documents, or raise data.split.{split}_fraction."
            )
    if share_over > MAX_SHARE_OVER_LENGTH and kind != "text":
        lines.append(
            f"{share_over:.0%} of the rows are longer than formatting.max_length ({max_length} tokens): raise it if "
            "memory allows."
        )
    if "truncated" in findings:
        lines.append(
            f"{findings['truncated']:,} rows were cut at formatting.max_length ({max_length} tokens), so the end of their "
            "answers is not trained. Raise max_length, or set formatting.over_long to drop."
        )
    if "oldest_turns_dropped" in findings:
        lines.append(
            f"{findings['oldest_turns_dropped']:,} rows were longer than formatting.max_length ({max_length} tokens) and lost "
            "their oldest turns."
        )
    if lengths.ended:
        lines.append(
            f"{lengths.ended:,} rejected answers reached their limit of tokens and were {AT_LAST_SENTENCE}. To have whole answers, "
            "raise generation.rejected_max_new_tokens, or for those of blind comparisons evaluation.max_new_tokens."
        )
    if lengths.respaced:
        lines.append(
            f"In {lengths.respaced:,} rows the chat template changed the white space of an answer, e.g. removed it at the start, "
            "so the model learns the answer without it. formatting.chat_template: chatml leaves answers as they are."
        )
    for rule, what in (("secret", "keys or passwords"), ("personal_data", "e-mail addresses or phone numbers")):
        if rule in findings:
            lines.append(f"{findings[rule]:,} findings of {what}: set data.rules.{rule} to mask or drop.")
    return lines or ["There is nothing to change."]
