"""Counting the work of training: operations, tokens, seconds."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from llm_engineering.training.telemetry import TrainingFlops, Work, peak_flops

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
    """What torch counts in a forward and backward pass over one row, with eager attention."""
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros(1, length, dtype=torch.long), use_cache=False).logits.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("config", [LLAMA, GPT2])
def test_operations_are_those_that_torch_counts(config):
    kind = LlamaForCausalLM if config is LLAMA else GPT2LMHeadModel
    config._attn_implementation = "eager"
    model = kind(config)
    flops = TrainingFlops.of(model)
    # Eager attention also computes the half that the causal mask hides; and torch's first layer needs no gradient of
    # its input, which is nothing here: the embedding is trained.
    assert flops.step([32], 32) + flops.attention * 32 * 32 == pytest.approx(counted(model, 32), rel=0.01)


def test_frozen_weights_take_two_thirds():
    whole = TrainingFlops.of(LlamaForCausalLM(LLAMA))
    adapted = TrainingFlops.of(get_peft_model(LlamaForCausalLM(LLAMA), LoraConfig(r=1, target_modules=["q_proj"])))
    added = 6 * 2 * (32 + 32)
    assert adapted.body == whole.body * 4 / 6 + added
    assert adapted.head == whole.head * 4 / 6


def test_reference_takes_a_forward_pass_more():
    flops = TrainingFlops(body=6, head=0, attention=0, forward=1 / 3)
    assert flops.step([10, 5], 0, reference=True) == 6 * 15 + 2 * 15


def test_rates_are_between_two_states():
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


def test_time_of_a_part_is_added_also_where_it_fails():
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
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some other card")
    assert peak_flops(card, torch.bfloat16) is None
