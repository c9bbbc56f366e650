"""Batched generation: prompts of like length share a batch, padded on the left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_engineering.models.tokenizer import end_token_ids


def batches_by_length(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Places of the prompts in batches of at most `size`, the shortest prompts first, so that little is padded.

    Prompts of equal length keep their order.
    """
    order = sorted(range(len(lengths)), key=lambda place: lengths[place])
    return [order[start : start + size] for start in range(0, len(order), size)]


def generate_ids(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    **options: Any,
) -> list[list[int]]:
    """The new token ids of each prompt of one batch, up to and with its end token.

    Args:
        prompts: token ids.
        options: what else transformers' `generate` takes, e.g. `do_sample`.
    """
    ends = end_token_ids(model, tokenizer)
    pad = tokenizer.pad_token_id
    longest = max(map(len, prompts))
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
        # By place, not by id: what follows the end is padding, which may be the end token itself.
        length = next((place + 1 for place, token in enumerate(new) if token in ends), len(new))
        answers.append(new[:length])
    return answers
