"""Writes `examples/arithmetic.jsonl`: 400 problems with their answers, for training on rewards.

    python -m benchmarks.arithmetic

A model of 135 million parameters solves a part of them: its answers to one problem differ, and so do their rewards. No two
problems have the same numbers in the same order and operation, so a held-out problem was not trained in other words.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

FILE = Path(__file__).parent.parent / "examples" / "arithmetic.jsonl"
PROBLEMS = 400
SEED = 0
# The wordings of a sum and of a difference. The first number of a difference is the larger one.
WORDINGS = {
    "+": (
        "What is {a} + {b}?",
        "Add {a} and {b}.",
        "A shelf has {a} books, and {b} more are put on it. How many books are on the shelf?",
        "Mira has {a} coins and finds {b} more. How many coins does she have?",
    ),
    "-": (
        "What is {a} - {b}?",
        "Subtract {b} from {a}.",
        "A jar holds {a} nuts, and {b} are eaten. How many nuts are left?",
        "Of {a} lamps, {b} are broken. How many lamps work?",
    ),
}
LARGEST = 20


def problems(count: int = PROBLEMS, seed: int = SEED) -> list[dict[str, str]]:
    """Problems with the columns `question` and `answer`, in an order drawn with the seed."""
    draw = random.Random(seed)
    sums = [("+", a, b) for a in range(1, LARGEST + 1) for b in range(1, LARGEST + 1)]
    differences = [("-", a, b) for a in range(2, LARGEST + 1) for b in range(1, a)]
    found = []
    for sign, a, b in draw.sample(sums + differences, count):
        question = draw.choice(WORDINGS[sign]).format(a=a, b=b)
        found.append({"question": question, "answer": str(a + b if sign == "+" else a - b)})
    return found


def main() -> None:
    """Write the file."""
    FILE.write_text("".join(json.dumps(problem) + "\n" for problem in problems()), encoding="utf-8")


if __name__ == "__main__":
    main()
