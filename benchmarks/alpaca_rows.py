"""Writes made-up Alpaca rows with a known number of faults: python -m benchmarks.alpaca_rows FILE --rows N [--seed S]"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

CHUNK_ROWS = 4096
# Duplicates repeat a row of this pool. New rows replace random rows of it, so that duplicates are far from their
# originals and memory stays constant.
POOL_ROWS = 4096
PROMPT_WORDS = (8, 20)
ANSWER_WORDS = (30, 120)
ROWS_PER_DOCUMENT = 20
VOCABULARY = 20_000
# A 16-bit random number selects a word from this table, where frequent words occur several times.
TABLE = 1 << 16

PLAIN, EXACT, NEAR, EMPTY, REFUSAL, EMAIL, BROKEN = range(7)


@dataclass(frozen=True)
class Shares:
    """Share of each kind of fault among all lines. The other rows are plain."""

    exact_duplicate: float = 0.05
    near_duplicate: float = 0.05
    empty_answer: float = 0.01
    refusal: float = 0.005
    email: float = 0.01
    broken: float = 0.001


@dataclass(frozen=True)
class Counts:
    """Number of written lines of each kind. They add up to `lines`.

    Attributes:
        plain: rows without a fault, all different.
        exact_duplicate: rows with the text of an earlier plain row, and any document.
        near_duplicate: rows with the text of an earlier plain row but another last word. The Jaccard similarity of
            their sets of three-word shingles is at least 0.94 and below 1.
        empty_answer: rows with an empty `output`.
        refusal: rows whose answer says that it cannot help.
        email: rows whose answer has an e-mail address.
        broken: lines that are cut off in the middle, which is not JSON.
    """

    lines: int
    plain: int
    exact_duplicate: int
    near_duplicate: int
    empty_answer: int
    refusal: int
    email: int
    broken: int


def write_rows(path: Path, lines: int, seed: int = 0, shares: Shares | None = None) -> Counts:
    """Write `lines` lines of Alpaca JSONL (`instruction`, `input`, `output`, `document`).

    The same seed writes the same file. Words follow Zipf's law: unrelated rows share words, as real rows do, but hardly
    any sequence of three words.

    Raises:
        ValueError: the shares leave no plain row to repeat.
    """
    shares = shares or Shares()
    rng = np.random.default_rng(seed)
    wanted = [round(share * lines) for share in asdict(shares).values()]
    plain = lines - sum(wanted)
    if plain < 1:
        raise ValueError(f"the shares {shares} leave no plain row among {lines} lines")
    kinds = rng.permutation(np.repeat(np.arange(7, dtype=np.uint8), [plain, *wanted]))
    # The first row must be plain, because duplicates need a row to repeat.
    first = int(np.argmax(kinds == PLAIN))
    kinds[0], kinds[first] = kinds[first], kinds[0]

    table = _word_table(rng)
    documents = max(1, lines // ROWS_PER_DOCUMENT)
    pool: list[tuple[str, str]] = []
    with path.open("w", encoding="ascii") as file:
        for start in range(0, lines, CHUNK_ROWS):
            chunk = kinds[start : start + CHUNK_ROWS]
            file.writelines(_chunk(chunk, start, table, documents, pool, rng))
    return Counts(lines, plain, *wanted)


def _chunk(
    kinds: np.ndarray[Any, Any],
    start: int,
    table: np.ndarray[Any, Any],
    documents: int,
    pool: list[tuple[str, str]],
    rng: np.random.Generator,
) -> list[str]:
    size = len(kinds)
    prompt_words = rng.integers(PROMPT_WORDS[0], PROMPT_WORDS[1] + 1, size).tolist()
    answer_words = rng.integers(ANSWER_WORDS[0], ANSWER_WORDS[1] + 1, size).tolist()
    total = sum(prompt_words) + sum(answer_words)
    words = table[rng.integers(0, TABLE, total, dtype=np.uint16)].tolist()
    chosen = rng.random(size).tolist()
    slots = rng.integers(0, POOL_ROWS, size).tolist()
    names = rng.integers(0, documents, size).tolist()
    lines = []
    at = 0
    for i, kind in enumerate(kinds.tolist()):
        middle = at + prompt_words[i]
        end = middle + answer_words[i]
        prompt, answer = " ".join(words[at:middle]), " ".join(words[middle:end])
        if kind == PLAIN:
            if len(pool) < POOL_ROWS:
                pool.append((prompt, answer))
            else:
                pool[slots[i]] = (prompt, answer)
        elif kind in (EXACT, NEAR):
            prompt, answer = pool[int(chosen[i] * len(pool))]
            if kind == NEAR:
                # The line number makes the word unique, so that two near duplicates of a row are not exact duplicates.
                answer = f"{answer.rpartition(' ')[0]} {words[at]}{start + i}"
        elif kind == EMPTY:
            answer = ""
        elif kind == REFUSAL:
            answer = f"I'm sorry, but I can't help with that. {answer}"
        elif kind == EMAIL:
            answer = f"{answer} {words[at]}.{words[at + 1]}@{words[at + 2]}{start + i}.com"
        at = end
        line = f'{{"instruction": "{prompt}", "input": "", "output": "{answer}", "document": "document-{names[i]}"}}\n'
        lines.append(f"{line[: len(line) // 2]}\n" if kind == BROKEN else line)
    return lines


def _word_table(rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Make a table of pronounceable words. The word of rank r has a share proportional to 1/r (Zipf 1949)."""
    syllables = [consonant + vowel for consonant in "bdfghjklmnprstvz" for vowel in "aeiou"]
    made: dict[str, None] = {}
    while len(made) < VOCABULARY:
        lengths = rng.integers(1, 5, VOCABULARY)
        parts = rng.integers(0, len(syllables), (VOCABULARY, 4))
        for length, row in zip(lengths.tolist(), parts.tolist(), strict=True):
            made["".join(syllables[part] for part in row[:length])] = None
    words = np.array(list(made)[:VOCABULARY], dtype=object)
    share = np.cumsum(1 / np.arange(1, VOCABULARY + 1))
    ranks = np.searchsorted(share / share[-1], (np.arange(TABLE) + 0.5) / TABLE)
    return words[ranks]


def main() -> None:
    """Write a file and print the counts."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.alpaca_rows", description="Write made-up Alpaca rows.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--rows", type=int, default=20_000, help="number of lines (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(json.dumps(asdict(write_rows(arguments.file, arguments.rows, arguments.seed))))


if __name__ == "__main__":
    main()
