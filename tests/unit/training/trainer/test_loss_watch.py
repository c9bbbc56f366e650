"""A loss that explodes is found, and the rows of its batch are named."""

import torch
from datasets import Dataset

from llm_engineering.training.trainer.loss_watch import EXPLOSION_FACTOR, LossWatch, named_rows


def test_loss_is_compared_with_the_highest_running_median():
    watch = LossWatch()
    assert [watch.problem(2.0) for _ in range(8)] == [""] * 8
    # Forty steps later the median is 0.01. A loss of 3 is a hard row and not an explosion.
    assert [watch.problem(0.01) for _ in range(40)] == [""] * 40
    assert watch.problem(3.0) == ""
    assert watch.problem(2.0 * EXPLOSION_FACTOR) == ""
    assert watch.problem(2.0 * EXPLOSION_FACTOR + 0.1) == "the loss is 20.1, and its median was 2 before"
    assert watch.problem(float("inf")) == "the loss is inf"
    fresh = LossWatch()
    assert [fresh.problem(loss) for loss in (0.1, 50.0, 0.1)] == ["", "", ""]


def test_rows_of_packed_padded_and_paired_batches_are_named():
    rows = Dataset.from_list([{"id": f"r{i}", "input_ids": [i, i + 1, i + 2]} for i in range(4)])
    packed = {
        "input_ids": torch.tensor([[3, 4, 5, 1, 2, 3]]),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]]),
    }
    assert named_rows([packed], rows) == "1 (id r1), 3 (id r3)"
    padded = {"input_ids": torch.tensor([[2, 3, 4, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])}
    assert named_rows([packed, padded], rows) == "1 (id r1), 2 (id r2), 3 (id r3)"
    pairs = Dataset.from_list([{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3, 4]}])
    batch = {
        "input_ids": torch.tensor([[1, 2, 0], [1, 3, 4]]),
        "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]),
        "completion_mask": torch.tensor([[0, 1, 0], [0, 1, 1]]),
    }
    assert named_rows([batch], pairs) == "0"
