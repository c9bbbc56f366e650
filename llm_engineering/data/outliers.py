"""Rows that stand out from the others of their dataset: by length and by language."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# Tukey's outer fences (Exploratory Data Analysis, 1977): beyond three interquartile ranges a value is far out.
_FENCE = 3.0
# In smaller datasets nothing is usual yet.
_MIN_ROWS = 100
# A language with a smaller share of the rows is there by accident.
_MIN_LANGUAGE_SHARE = 0.02


def length_bounds(lengths: NDArray[np.uint32]) -> tuple[float, float]:
    """The shortest and longest usual length: Tukey's outer fences of the logarithms, as lengths are skewed."""
    if len(lengths) < _MIN_ROWS:
        return 0.0, float("inf")
    low, high = np.quantile(np.log1p(lengths.astype(np.float64)), [0.25, 0.75])
    # Rows of nearly one length have no spread to judge by: a factor of two is never far out.
    spread = max(high - low, np.log(2) / _FENCE)
    return float(np.expm1(low - _FENCE * spread)), float(np.expm1(high + _FENCE * spread))


def rare_languages(languages: Sequence[str], counts: NDArray[np.int64]) -> set[str]:
    """The languages that so few rows are in that they stand out.

    Args:
        languages: codes, the empty one for rows whose language is not known.
        counts: rows in each.
    """
    known = Counter({name: int(count) for name, count in zip(languages, counts, strict=True) if name})
    if known.total() < _MIN_ROWS:
        return set()
    return {name for name, count in known.items() if count < _MIN_LANGUAGE_SHARE * known.total()}
