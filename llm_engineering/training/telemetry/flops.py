"""Floating-point operations: those that training a model takes, and the peaks of known GPUs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llm_engineering.training.losses import causal_model

# Dense half-precision peaks of the tensor cores in FLOP/s, from NVIDIA's data sheets. The first key whose words are in the
# GPU's name counts, so `H100 PCIe` comes before `H100`.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200 NVL": 836e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 836e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "T4": 65e12,
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Half-precision peak of a known GPU in FLOP/s; None for other devices and precisions."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    name = torch.cuda.get_device_name(device)
    # `L4` is no word of `NVIDIA L40`. A card for laptops, or the variant `D`, is slower than the card it is named after.
    return next((peak for known, peak in PEAK_FLOPS.items() if re.search(rf"\b{known}\b(?! Laptop| D\b)", name)), None)


@dataclass(frozen=True)
class TrainingFlops:
    """Floating-point operations that training needs, as PaLM counts them (arXiv:2204.02311, appendix B).

    A matrix of n weights needs 2n operations per token in the forward pass, 2n for the gradient of its input, and 2n
    for its own gradient if it is trained: 6n in total, or 4n if it is frozen. Causal attention over a row of T tokens
    needs 2·T·d per token and layer in the forward pass, where d is heads × head size, and twice that in the backward
    pass. The recomputation of gradient checkpointing does not count.

    Attributes:
        body: operations per token in all matrices except the output matrix.
        head: operations per trained token in the output matrix.
        attention: operations per squared row length.
        forward: share of a forward pass in the total, for the passes of a reference.
    """

    body: float
    head: float
    attention: float
    forward: float

    @classmethod
    def of(cls, policy: PreTrainedModel | PeftModel) -> TrainingFlops:
        """Count the operations of a model. Call it before TRL adds a reference adapter to the model."""
        model = causal_model(policy)
        # A module that the adapter trains whole computes with its copy only.
        wrappers = [module for module in policy.modules() if isinstance(module, ModulesToSaveWrapper)]
        unused = {module for wrapper in wrappers for module in wrapper.original_module.modules()}
        sizes = {
            module: module.in_features * module.out_features if isinstance(module, nn.Linear) else module.weight.numel()
            for module in policy.modules()
            if isinstance(module, nn.Linear | Conv1D) and module not in unused
        }
        training = {m: (6 if m.weight.requires_grad else 4) * size for m, size in sizes.items()}
        output = model.get_output_embeddings()
        if isinstance(output, AuxiliaryTrainingWrapper):
            output = next(module for module in output.modules() if module in sizes)
        head = training.pop(output, 0)
        body = sum(training.values())
        config = model.config.get_text_config()
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        attention = 6 * config.num_hidden_layers * config.num_attention_heads * head_size
        forward = 2 * sum(sizes.values()) / (body + head)
        return cls(body, head, attention, forward)

    def step(self, lengths: Sequence[int], trained_tokens: int, forwards: int = 0) -> float:
        """FLOPs of forward and backward over rows of these lengths, and of `forwards` more forward passes."""
        flops = self.body * sum(lengths) + self.head * trained_tokens + self.attention * sum(n * n for n in lengths)
        return flops * (1 + forwards * self.forward)
