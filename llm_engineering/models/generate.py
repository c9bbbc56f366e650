"""Generates answers in batches. Prompts of similar length share a batch, padded on the left.

The beginning that all prompts share can be computed once. The padding then follows this beginning.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from llm_engineering.models.tokenizer import end_token_ids


def batches_by_length(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Batches of at most `size` indices, ordered by length, so that a batch has little padding.

    Prompts of equal length keep their order.
    """
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    return [order[start : start + size] for start in range(0, len(order), size)]


def context_length(model: PreTrainedModel | PeftModel) -> int | None:
    """Tokens of the model's context; None if it has no limit."""
    length: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return length


@dataclass(frozen=True)
class SharedStart:
    """The beginning that all prompts share, with the model's keys and values of it.

    Attributes:
        ids: the tokens of the beginning.
        cache: keys and values of these tokens, for one row.
    """

    ids: list[int]
    cache: DynamicCache


def compute_shared_start(model: PreTrainedModel | PeftModel, prompts: Sequence[list[int]]) -> SharedStart | None:
    """Compute the longest beginning that all prompts share.

    Returns:
        None if the prompts share no beginning, or if the model does not attend to all earlier tokens: padding after the
        beginning would push tokens out of a sliding window.
    """
    # Each prompt keeps at least one token of its own, from which its first new token is predicted.
    limit = min(map(len, prompts)) - 1
    # The first and the last in order differ earliest.
    first, last = min(prompts), max(prompts)
    length = next((index for index in range(limit) if first[index] != last[index]), limit)
    if length < 1:
        return None
    ids = first[:length]
    with torch.inference_mode():
        cache = model(input_ids=torch.tensor([ids], device=model.device), use_cache=True).past_key_values
    if not isinstance(cache, DynamicCache) or not all(type(layer) is DynamicLayer for layer in cache.layers):
        return None
    return SharedStart(ids, cache)


def generate_ids(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    start: SharedStart | None = None,
    /,
    **options: Any,
) -> list[list[int]]:
    """Generate one batch: the new token ids of each prompt, up to and including its end token.

    Args:
        prompts: token ids of each prompt.
        start: a beginning that all prompts have; None computes each prompt from its first token.
        options: further arguments of transformers' `generate`, e.g. `do_sample`.
    """
    ends = end_token_ids(model, tokenizer)
    longest, pad = max(map(len, prompts)), tokenizer.pad_token_id
    shared = start.ids if start is not None else []
    own = [ids[len(shared) :] for ids in prompts]
    inputs = [shared + [pad] * (longest - len(shared) - len(ids)) + ids for ids in own]
    mask = [[1] * len(shared) + [0] * (longest - len(shared) - len(ids)) + [1] * len(ids) for ids in own]
    if start is not None:
        # The model appends to the cache, so each batch gets a copy.
        cache = copy.deepcopy(start.cache)
        cache.batch_repeat_interleave(len(prompts))
        options["past_key_values"] = cache
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
