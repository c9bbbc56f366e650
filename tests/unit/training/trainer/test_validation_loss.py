"""The processes of a run evaluate each validation row once."""

import pytest

from llm_engineering.training.trainer.validation_loss import evaluation_batches


@pytest.mark.parametrize("rows", [0, 1, 2, 7, 8, 13])
@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_every_row_is_evaluated_once(rows, size, count):
    parts = [evaluation_batches(rows, size, rank, count) for rank in range(count)]
    shared = parts[0][1]
    own = [batches[: len(batches) - shared] for batches, _ in parts]
    rest = [batches[len(batches) - shared :] for batches, _ in parts]
    assert all(batches == rest[0] for batches in rest)
    once = sorted(row for batches in [*own, rest[0]] for batch in batches for row in batch)
    assert once == list(range(rows))
    # In each round, all processes evaluate the same number of rows.
    assert len({tuple(len(batch) for batch in batches) for batches, _ in parts}) == 1
    assert all(len(batch) <= size for batches, _ in parts for batch in batches)
