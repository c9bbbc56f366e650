"""Losses without whole logits and attention without padding, compared with the plain computations."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

from llm_engineering.recipe.compute_blocks import ComputeConfig
from llm_engineering.training import losses
from llm_engineering.training.estimate import CHUNK
from llm_engineering.training.losses import (
    attend_by_row,
    continues_prompts,
    keeps_rows_apart,
    row_lengths,
    take_loss_from_hidden_states,
    token_log_probs,
    why_not_from_hidden_states,
)

CPU = ComputeConfig(device="cpu", dtype="float32")
SHAPE = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 0, "eos_token_id": 1}


def model(config=None, attention="sdpa"):
    torch.manual_seed(3)
    config = config or LlamaConfig(**SHAPE)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).train()


def batch():
    """Three rows of different lengths; the first two tokens of each are a prompt."""
    generator = torch.Generator().manual_seed(4)
    rows = [torch.randint(2, 97, (length,), generator=generator) for length in (7, 3, 12)]
    ids = torch.cat(rows).unsqueeze(0)
    labels = torch.cat([torch.cat([torch.full((2,), -100), row[2:]]) for row in rows]).unsqueeze(0)
    return rows, ids, labels, torch.cat([torch.arange(len(row)) for row in rows]).unsqueeze(0)


@pytest.mark.parametrize("trained_head", [False, True])
@pytest.mark.parametrize("count", [0, 5, CHUNK, 2 * CHUNK + 3])
def test_log_probs_and_gradients_equal_those_of_whole_logits(trained_head, count):
    torch.manual_seed(5)
    hidden, head = torch.randn(count, 16, requires_grad=True), torch.randn(50, 16, requires_grad=trained_head)
    tokens, weights = torch.randint(50, (count,)), torch.randn(count)
    found = token_log_probs(hidden, head, tokens)
    expected = (hidden @ head.t()).log_softmax(dim=-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    assert torch.allclose(found, expected, atol=1e-5)
    wanted = [hidden, head] if trained_head and count else [hidden]
    for ours, plain in zip(
        torch.autograd.grad((found * weights).sum(), wanted),
        torch.autograd.grad((expected * weights).sum(), wanted),
        strict=True,
    ):
        assert torch.allclose(ours, plain, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trained_head_gives_the_log_probs_of_a_frozen_one_to_the_last_bit(dtype):
    torch.manual_seed(5)
    hidden, head, tokens = (
        torch.randn(CHUNK + 9, 32, dtype=dtype),
        5 * torch.randn(281, 32),
        torch.randint(281, (CHUNK + 9,)),
    )
    frozen = token_log_probs(hidden, head, tokens)
    assert torch.equal(token_log_probs(hidden, head.requires_grad_(), tokens), frozen)


@pytest.mark.parametrize("in_step", [None, 40])
def test_loss_and_gradients_equal_the_models_own(in_step):
    plain, ours = model(), model()
    take_loss_from_hidden_states(ours)
    _, ids, labels, _ = batch()
    ways = {"num_items_in_batch": in_step} if in_step else {}
    outputs = ours(input_ids=ids, labels=labels, **ways)
    assert "logits" not in outputs
    expected = plain(input_ids=ids, labels=labels, **ways).loss
    assert outputs.loss.item() == pytest.approx(expected.item(), abs=1e-5)
    outputs.loss.backward()
    expected.backward()
    for (name, found), (_, wanted) in zip(ours.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.allclose(found.grad, wanted.grad, atol=1e-5), name
    # Generation and scoring pass no labels.
    assert torch.equal(ours(input_ids=ids).logits, plain(input_ids=ids).logits)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_concatenated_rows_have_the_same_losses_as_single_rows(attention):
    policy = model(attention=attention)
    assert attend_by_row(policy) == (attention == "sdpa")
    take_loss_from_hidden_states(policy)
    rows, ids, labels, positions = batch()
    told = {"position_ids": positions, "use_cache": False}
    if attention == "sdpa":
        told["row_lengths"] = row_lengths(positions)
    together = policy(input_ids=ids, labels=labels, **told)
    plain = model(attention=attention)
    alone = [cross_entropy(plain(input_ids=row.unsqueeze(0)).logits[0, 1:-1], row[2:], reduction="sum") for row in rows]
    trained = sum(len(row) - 2 for row in rows)
    assert together.loss.item() == pytest.approx(sum(alone).item() / trained, abs=1e-5)


@pytest.mark.parametrize("length", [1, 7, losses.SHORT])
def test_attention_of_short_rows_in_half_precision_equals_torchs(length):
    torch.manual_seed(6)
    parts = [torch.randn(1, heads, length, 16, dtype=torch.bfloat16, requires_grad=True) for heads in (6, 2, 2)]
    found = losses._plain_attention(*parts, losses._mask(((length, 0),), torch.bfloat16), scaling=0.3)
    exact = [part.detach().double().requires_grad_() for part in parts]
    expected = scaled_dot_product_attention(*exact, is_causal=True, scale=0.3, enable_gqa=True).transpose(1, 2)
    assert torch.allclose(found.double(), expected, atol=2e-2)
    weights = torch.randn(expected.shape)
    ours = torch.autograd.grad((found * weights).sum(), parts)
    for gradient, wanted in zip(ours, torch.autograd.grad((expected * weights).sum(), exact), strict=True):
        assert torch.allclose(gradient.double(), wanted, atol=2e-2 * float(wanted.abs().max()))


# Lengths of rows, and of the tokens that each shares with the row before it: rows that are computed together, pairs that are
# not, and rows that are too long for plain matrix products.
ROWS = [
    ((9, 5, 7, 6, 3), (0, 0, 0, 4, 0)),
    ((130, 20, 40, 30), (0, 110, 0, 25)),
    ((losses.SHORT + 1, 9), (0, losses.SHORT)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("lengths", "shared"), ROWS, ids=["together", "apart", "long"])
def test_rows_that_leave_out_their_prompt_attend_to_it_in_the_row_before(lengths, shared, dtype):
    torch.manual_seed(7)
    parts = [torch.randn(1, heads, sum(lengths), 16, dtype=dtype, requires_grad=True) for heads in (6, 2, 2)]
    layer = torch.nn.Module()
    layer.num_key_value_groups = 3
    found, _ = losses._attention(layer, *parts, None, list(lengths), list(shared), scaling=0.3)
    exact = [part.detach().double().requires_grad_() for part in parts]
    expected, rows = [], [part.split(lengths, dim=2) for part in exact]
    for number, prompt in enumerate(shared):
        whole = [torch.cat([row[number - 1][:, :, :prompt], row[number]], dim=2) for row in rows]
        attended = scaled_dot_product_attention(*whole, is_causal=True, scale=0.3, enable_gqa=True)
        expected.append(attended[:, :, prompt:].transpose(1, 2))
    expected, close = torch.cat(expected, dim=1), 1e-5 if dtype == torch.float32 else 2e-2
    assert torch.allclose(found.double(), expected, atol=close)
    weights = torch.randn(expected.shape)
    ours = torch.autograd.grad((found * weights).sum(), parts)
    for gradient, wanted in zip(ours, torch.autograd.grad((expected * weights).sum(), exact), strict=True):
        assert torch.allclose(gradient.double(), wanted, atol=close * float(wanted.abs().max()))


def test_a_row_begins_where_the_positions_start_at_zero():
    assert row_lengths(torch.tensor([[0, 1, 2, 0, 0, 1]])) == [3, 1, 2]


def test_models_that_need_whole_logits_are_detected():
    capped = model(Gemma2Config(**SHAPE, final_logit_softcapping=0.01))
    assert why_not_from_hidden_states(model(), CPU) is None
    assert "changes the logits after the output layer" in why_not_from_hidden_states(capped, CPU)
    assert capped.training
    on_head = get_peft_model(model(), LoraConfig(target_modules=["lm_head"]))
    assert "an adapter wraps the output layer" in why_not_from_hidden_states(on_head, CPU)
    sharded = CPU.model_copy(update={"distributed": "fsdp2", "num_processes": 2})
    assert "sharded" in why_not_from_hidden_states(model(), sharded)


@pytest.mark.parametrize("by_row", [False, True])
def test_rows_that_attend_to_each_other_are_detected(by_row, monkeypatch):
    policy = model()
    assert keeps_rows_apart(policy, by_row=False)
    if by_row:
        assert attend_by_row(policy)
        assert keeps_rows_apart(policy, by_row=True)
        monkeypatch.setattr(losses, "_groups", lambda rows, together: [((losses._tokens(rows), 0),)])
    else:
        # A decoder without position ids treats both rows as one.
        whole = policy.model.forward
        policy.model.forward = lambda position_ids, **inputs: whole(**inputs)
    assert not keeps_rows_apart(policy, by_row)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fault", ["none", "no prompt", "other answer"])
def test_models_that_do_not_continue_the_prompt_of_the_row_before_are_detected(fault, dtype, monkeypatch):
    if fault != "none":
        rows = {"no prompt": ((8, 0), (4, 0)), "other answer": ((12, 0),)}[fault]
        monkeypatch.setattr(losses, "_groups", lambda _, together: [rows])
    policy = model().to(dtype)
    assert attend_by_row(policy)
    assert continues_prompts(policy) == (fault == "none")
