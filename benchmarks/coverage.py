"""How often the 95 % intervals of the evaluation cover the true value: `python -m benchmarks.coverage` (half a minute).

The rows are made up: answers that two models give right or wrong to questions in clusters, which are documents or facts. The
table has the share of 1,000 experiments whose interval covers the true share, and the true difference of the two models'
shares; and the share of intervals that cover the true share if rows of a cluster are taken for independent.
`docs/evaluation.md` has it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from llm_engineering.evaluation.statistics import Bootstrap, Rows

# 80 facts of two questions; documents as uneven as those of a small test split; questions about a fact each.
FACTS, DOCUMENTS, ALONE = [2] * 80, [1, 2, 3, 4, 6, 8, 12, 20], [1] * 40
# Shares of the questions that both models, only the first, only the second and neither answer right.
HALF, RARE, FREQUENT = (0.35, 0.15, 0.1, 0.4), (0.01, 0.01, 0.02, 0.96), (0.94, 0.03, 0.01, 0.02)


def answers(
    generator: np.random.Generator, cells: Sequence[float], sizes: Sequence[int], correlation: float
) -> tuple[Rows, Rows]:
    """Answers of two models, right (1) or wrong (0), to questions in clusters.

    A question copies its cluster's pair of answers with a probability of the root of `correlation`, so that this is the
    correlation within clusters.

    Args:
        cells: shares of the questions that both models, the first alone, the second alone and neither answer right.
        sizes: questions of each cluster.
    """
    numbers = np.repeat(np.arange(len(sizes)), sizes)
    common, own = generator.choice(4, len(sizes), p=cells), generator.choice(4, len(numbers), p=cells)
    cell = np.where(generator.random(len(numbers)) < math.sqrt(correlation), common[numbers], own)
    first, second = (Rows.of(right.astype(float)).in_clusters(numbers.tolist()) for right in (cell < 2, cell % 2 == 0))
    return first, second


def count_covered(
    cells: Sequence[float], sizes: Sequence[int], correlation: float, experiments: int, seed: int = 5
) -> dict[str, int]:
    """The number of experiments whose 95 % intervals cover the true `share` and the true `difference`.

    `over rows` is that of the share if all rows are taken for independent.
    """
    generator = np.random.default_rng(seed)
    share = cells[0] + cells[1]
    truths = {"share": share, "difference": cells[1] - cells[2], "over rows": share}
    counts = dict.fromkeys(truths, 0)
    for experiment in range(experiments):
        first, second = answers(generator, cells, sizes, correlation)
        bootstrap = Bootstrap(100, 0.95, experiment)
        found = {
            "share": bootstrap.estimate(first),
            "difference": bootstrap.difference(first, second),
            "over rows": bootstrap.estimate(first._replace(clusters=None)),
        }
        for name, truth in truths.items():
            low, high = found[name].low, found[name].high
            assert low is not None
            assert high is not None
            counts[name] += low <= truth <= high
    return counts


def main() -> None:
    """Print the table."""
    experiments = 1000
    clusters = {"80 facts of 2": FACTS, "8 documents of 1 to 20": DOCUMENTS, "40 alone": ALONE}
    print(
        "| Questions | True share | Correlation | Share covered | Difference covered | Share, over rows |\n|---|---|---|---|---|---|"
    )
    for name, sizes in clusters.items():
        for cells in (HALF, RARE, FREQUENT):
            for correlation in (0.0, 0.2, 0.5) if max(sizes) > 1 else (0.0,):
                counts = count_covered(cells, sizes, correlation, experiments)
                shares = " | ".join(f"{counts[part] / experiments:.2f}" for part in counts)
                print(f"| {name} | {cells[0] + cells[1]:.2f} | {correlation} | {shares} |", flush=True)


if __name__ == "__main__":
    main()
