"""Computes losses without padding and without the logits of a whole batch.

Log-probabilities: with a vocabulary of 49,152, the logits of 2,048 tokens are 400 MB in fp32, and a small model spends a
fifth of its work on them. `token_log_probs` makes them for the trained positions alone, a chunk at a time, and takes their
gradient at once, as Liger Kernel's fused linear cross-entropy does (arXiv:2410.10989); it runs on any device.

Attention: packed rows, and batches without padding, are one long row. torch's scaled_dot_product_attention keeps its
members apart with a mask over the whole square. `attend_by_row` computes only the triangles on the diagonal, member by
member, with the kernel that needs no mask. FlashAttention does the same in one call, where it is installed.
"""

from __future__ import annotations

import types
from functools import lru_cache
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import CausalLMOutput

from llm_engineering.formatting.render import IGNORE_INDEX
from llm_engineering.recipe.compute_blocks import ComputeConfig

# Rows of logits at a time: 25 MB in fp32 for a vocabulary of 49,152, 66 MB for Llama 3's 128,256.
CHUNK = 128


def token_log_probs(hidden: Tensor, head: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability of each token under the model whose last hidden states and output weights are given.

    Args:
        hidden: `(tokens, hidden size)`, each of the position *before* its token.
        head: output weights, `(vocabulary, hidden size)`.
        tokens: `(tokens,)`, ids.

    Returns:
        `(tokens,)`, fp32, in nats; gradients flow to `hidden`, and to `head` if it is trained.
    """
    if not head.requires_grad:
        log_probs: Tensor = _FrozenHead.apply(hidden, head, tokens)  # type: ignore[no-untyped-call]
        return log_probs
    # The gradient of the head needs that of each log-probability: the logits are made again for it.
    parts = [
        checkpoint(_chunk, hidden[start : start + CHUNK], head, tokens[start : start + CHUNK], use_reentrant=False)
        for start in range(0, len(tokens), CHUNK)
    ]
    return torch.cat(parts) if parts else hidden.sum(dim=-1).float()


def _chunk(hidden: Tensor, head: Tensor, tokens: Tensor) -> Tensor:
    logits = nn.functional.linear(hidden, head.to(hidden.dtype)).float()
    return -nn.functional.cross_entropy(logits, tokens, reduction="none")


class _FrozenHead(torch.autograd.Function):
    """Of a head that is not trained, the gradient of a log-probability is one vector of the hidden size, which the
    backward pass scales by what comes from above."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, tokens: Tensor) -> Tensor:
        head = head.to(hidden.dtype)
        log_probs = hidden.new_empty(len(tokens), dtype=torch.float32)
        slopes = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(tokens), CHUNK):
            part = slice(start, start + CHUNK)
            logits = (hidden[part] @ head.t()).float()
            logits -= logits.logsumexp(dim=-1, keepdim=True)
            token = tokens[part].unsqueeze(-1)
            log_probs[part] = logits.gather(-1, token).squeeze(-1)
            if slopes is not None:
                # d log p(token) / d logits = onehot(token) - p
                slope = logits.exp_().neg_()
                slope.scatter_add_(-1, token, torch.ones_like(token, dtype=slope.dtype))
                slopes[part] = slope.to(hidden.dtype) @ head
        ctx.save_for_backward(slopes)
        return log_probs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (slopes,) = ctx.saved_tensors
        return (slopes * gradients[0].unsqueeze(-1)).to(slopes.dtype), None, None


def causal_model(policy: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The causal language model inside an adapter, or the model itself."""
    return policy.get_base_model() if isinstance(policy, PeftModel) else policy  # type: ignore[return-value]


def why_not_from_hidden_states(policy: PreTrainedModel | PeftModel, compute: ComputeConfig) -> str | None:
    """Why logits have to be made of whole batches; None if they are the last hidden states times the output weights, and
    these are here as a whole.

    Some models scale or cap their logits, and an adapter may lie on the head. It is tried on four tokens, so that no
    list of such models has to be kept.
    """
    model = causal_model(policy)
    head = model.get_output_embeddings()
    if isinstance(head, BaseTunerLayer):
        return "an adapter lies on the output weights"
    if compute.distributed == "fsdp2" or compute.zero_stage == 3:
        return "the output weights are sharded"
    if not isinstance(head, nn.Linear) or getattr(head, "bias", None) is not None:
        return "the output layer is no plain matrix"
    ids = torch.arange(4, device=head.weight.device).unsqueeze(0)
    training = model.training
    model.eval()
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits.float()
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        direct = (hidden @ head.weight.to(hidden.dtype).t()).float()
    model.train(training)
    # Two ways of computing the same in half precision differ by roundings.
    if not torch.allclose(logits, direct, atol=1e-2 * float(logits.abs().max())):
        return "the model changes them after the output layer"
    return None


def take_loss_from_hidden_states(policy: PreTrainedModel | PeftModel) -> None:
    """Let the model's forward pass, where it is given labels, return the loss alone, without logits.

    The method of the inner model is replaced, so that wrappers around it (adapters, DistributedDataParallel) still work.
    """
    model = causal_model(policy)
    plain_forward = model.forward

    def forward(
        self: PreTrainedModel,
        *args: Any,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        if labels is None:
            return plain_forward(*args, **kwargs)
        hidden = self.base_model(*args, **kwargs).last_hidden_state[:, :-1]
        tokens = labels[:, 1:]
        trained = tokens != IGNORE_INDEX
        log_probs = token_log_probs(hidden[trained], self.get_output_embeddings().weight, tokens[trained])
        # As transformers' own loss: a mean, over the tokens of all batches of a step where there are several.
        count = trained.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutput(loss=-log_probs.sum() / count)  # type: ignore[arg-type]

    model.forward = types.MethodType(forward, model)


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
