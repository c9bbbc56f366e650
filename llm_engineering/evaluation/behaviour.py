"""How an answer reads beside the reference, and whether it goes in circles."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer

# Scripts that put no space between words count by the character, as is usual for them: kana, and Chinese characters.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")
NGRAM = 4


class _Words(Tokenizer):  # type: ignore[misc]
    """Words of any script. The library's own tokenizer knows only a to z and 0 to 9."""

    def tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text.lower())


_SCORER = RougeScorer(["rougeL"], tokenizer=_Words())


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L (Lin 2004): F1 over the longest common subsequence of words, from 0 to 1, by the library rouge-score."""
    return float(_SCORER.score(reference, answer)["rougeL"].fmeasure)


def repetition(ids: Sequence[int]) -> float:
    """Share of an answer's token 4-grams that repeat an earlier one: seq-rep-4 (Welleck et al. 2020, arXiv:1908.04319).

    0 for an answer of fewer than four tokens.
    """
    grams = [tuple(ids[start : start + NGRAM]) for start in range(len(ids) - NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
