"""Computes losses without padding and without the logits of a whole batch.

Log-probabilities: with a vocabulary of 49,152, the logits of 2,048 tokens take 400 MB in fp32, and a small model spends
a fifth of its work on them. `token_log_probs` computes logits for the trained positions only, one chunk at a time. It
computes the gradient of a chunk in the forward pass, as Liger Kernel's fused linear cross-entropy does
(arXiv:2410.10989). It runs on any device.

Attention: packed rows, and the rows of a batch without padding, are concatenated into one long row. With torch's
scaled_dot_product_attention, a mask over the whole square must separate the rows. `attend_by_row` instead computes the causal
triangle of each row with the kernel that needs no mask. If FlashAttention is installed, it does the same in one call.

Prompts: the two answers of a DPO pair have one prompt. The second row can leave it out and attend to the prompt of the
first (prefix sharing, arXiv:2410.20305).
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import CausalLMOutput

from llm_engineering.formatting.render import IGNORE_INDEX
from llm_engineering.recipe.compute_blocks import ComputeConfig
from llm_engineering.training.estimate import CHUNK


def token_log_probs(hidden: Tensor, head: Tensor, tokens: Tensor) -> Tensor:
    """Compute the log-probability of each token from a model's last hidden states and output weights.

    Args:
        hidden: `(tokens, hidden size)`; each row is the hidden state at the position *before* its token.
        head: output weights, `(vocabulary, hidden size)`.
        tokens: `(tokens,)`, ids.

    Returns:
        `(tokens,)`, fp32, in nats; gradients flow to `hidden`, and to `head` if it is trained.
    """
    if not head.requires_grad:
        log_probs: Tensor = _FrozenHead.apply(hidden, head, tokens)  # type: ignore[no-untyped-call]
        return log_probs
    # The gradient of the head needs all logits, so the backward pass computes each chunk again.
    parts = [
        checkpoint(_chunk, hidden[start : start + CHUNK], head, tokens[start : start + CHUNK], use_reentrant=False)
        for start in range(0, len(tokens), CHUNK)
    ]
    return torch.cat(parts) if parts else hidden.sum(dim=-1).float()


def _chunk(hidden: Tensor, head: Tensor, tokens: Tensor) -> Tensor:
    # The operations of `_FrozenHead`: a trained policy and its frozen reference must be equal to the last bit.
    logits = (hidden @ head.to(hidden.dtype).t()).float()
    return logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(dim=-1)


class _FrozenHead(torch.autograd.Function):
    """Log-probabilities for output weights that are not trained.

    The gradient of a log-probability is then one vector of the hidden size. The forward pass computes it, and the backward
    pass only multiplies it by the incoming gradient.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, tokens: Tensor) -> Tensor:
        head = head.to(hidden.dtype)
        log_probs = hidden.new_empty(len(tokens), dtype=torch.float32)
        slopes = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(tokens), CHUNK):
            part = slice(start, start + CHUNK)
            every = (hidden[part] @ head.t()).float()
            every -= every.logsumexp(dim=-1, keepdim=True)
            token = tokens[part].unsqueeze(-1)
            log_probs[part] = every.gather(-1, token).squeeze(-1)
            if slopes is not None:
                # d log p(token) / d logits = onehot(token) - p
                slope = every.exp_().scatter_add_(-1, token, torch.full_like(token, -1, dtype=every.dtype))
                slopes[part] = -(slope.to(hidden.dtype) @ head)
        ctx.save_for_backward(slopes)
        return log_probs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (slopes,) = ctx.saved_tensors
        return (slopes * gradients[0].unsqueeze(-1)).to(slopes.dtype), None, None


