"""Batches of answers, compared with transformers' own loop."""

from __future__ import annotations

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, Lfm2Config, MambaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from llm_engineering.models import generate
from llm_engineering.models.generate import generate_ids
from tests.tiny_models import SIZES, Kind, write_model

# A state of a fixed size, and one beside the keys and values of another layer.
KINDS = {
    "mamba": Kind(MambaConfig, {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    "lfm2": Kind(Lfm2Config, SIZES | {"layer_types": ["conv", "full_attention"]}),
}
LONGEST = 12


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3", "mamba", "lfm2"])
def test_ended_answers_leave_their_batch_and_all_are_those_of_transformers(kind, tmp_path):
    folder = write_model(tmp_path, KINDS.get(kind, kind))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            # Weights so large that the answers depend on the prompts.
            if parameter.dim() > 1:
                parameter.mul_(8)
    tokenizer.pad_token = tokenizer.eos_token
    prompts = tokenizer(["Hi", "numbers " * 4, "Is it this?", "7", "x" * 20])["input_ids"]
    rows = []
    model.get_output_embeddings().register_forward_hook(lambda _, inputs, output: rows.append(inputs[0]))

    def expected():
        padded = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
        new = model.generate(**padded, max_new_tokens=LONGEST, do_sample=False)[:, padded["input_ids"].shape[1] :]
        ends = [next((i for i, token in enumerate(row) if token == end), LONGEST) for row in new.tolist()]
        return [row[: length + 1] for row, length in zip(new.tolist(), ends, strict=True)]

    with torch.inference_mode():
        end = model.generation_config.eos_token_id
        free = expected()
        assert len(set(map(tuple, free))) > 2
        # A token that some answers have, and others have not.
        end = next(t for row in free for t in row[2:-1] if any(t not in other for other in free))
        model.generation_config.eos_token_id = end
        answers = expected()
        rows.clear()
        assert generate_ids(model, tokenizer, prompts, LONGEST, do_sample=False) == answers
    assert [len(hidden) for hidden in rows] == [sum(len(a) > step for a in answers) for step in range(len(rows))]
    assert len(rows) == max(map(len, answers))
    assert len(rows[-1]) < len(prompts)
    # torch would copy the output layer once for each row otherwise.
    assert rows[0].is_contiguous()
    assert AttentionInterface()["sdpa"] is sdpa_attention_forward


@pytest.mark.parametrize("mask", ["none", "of rows", "of heads", "added"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_attention_of_one_token_is_exact_but_for_rounding(dtype, mask):
    torch.manual_seed(1)
    rows, heads, length = 3, 6, 40
    query, key, value = (
        torch.randn(rows, count, tokens, size).to(dtype)
        for count, tokens, size in ((heads, 1, 16), (2, length, 16), (2, length, 16))
    )
    attention_mask = None
    if mask != "none":
        attention_mask = torch.rand(rows, 1 if mask == "of rows" else heads, 1, length) < 0.7
    if mask == "added":
        attention_mask = torch.zeros(attention_mask.shape, dtype=dtype).masked_fill(~attention_mask, -torch.inf)
    layer = torch.nn.Module()
    layer.num_key_value_groups = 3
    exact_mask = attention_mask.double() if mask == "added" else attention_mask
    exact = sdpa_attention_forward(layer, query.double(), key.double(), value.double(), exact_mask, scaling=0.4)[0]
    found = generate._attend_from_one(layer, query, key, value, attention_mask, scaling=0.4)[0]
    assert found.dtype == dtype
    # In multiples of eps, torch's kernel is off by up to 6.3 in float32 and 0.5 in bfloat16, on five seeds. Values are up to 1.8.
    largest = {torch.float32: 8, torch.bfloat16: 2}[dtype]
    assert (found - exact).abs().max() < largest * torch.finfo(dtype).eps
