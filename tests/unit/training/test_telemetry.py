"""Training counts its operations, tokens and seconds correctly."""

import resource
import sys
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from llm_engineering.training.telemetry.flops import TrainingFlops, peak_flops
from llm_engineering.training.telemetry.work import Work, peak_memory_bytes, peak_resident_bytes
from tests.conftest import ROOT

LLAMA = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=False,
)
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
    assert flops.step([10, 5], 0, reference=True) == 6 * 15 + 2 * 15


def test_rates_cover_the_work_between_two_states():
    work = Work(tokens=100, computed_tokens=100, flops=5.0)
    work.seconds.update(forward_backward=1.0, eval=9.0)
    before = work.copy()
    work.tokens, work.computed_tokens, work.flops = 160, 180, 45.0
    work.seconds["data"] += 0.5
    work.seconds["forward_backward"] += 1.0
    work.seconds["optimizer"] += 0.5
    assert work.rates(before, peak=40.0) == {"tokens_per_second": 30.0, "padding_share": 0.25, "mfu": 0.5}
    assert "mfu" not in work.rates(before, peak=None)
    assert work.rates(work.copy(), peak=None) == {}


def test_time_of_a_part_counts_even_if_it_fails():
    work = Work()
    with pytest.raises(ValueError, match="full"), work.timed("save"):
        raise ValueError("full")
    assert work.seconds["save"] > 0


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


def test_peak_memory_is_in_bytes_on_every_system(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=3_000_000))
    for platform, expected in (("linux", 3_000_000 * 1024), ("darwin", 3_000_000)):
        monkeypatch.setattr(sys, "platform", platform)
        assert peak_memory_bytes() == peak_resident_bytes() == expected


def test_only_the_helper_reads_the_systems_unit():
    """Other code would have to know that Linux counts in KiB and macOS in bytes."""
    packages = ("llm_engineering", "steps", "pipelines", "tools", "benchmarks")
    files = [file for package in packages for file in (ROOT / package).rglob("*.py")]
    assert [file.name for file in files if "ru_maxrss" in file.read_text(encoding="utf-8")] == ["telemetry.py"]
