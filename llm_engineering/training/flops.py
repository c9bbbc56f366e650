"""How much arithmetic training takes, and how much a card can do: model FLOPS utilisation (MFU)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llm_engineering.training.token_log_probs import causal_model

# Dense half-precision peaks of the tensor cores, in FLOP/s, from NVIDIA's data sheets. Of names that share a
# beginning, the longer one stands first.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "T4": 65e12,
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of a known card in half precision; None for anything else, of which no data sheet speaks."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAK_FLOPS.items() if known in name), None)


@dataclass(frozen=True)
class TrainingFlops:
    """Floating-point operations that training needs, after PaLM (arXiv:2204.02311, appendix B).

    A matrix of n weights takes 2n a token forward, 2n backward for its input and, if it is trained, 2n for itself: 6n in
    all, or 4n under an adapter. Causal attention over a row of T tokens takes 2 T d a token forward and twice that
    backward, d being heads × head size, in each layer. What gradient checkpointing computes again does not count.

    Attributes:
        body: a token, in all matrices but the output one.
        head: a trained token, in the output matrix.
        attention: to be multiplied with the sum of squared row lengths.
        forward: share of all this that a forward pass alone takes, for DPO's reference.
    """

    body: float
    head: float
    attention: float
    forward: float

    @classmethod
    def of(cls, policy: PreTrainedModel | PeftModel) -> TrainingFlops:
        """Count the matrices of a model, before a reference is added to it."""
        model = causal_model(policy)
        output = model.get_output_embeddings()
        sizes = {
            module: module.in_features * module.out_features if isinstance(module, nn.Linear) else module.weight.numel()
            for module in policy.modules()
            if isinstance(module, nn.Linear | Conv1D)
        }
        training = {m: (6 if m.weight.requires_grad else 4) * size for m, size in sizes.items()}
        head = training.pop(output, 0)
        body = sum(training.values())
        config = model.config.get_text_config()
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        attention = 6 * config.num_hidden_layers * config.num_attention_heads * head_size
        forward = 2 * sum(sizes.values()) / (body + head)
        return cls(body, head, attention, forward)

    def step(self, lengths: Sequence[int], trained_tokens: int, reference: bool = False) -> float:
        """FLOPs of forward and backward over rows of these lengths; with `reference`, a forward pass besides."""
        flops = self.body * sum(lengths) + self.head * trained_tokens + self.attention * sum(n * n for n in lengths)
        return flops * (1 + self.forward if reference else 1)
