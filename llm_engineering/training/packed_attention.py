"""Attention over rows that lie one behind another in one long row, each row by itself.

Packed rows and batches without padding are one row of many. torch's scaled_dot_product_attention keeps its members apart
with a mask over the whole, and so computes all of the square; member by member, only the triangles on its diagonal
are computed, by the kernel that needs no mask. FlashAttention does the same in one call, where it is installed.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from llm_engineering.training.token_log_probs import causal_model

# Longer rows keep too much for the backward pass: the square of 512 tokens is 5 MB a layer for nine heads.
SHORT = 512
_NAME = "sdpa_by_row"


def attend_by_row(policy: PreTrainedModel | PeftModel) -> bool:
    """Let a model with `sdpa` attention take `row_lengths` beside its input; returns whether it does.

    Models with windows keep their masks: a triangle is not what they attend to.
    """
    model = causal_model(policy)
    config = model.config.get_text_config()
    windows = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if config._attn_implementation != "sdpa" or windows or kinds != {"full_attention"}:
        return False
    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    model.set_attn_implementation(_NAME)
    return True


def keeps_rows_apart(policy: PreTrainedModel | PeftModel, by_row: bool) -> bool:
    """Whether the members of one long row do not see each other: other tokens in the first one leave the second as it is.

    Tried on eight tokens, so that no list of models whose attention reads position ids has to be kept.
    """
    model = causal_model(policy)
    tokens = torch.arange(4, device=model.device)
    told: dict[str, Any] = {"position_ids": tokens.repeat(2).unsqueeze(0), "use_cache": False}
    if by_row:
        told["row_lengths"] = [4, 4]
    training = model.training
    model.eval()
    with torch.inference_mode():
        first, second = (
            model.base_model(input_ids=torch.cat([before, tokens]).unsqueeze(0), **told).last_hidden_state[0, 4:]
            for before in (tokens, tokens + 4)
        )
    model.train(training)
    return torch.allclose(first, second, rtol=0, atol=1e-3 * float(first.abs().max()))


def row_lengths(position_ids: Tensor) -> list[int]:
    """Lengths of the members of one long row, `(1, tokens)`, whose positions start at 0 in each."""
    starts = (position_ids[0] == 0).nonzero().flatten().tolist()
    return [end - start for start, end in zip(starts, [*starts[1:], position_ids.shape[1]], strict=True)]


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    row_lengths: list[int] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers' functions: query, key and value `(batch, heads, tokens, head size)`, result with tokens second."""
    if row_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    members = zip(*(_split(part, row_lengths) for part in (query, key, value)), strict=True)
    results = [
        _short_row(q, k, v, kwargs["scaling"])
        if query.device.type == "cpu" and v.dtype != torch.float32 and q.shape[2] <= SHORT and not kwargs.get("dropout")
        else sdpa_attention_forward(module, q, k, v, None, **kwargs)[0]
        for q, k, v in members
    ]
    return torch.cat(results, dim=1), None


def _short_row(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Causal attention of one row, written out, as transformers' `eager` computes it.

    On a CPU in half precision it takes a third of the time of torch's fused kernel, whose backward pass is slow there.
    """
    groups, length = query.shape[1] // key.shape[1], query.shape[2]
    # With float32 weights, autocast leaves float32 what the rotary embedding was multiplied with.
    query, key = query[0].to(value.dtype), key[0].to(value.dtype)
    key, value = (part.repeat_interleave(groups, dim=0) for part in (key, value[0]))
    scores = torch.baddbmm(_causal(value.dtype)[:, :length, :length], query, key.transpose(1, 2), alpha=scaling)
    return (scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype) @ value).transpose(0, 1).unsqueeze(0)


@lru_cache
def _causal(dtype: torch.dtype) -> Tensor:
    """Zeros, and minus infinity above the diagonal: `(1, SHORT, SHORT)`."""
    return torch.full((1, SHORT, SHORT), -torch.inf, dtype=dtype).triu(diagonal=1)


def _split(part: Tensor, lengths: list[int]) -> list[Tensor]:
    return list(part.split(lengths, dim=2))
