"""The operations of a model are those that torch counts, and the peaks of GPUs are found by their names."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from llm_engineering.training.telemetry.flops import TrainingFlops, peak_flops
from tests.tiny_models import SIZES

LLAMA = LlamaConfig(**SIZES, vocab_size=64)
GPT2 = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=128)


def counted(model, length):
    """Operations that torch counts in a forward and backward pass over one row, with eager attention."""
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros(1, length, dtype=torch.long), use_cache=False).logits.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("config", [LLAMA, GPT2])
def test_operations_are_those_that_torch_counts(config):
    kind = LlamaForCausalLM if config is LLAMA else GPT2LMHeadModel
    config._attn_implementation = "eager"
    model = kind(config)
    flops = TrainingFlops.of(model)
    # Eager attention also computes the half that the causal mask hides. The first layer computes the gradient of its
    # input, because the embedding is trained.
    assert flops.step([32], 32) + flops.attention * 32 * 32 == pytest.approx(counted(model, 32), rel=0.01)


def test_frozen_weights_take_two_thirds_of_the_operations():
    whole = TrainingFlops.of(LlamaForCausalLM(LLAMA))
    adapted = TrainingFlops.of(get_peft_model(LlamaForCausalLM(LLAMA), LoraConfig(r=1, target_modules=["q_proj"])))
    added = 6 * 2 * (32 + 32)
    assert adapted.body == whole.body * 4 / 6 + added
    assert adapted.head == whole.head * 4 / 6


def test_reference_adds_a_forward_pass():
    flops = TrainingFlops(body=6, head=0, attention=0, forward=1 / 3)
    assert flops.step([10, 5], 0, forwards=1) == 6 * 15 + 2 * 15


def test_only_known_cards_have_a_peak(monkeypatch):
    card = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 PCIe")
    assert peak_flops(card, torch.bfloat16) == 756e12
    assert peak_flops(card, torch.float32) is None
    assert peak_flops(torch.device("cpu"), torch.bfloat16) is None
    for name, peak in (
        ("NVIDIA L40", 181e12), ("NVIDIA L40S", 362e12), ("NVIDIA L4", 121e12), ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10", 125e12), ("NVIDIA A10G", 70e12), ("NVIDIA H100 NVL", 836e12), ("NVIDIA H100 80GB HBM3", 989e12),
        ("Tesla T4", 65e12), ("NVIDIA T400", None), ("NVIDIA RTX A1000", None), ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("Some other card", None),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(card, torch.bfloat16) == peak, name
