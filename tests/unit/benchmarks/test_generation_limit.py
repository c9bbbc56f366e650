"""The limit of generation that the benchmark compares with, for a model whose operations and bytes are counted by hand."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.generation import Speed, _gaps, _least_seconds
from tests.tiny_models import SIZES

# Two layers of width 32 with four heads of size 8 and two key heads, and an output layer of 50 tokens.
BODY, HEAD, WIDTH = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64), 50 * 32, 2 * 4 * 8
PROMPTS, ANSWERS = [[1] * 4, [1] * 6], [[7], [7, 8, 9]]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=50)).eval()


def test_the_limit_is_the_sum_over_all_passes(model):
    # Both prompts with 10 tokens, then one token after 7 and one after 8.
    operations = 2 * (BODY * 10 + HEAD * 2) + 4 * WIDTH * (4 * 4 / 2 + 6 * 6 / 2)
    operations += 2 * 2 * (BODY + HEAD) + 4 * WIDTH * (7 + 8)
    assert _least_seconds(model, PROMPTS, ANSWERS, 2, Speed(1.0, math.inf)) == operations
    # Keys and values of the two key heads are half as wide as the queries.
    read = 4 * (3 * (BODY + HEAD) + 2 * WIDTH / 2 * (7 + 8))
    assert _least_seconds(model, PROMPTS, ANSWERS, 2, Speed(math.inf, 1.0)) == read
    # In batches of one, the weights are read for each answer.
    assert _least_seconds(model, PROMPTS, ANSWERS, 1, Speed(math.inf, 1.0)) == read + 4 * (BODY + HEAD)


def test_the_gap_is_that_of_the_first_tokens_that_differ(model):
    with torch.inference_mode():
        logits = model(torch.tensor([[*PROMPTS[1], 7]])).logits[0, -1]
    gap = abs(float(logits[8] - logits[3]))
    assert _gaps(model, PROMPTS, ANSWERS, [[7], [7, 3]]) == [pytest.approx(gap, rel=1e-5)]