def causal_model(policy: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The causal language model inside an adapter, or the model itself."""
    return policy.get_base_model() if isinstance(policy, PeftModel) else policy  # type: ignore[return-value]


@contextmanager
def probing(model: PreTrainedModel) -> Iterator[None]:
    """Context for a probe: no dropout, no gradients, the precision of training.

    This is the half precision of some of the model's weights. Without such weights, the caller's autocast holds.
    """
    half = next((p.dtype for p in model.parameters() if p.dtype in (torch.bfloat16, torch.float16)), None)
    device, outer = model.device.type, torch.is_autocast_enabled(model.device.type)
    training = model.training
    model.eval()
    with (
        torch.inference_mode(),
        torch.autocast(device, half or torch.get_autocast_dtype(device), enabled=half is not None or outer),
    ):
        yield
    model.train(training)


def why_not_from_hidden_states(
    policy: PreTrainedModel | PeftModel, compute: ComputeConfig, router_coefficient: float | None = None
) -> str | None:
    """The reason why training needs the logits of whole batches; None if it does not need them.

    Training does not need them if the logits are the last hidden states times the output weights, the loss is that of
    the tokens alone, and this process has all of these weights. Some models scale or cap their logits, or add a loss of
    their own, and an adapter may wrap the output layer. This function computes logits and loss of four tokens both ways
    and compares them, so the project needs no list of such models.

    Args:
        router_coefficient: the recipe's `router_aux_loss_coef`; None for that of the model's config.
    """
    model = causal_model(policy)
    head = model.get_output_embeddings()
    if isinstance(head, BaseTunerLayer):
        return "an adapter wraps the output layer"
    if isinstance(head, AuxiliaryTrainingWrapper):
        return "the adapter trains a copy of the output layer"
    if compute.shards_weights:
        return "the output weights are sharded"
    if not isinstance(head, nn.Linear) or getattr(head, "bias", None) is not None:
        return "the output layer is not a plain matrix"
    if _adds_router_loss(model, router_coefficient):
        return "the loss of the experts' router needs the model's own forward pass"
    ids = torch.arange(4, device=head.weight.device).unsqueeze(0)
    with probing(model):
        logits = model(input_ids=ids, use_cache=False).logits.float()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss.float()
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        direct = (hidden @ head.weight.to(hidden.dtype).t()).float()
        direct_loss = -_chunk(hidden[0, :-1], head.weight, ids[0, 1:]).mean()
    # In half precision, two ways of computing the same logits differ by rounding.
    if not torch.allclose(logits, direct, atol=1e-2 * float(logits.abs().max())):
        return "the model changes the logits after the output layer"
    if not torch.isclose(loss, direct_loss, rtol=1e-2):
        return "the model adds another loss to that of the tokens"
    return None


def _adds_router_loss(model: PreTrainedModel, coefficient: float | None) -> bool:
    """Whether TRL adds the load-balancing loss of a mixture of experts."""
    text = model.config.get_text_config()
    own = getattr(text, "router_aux_loss_coef", 0.0)
    return hasattr(text, "output_router_logits") and (own if coefficient is None else coefficient) != 0.0


def take_loss_from_hidden_states(policy: PreTrainedModel | PeftModel) -> None:
    """Make the model's forward pass return only the loss, without logits, if it gets labels.

    This replaces the method of the inner model, so that wrappers around it (adapters, DistributedDataParallel) still work.
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
        # The mean over the trained tokens, as in transformers' own loss. With gradient accumulation, it is the mean
        # over the tokens of all batches of a step.
        count = trained.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutput(loss=-log_probs.sum() / count)  # type: ignore[arg-type]

    model.forward = types.MethodType(forward, model)


# Up to this row length, `_plain_attention` computes the attention on a CPU in half precision. For longer rows, autograd would
# save too much: at 512 tokens and nine heads, the attention matrices take 5 MB per layer.
SHORT = 512
# It computes consecutive rows together up to this number of tokens. Four rows of 30 tokens then take half the time, and four
# rows of 60 would take longer than one by one.
TOGETHER = 128
_NAME = "sdpa_by_row"


def attend_by_row(policy: PreTrainedModel | PeftModel) -> bool:
    """Make a model with `sdpa` attention accept `row_lengths` beside its input; returns False if it cannot.

    Models with sliding-window or chunked attention keep their masks, because their attention is not the plain causal triangle.
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
    """Whether rows that are concatenated into one long row do not attend to each other.

    This function runs the model on eight tokens: if the first row changes, the hidden states of the second must stay
    the same. So the project needs no list of the models whose attention reads position ids.
    """
    model = causal_model(policy)
    tokens = torch.arange(4, device=model.device)
    options: dict[str, Any] = {"position_ids": tokens.repeat(2).unsqueeze(0), "use_cache": False}
    if by_row:
        options["row_lengths"] = [4, 4]
    with probing(model):
        first, second = (
            model.base_model(input_ids=torch.cat([before, tokens]).unsqueeze(0), **options).last_hidden_state[0, 4:]
            for before in (tokens, tokens + 4)
        )
    return torch.allclose(first, second, rtol=0, atol=1e-3 * float(first.abs().max()))


def ignores_left_padding(policy: PreTrainedModel | PeftModel) -> bool:
    """Whether padding before a row, which the attention mask hides, leaves the row's hidden states as they are.

    This function runs the model on four tokens, alone and after four others. Positions that are learned, as in GPT-2, are
    counted from the start of the padding if no position ids are passed.
    """
    model = causal_model(policy)
    tokens = torch.arange(4, device=model.device)
    with probing(model):
        alone, padded = (
            model.base_model(
                input_ids=torch.cat([padding, tokens]).unsqueeze(0),
                attention_mask=torch.cat([torch.zeros_like(padding), torch.ones_like(tokens)]).unsqueeze(0),
                use_cache=False,
            ).last_hidden_state[0, -4:]
            for padding in (tokens[:0], tokens)
        )
    # In bfloat16 SmolLM2 differs by 0.02 of the mean, because rotary positions are rounded; GPT-2 by 0.9.
    return float((alone - padded).abs().mean()) < 0.1 * float(alone.abs().mean())


def row_lengths(position_ids: Tensor) -> list[int]:
    """Lengths of the rows that are concatenated into one, from its position ids `(1, tokens)`, which start at 0 in each row."""
    starts = (position_ids[0] == 0).nonzero().flatten().tolist()
    return [end - start for start, end in zip(starts, [*starts[1:], position_ids.shape[1]], strict=True)]


def continues_prompts(policy: PreTrainedModel | PeftModel) -> bool:
    """Whether a row without its prompt, which continues the prompt of the row before it, is computed as the whole row.

    This function runs the model twice on a prompt of four tokens and two answers of four: an answer has the same hidden
    states in the first row and in the second. The attention of the model takes `row_lengths`.
    """
    model = causal_model(policy)
    prompt, one, other = torch.arange(12, device=model.device).view(3, 4)
    positions = torch.cat([torch.arange(8), torch.arange(4, 8)]).to(model.device).unsqueeze(0)
    options: dict[str, Any] = {"position_ids": positions, "row_lengths": [8, 4], "shared_lengths": [0, 4]}
    with probing(model):
        first, second = (
            model.base_model(
                input_ids=torch.cat([prompt, *answers]).unsqueeze(0), use_cache=False, **options
            ).last_hidden_state[0]
            for answers in ((one, other), (other, one))
        )
    return torch.allclose(first[4:8], second[8:], rtol=0, atol=1e-2 * float(first[4:8].abs().max()))


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    row_lengths: list[int] | None = None,
    shared_lengths: list[int] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers.

    query, key and value are `(batch, heads, tokens, head size)`, the result is `(batch, tokens, heads, head size)`.

    Args:
        row_lengths: lengths of the rows that are concatenated.
        shared_lengths: for each row, the number of tokens at the start of the row before it that are its start too, and
            that it leaves out; None if all rows are whole.
    """
    if row_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    plain = query.device.type == "cpu" and value.dtype != torch.float32 and not kwargs.get("dropout")
    together = TOGETHER if plain else 0
    groups = _groups(tuple(zip(row_lengths, shared_lengths or [0] * len(row_lengths), strict=True)), together)
    parts = (part.split([_tokens(group) for group in groups], dim=2) for part in (query, key, value))
    results = []
    for group, queries, keys, values in zip(groups, *parts, strict=True):
        if _tokens(group) <= together:
            results.append(_plain_attention(queries, keys, values, _mask(group, value.dtype), kwargs["scaling"]))
            continue
        for (_, shared), q, k, v in zip(group, *(_rows(part, group) for part in (queries, keys, values)), strict=True):
            length = k.shape[2]
            if plain and length <= SHORT:
                mask = _mask(((SHORT, 0),), value.dtype)[:, shared:length, :length]
                results.append(_plain_attention(q[:, :, shared:], k, v, mask, kwargs["scaling"]))
            else:
                results.append(sdpa_attention_forward(module, q, k, v, None, **kwargs)[0][:, shared:])
    return torch.cat(results, dim=1), None


# Consecutive rows: the length of each, and the tokens that it shares with the row before it.
_Group = tuple[tuple[int, int], ...]


@lru_cache
def _groups(rows: _Group, together: int) -> list[_Group]:
    """Divide rows into groups of at most `together` tokens. A row stays with the row that it shares tokens with."""
    groups: list[_Group] = []
    for length, shared in rows:
        if groups and (shared or _tokens(groups[-1]) + length <= together):
            groups[-1] += ((length, shared),)
        else:
            groups.append(((length, shared),))
    return groups


def _tokens(group: _Group) -> int:
    return sum(length for length, _ in group)


def _rows(part: Tensor, group: _Group) -> list[Tensor]:
    """Divide a group into rows, each with the tokens that it shares."""
    rows = part.split([length for length, _ in group], dim=2)
    return [
        torch.cat([rows[number - 1][:, :, :shared], rows[number]], dim=2) if shared else rows[number]
        for number, (_, shared) in enumerate(group)
    ]


def _plain_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """Attention with plain matrix products; softmax computes in float32 and rounds its result.

    On a CPU in half precision this takes a fifth to a half of the time of torch's fused kernel, whose backward pass is slow
    there.
    """
    # With float32 weights under autocast, the rotary embedding leaves query and key in float32.
    query, key, value = (part[0].to(value.dtype) for part in (query, key, value))
    # The query heads of one key head follow each other, so their queries are one matrix.
    queries = query.reshape(len(key), -1, query.shape[2])
    masks = mask.repeat(1, len(query) // len(key), 1)
    weights = torch.baddbmm(masks, queries, key.transpose(1, 2), alpha=scaling).softmax(dim=-1)
    return (weights @ value).view(*query.shape[:2], -1).transpose(0, 1).unsqueeze(0)


@lru_cache
def _mask(group: _Group, dtype: torch.dtype) -> Tensor:
    """Zeros where a token attends to a token, and minus infinity elsewhere: `(1, tokens, tokens)`."""
    mask = torch.full((1, _tokens(group), _tokens(group)), -torch.inf, dtype=dtype)
    before = start = 0
    for length, shared in group:
        row = mask[0, start : start + length]
        row[:, start : start + length].triu_(diagonal=1)
        row[:, before : before + shared] = 0
        before, start = start, start + length
    return mask
