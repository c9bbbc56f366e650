"""Log-probabilities of given tokens straight from hidden states: the logits of a whole batch never exist.

With a vocabulary of 49,152, the logits of 2,048 tokens are 400 MB in fp32, and a small model spends a fifth of its work
on them. Here they are made for the trained positions alone, a chunk at a time, and their gradient is taken while they
are there, as Liger Kernel's fused linear cross-entropy does (arXiv:2410.10989); this runs on any device.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from llm_engineering.config import ComputeConfig
from llm_engineering.formatting.render import IGNORE_INDEX

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
