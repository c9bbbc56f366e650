"""Generates answers in batches. Prompts of similar length share a batch, padded on the left.

The beginning that all prompts share can be computed once. The padding then follows this beginning.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Cache,
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicLayer
from transformers.generation.utils import ALL_CACHE_NAMES
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from llm_engineering.models.tokenizer import end_token_ids

# The name under which transformers knows `_attend`.
_SHARED = "shared_start"


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
        layers: keys and values of these tokens in each layer, each of shape (heads, tokens, head size).
    """

    ids: list[int]
    layers: list[tuple[torch.Tensor, torch.Tensor]]


class _RowsLayer(DynamicLayer):
    """The keys and values of each row after a shared beginning of `start` tokens, which are not stored here."""

    def __init__(self, start: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.start = start

    def get_seq_length(self) -> int:
        return self.start + super().get_seq_length()


def compute_shared_start(model: PreTrainedModel | PeftModel, prompts: Sequence[list[int]]) -> SharedStart | None:
    """Compute the longest beginning that all prompts share.

    Returns:
        None if the prompts share no beginning, or if the model's attention is another than that of `_attend`, e.g. with a
        sliding window or a bias.
    """
    # Each prompt keeps at least one token of its own, from which its first new token is predicted.
    limit = min(map(len, prompts)) - 1
    # The first and the last in order differ earliest.
    first, last = min(prompts), max(prompts)
    length = next((index for index in range(limit) if first[index] != last[index]), limit)
    if length < 1 or model.config.get_text_config()._attn_implementation != "sdpa":
        return None
    with torch.inference_mode():
        output = model(input_ids=torch.tensor([first], device=model.device), use_cache=True)
        cache = output.past_key_values
        if not isinstance(cache, DynamicCache) or not all(type(layer) is DynamicLayer for layer in cache.layers):
            return None
        states: list[Any] = list(cache.layers)
        layers = [(layer.keys[0, :, :length], layer.values[0, :, :length]) for layer in states]
        start = SharedStart(first[:length], layers)
        with _attending_to(model, start) as rows:
            own = torch.tensor([first[length:]], device=model.device)
            logits = model(input_ids=own, past_key_values=rows).logits[0, -1].float()
    expected = output.logits[0, -1].float()
    # Rounding differs by 2e-6 of the largest logit in float32, and by 0.02 in bfloat16. 1e-5 and 0.09 are allowed.
    eps = torch.finfo(model.dtype).eps
    tolerance = min(100 * eps, eps**0.5) * expected.abs().max()
    return start if bool((logits - expected).abs().max() <= tolerance) else None


@contextmanager
def _attending_to(model: PreTrainedModel | PeftModel, start: SharedStart) -> Iterator[DynamicCache]:
    """Let the model attend to `start` before each row. The rows' own keys and values go into the cache, which is empty."""
    config = model.config.get_text_config()
    before = config._attn_implementation
    AttentionInterface.register(_SHARED, partial(_attend, start))
    AttentionMaskInterface.register(_SHARED, sdpa_mask)
    config._attn_implementation = _SHARED
    cache = DynamicCache()
    cache.layers = [_RowsLayer(len(start.ids)) for _ in start.layers]
    try:
        yield cache
    finally:
        config._attn_implementation = before


def _attend(
    start: SharedStart,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention to a shared beginning and to each row's own tokens, as transformers calls it.

    The keys of the beginning are read once for all rows. Repeated for 64 rows, reading them took most of the time.

    Args:
        query: of shape (rows, heads, new tokens, head size).
        key: the row's own keys, of shape (rows, key heads, own tokens, head size), and so `value`.
        attention_mask: True where a new token attends, of shape (rows, 1, new tokens, beginning and own tokens).
    """
    keys, values = start.layers[cast(int, module.layer_idx)]
    rows, heads, tokens, size = query.shape
    groups = len(keys)
    # The key heads come first, and then the rows: the rows of a head are then one matrix. The query heads of a group attend
    # with the same keys.
    grouped = (
        (query * (size**-0.5 if scaling is None else scaling))
        .reshape(rows, groups, heads // groups * tokens, size)
        .transpose(0, 1)
        .contiguous()
    )
    scores_of_start = (grouped.flatten(1, 2) @ keys.transpose(-1, -2)).unflatten(1, (rows, -1))
    own = grouped @ key.transpose(0, 1).transpose(-1, -2)
    if attention_mask is not None:
        allowed = attention_mask[:, 0, :, len(start.ids) :].repeat(1, heads // groups, 1)
        own = own.masked_fill(~allowed, float("-inf"))
    weights = torch.cat([scores_of_start, own], dim=-1).softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    to_start, to_own = weights.split([len(start.ids), own.shape[-1]], dim=-1)
    output = (to_start.flatten(1, 2) @ values).unflatten(1, (rows, -1)) + to_own @ value.transpose(0, 1)
    return output.transpose(0, 1).reshape(rows, heads, tokens, size).transpose(1, 2).contiguous(), None


@contextmanager
def _attending_from_one() -> Iterator[None]:
    """Let `_attend_from_one` compute the attention of models with sdpa."""
    AttentionInterface.register("sdpa", _attend_from_one)
    try:
        yield
    finally:
        AttentionInterface.register("sdpa", sdpa_attention_forward)


def _attend_from_one(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    position_bias: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """sdpa as transformers calls it, but on a CPU as products of matrices.

    torch's kernel for CPUs takes each query head of each row by itself. With 128 short rows it needed 4.6 ms for a layer, and
    these products 0.3 ms. Shapes are those of `_attend`.
    """
    is_added = attention_mask is not None and attention_mask.dtype != torch.bool
    if query.shape[2] > 1 or query.device.type != "cpu" or position_bias is not None or is_added:
        options |= {"scaling": scaling, "position_bias": position_bias}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    rows, heads, _, size = query.shape
    scaled = query * (size**-0.5 if scaling is None else scaling)
    # The query heads of a group attend with the same keys.
    scores = (scaled.view(rows, key.shape[1], -1, size) @ key.transpose(-1, -2)).view(rows, heads, 1, -1)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, float("-inf"))
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights.view(rows, key.shape[1], -1, key.shape[2]) @ value).view(rows, 1, heads, -1), None


def generate_ids(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    start: SharedStart | None = None,
    banned: Sequence[list[int]] = (),
    /,
    **options: Any,
) -> list[list[int]]:
    """Generate one batch: the new token ids of each prompt, up to and including its end token.

    Args:
        start: a beginning that all prompts have; None computes each prompt from its first token.
        banned: for each prompt, tokens that are not generated; no prompt has any if it is empty.
        options: further arguments of transformers' `generate`, e.g. `do_sample`.
    """
    ends = end_token_ids(model, tokenizer)
    longest, pad = max(map(len, prompts)), tokenizer.pad_token_id
    shared = start.ids if start is not None else []
    own = [ids[len(shared) :] for ids in prompts]
    inputs = [shared + [pad] * (longest - len(shared) - len(ids)) + ids for ids in own]
    mask = [[1] * len(shared) + [0] * (longest - len(shared) - len(ids)) + [1] * len(ids) for ids in own]
    generate: Any = model.generate
    # torch copies the weights of the output layer for each row if the rows of its input are not next to each other in memory,
    # as the last tokens of prompts are not. With 128 rows, that took three quarters of the time of 24 tokens.
    head: Any = model.get_output_embeddings()
    with (
        head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),)),
        _attending_from_one() if start is None else _attending_to(model, start) as cache,
    ):
        generated: list[list[int]] = generate(
            input_ids=torch.tensor(inputs, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            eos_token_id=ends,
            num_beams=1,
            past_key_values=cache,
            custom_generate=partial(_decode, banned),
            **options,
        )
    answers = []
    for new in generated:
        # Cut at the first end token: a row that cannot leave its batch has further tokens.
        length = next((index + 1 for index, token in enumerate(new) if token in ends), len(new))
        answers.append(new[:length])
    return answers


def _decode(
    banned: Sequence[list[int]],
    model: Any,
    input_ids: Any,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    **state: Any,
) -> list[list[int]]:
    """Choose the new tokens as transformers' `_sample`, but compute none for the rows of answers that have ended.

    Half of the answers to short questions have at most 4 tokens, and the longest of a batch may have 24.

    Args:
        input_ids: the prompts, padded on the left, of shape (rows, tokens).
        state: further arguments of the model, e.g. its cache.
    """
    answers: list[list[int]] = [[] for _ in input_ids]
    rows = list(range(len(answers)))
    outputs = model._prefill(input_ids, generation_config, state)
    with model._optimize_model_for_decode():
        while True:
            state = model._update_model_kwargs_for_generation(outputs, state)
            scores = logits_processor(input_ids, outputs.logits[:, -1].float())
            for index, row in enumerate(rows if banned else []):
                scores[index, banned[row]] = -math.inf
            if generation_config.do_sample:
                new = torch.multinomial(scores.softmax(dim=-1), num_samples=1)
            else:
                new = scores.argmax(dim=-1, keepdim=True)
            input_ids = torch.cat([input_ids, new], dim=-1)
            for row, token in zip(rows, new[:, 0].tolist(), strict=True):
                answers[row].append(token)
            left = (~stopping_criteria(input_ids, scores)).nonzero()[:, 0]
            if not len(left):
                return answers
            caches = [state[name] for name in ALL_CACHE_NAMES if state.get(name) is not None]
            # A few models have a cache of their own, whose rows cannot be chosen.
            if len(left) < len(rows) and all(isinstance(cache, Cache) for cache in caches):
                rows, input_ids = [rows[index] for index in left.tolist()], input_ids[left]
                for cache in caches:
                    cache.reorder_cache(left)
                for name in ("attention_mask", "position_ids", "token_type_ids"):
                    if state.get(name) is not None:
                        # The positions of some models have a dimension more, before that of the rows.
                        state[name] = state[name].index_select(-2, left)
            length = 1 if state["use_cache"] else None
            inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=length, **state)
            outputs = model(**inputs, return_dict=True)
