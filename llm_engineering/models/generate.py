"""Generates answers in batches. Prompts of similar length share a batch, padded on the left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_engineering.models.tokenizer import end_token_ids


def batches_by_length(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Batches of at most `size` indices, ordered by length, so that a batch has little padding.

    Prompts of equal length keep their order.
    """
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    return [order[start : start + size] for start in range(0, len(order), size)]


def generate_ids(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    /,
    **options: Any,
) -> list[list[int]]:
    """Generate one batch: the new token ids of each prompt, up to and including its end token.

    Args:
        prompts: token ids of each prompt.
        options: further arguments of transformers' `generate`, e.g. `do_sample`.
    """
    ends = end_token_ids(model, tokenizer)
    longest, pad = max(map(len, prompts)), tokenizer.pad_token_id
    inputs = [[pad] * (longest - len(ids)) + ids for ids in prompts]
    mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
    generate: Any = model.generate
    output = generate(
        input_ids=torch.tensor(inputs, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        eos_token_id=ends,
        **options,
    )
    answers = []
    for new in output[:, longest:].tolist():
        # Cut at the first end token. The padding after it may be the end token as well.
        length = next((index + 1 for index, token in enumerate(new) if token in ends), len(new))
        answers.append(new[:length])
    return answers
