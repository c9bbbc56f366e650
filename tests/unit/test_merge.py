"""Merging: the saved files are the trained model, and what is not is refused by row and by how much."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_engineering.compute.device import choose_device
from llm_engineering.config import ComputeConfig, LoraConfig, ModelConfig
from llm_engineering.errors import WorkError
from llm_engineering.export import merge as merging
from llm_engineering.export.merge import Trained, merge
from llm_engineering.export.verify import HeldoutRow, TokenScores, token_scores, verify
from llm_engineering.models import load_model, load_tokenizer
from llm_engineering.training.policy import new_policy, save_policy

TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
ROWS = [HeldoutRow(f"row-{n}", [5, 6 + n, 7, 8, 2], [-100, -100, 7, 8, 2]) for n in range(6)]


@pytest.fixture
def model(small_llama):
    return ModelConfig(name_or_path=str(small_llama), revision="test")


def adapter(model, folder, settings, compute, size=0.05, **lora):
    """A trained adapter: its second matrices are drawn, and not zero as at the start."""
    torch.manual_seed(1)
    policy = new_policy(model, LoraConfig(r=2, **lora), settings, choose_device(compute))
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=size)
    save_policy(policy, model, folder)
    tokenizer = load_tokenizer(model, settings, TEMPLATE)
    tokenizer.save_pretrained(folder)
    return Trained(model, folder)


@pytest.mark.parametrize("lora", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
def test_merged_model_is_the_trained_one(model, cpu, settings, tmp_path, lora):
    trained = adapter(model, tmp_path / "adapter", settings, cpu, **lora)
    verification = merge(trained, ROWS, choose_device(cpu), settings, tmp_path / "merged")
    assert (verification.rows, verification.tokens, verification.same_top) == (6, 18, 18)
    assert verification.largest_difference < 1e-4 < 0.01 < verification.mean_training_effect
    # By hand: the files alone against the base model with the adapter.
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    both = PeftModel.from_pretrained(load_model(model, settings, choose_device(cpu)), str(trained.folder))
    ids = torch.tensor([[5, 9, 11, 2]])
    with torch.inference_mode():
        torch.testing.assert_close(saved(ids).logits, both(ids).logits, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(saved(ids).logits, both.unload()(ids).logits, atol=1e-2)


def test_files_are_complete(model, cpu, settings, tmp_path):
    """Plain transformers layout: weights, tokenizer, the template that was trained with, and every end token."""
    trained = adapter(model, tmp_path / "adapter", settings, cpu)
    merge(trained, ROWS, choose_device(cpu), settings, tmp_path / "merged")
    files = {file.name for file in (tmp_path / "merged").iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "verification.json",
    } <= files
    assert "adapter_config.json" not in files
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.chat_template == TEMPLATE
    end = tokenizer.eos_token_id
    assert json.loads((tmp_path / "merged" / "generation_config.json").read_text())["eos_token_id"] == [end]
    # Nothing of it names a place of this machine.
    for file in (tmp_path / "merged").glob("*.json"):
        assert str(tmp_path) not in file.read_text()
        assert model.name_or_path not in file.read_text()


def test_saved_in_the_precision_of_the_recipe(model, settings, tmp_path):
    compute = ComputeConfig(device="cpu", dtype="bfloat16", attn_implementation="sdpa")
    trained = adapter(model, tmp_path / "adapter", settings, compute, size=0.5)
    verification = merge(trained, ROWS, choose_device(compute), settings, tmp_path / "merged")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert saved.dtype == torch.bfloat16
    # Rounded once, from the sum in float32.
    both = PeftModel.from_pretrained(load_model(model, settings, choose_device(compute)).float(), str(trained.folder))
    merged = both.merge_and_unload().model.layers[0].mlp.up_proj.weight
    assert torch.equal(saved.model.layers[0].mlp.up_proj.weight, merged.bfloat16())
    assert 0 < verification.mean_difference < verification.mean_training_effect / 10


def test_training_that_is_rounded_away_is_refused(model, settings, tmp_path):
    """An update below half the last bit of bfloat16 weights."""
    compute = ComputeConfig(device="cpu", dtype="bfloat16", attn_implementation="sdpa")
    trained = adapter(model, tmp_path / "adapter", settings, compute, size=1e-6)
    with pytest.raises(WorkError, match="too much of it is rounded away"):
        merge(trained, ROWS, choose_device(compute), settings, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_spoilt_merge_is_refused_by_row_and_amount(model, cpu, settings, tmp_path, monkeypatch):
    trained = adapter(model, tmp_path / "adapter", settings, cpu, size=0.5)
    write = merging._write

    def spoilt(merged, *arguments):
        with torch.no_grad():
            merged.model.layers[1].mlp.down_proj.weight[0] += 1.0
        write(merged, *arguments)

    monkeypatch.setattr(merging, "_write", spoilt)
    with pytest.raises(
        WorkError, match=r"on held-out row row-\d the log-probability of answer token \d is 0\.\d+ nats"
    ):
        merge(trained, ROWS, choose_device(cpu), settings, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_full_model_is_checked_alike(model, cpu, settings, tmp_path):
    full = load_model(model, settings, choose_device(cpu))
    full.save_pretrained(tmp_path / "full")
    load_tokenizer(model, settings, TEMPLATE).save_pretrained(tmp_path / "full")
    compute = ComputeConfig(device="cpu", dtype="bfloat16", attn_implementation="sdpa")
    trained = Trained(model, tmp_path / "full")
    verification = merge(trained, ROWS, choose_device(compute), settings, tmp_path / "merged")
    assert verification.mean_training_effect is None
    assert 0 < verification.largest_difference < 0.1
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16


def test_nothing_to_verify_on_is_refused(model, cpu, settings, tmp_path):
    trained = adapter(model, tmp_path / "adapter", settings, cpu)
    with pytest.raises(WorkError, match="no held-out row"):
        merge(trained, [], choose_device(cpu), settings, tmp_path / "merged")


def scores(log_probs, top, lead):
    return TokenScores(torch.tensor(log_probs), torch.tensor(top), torch.tensor(lead))


def test_differences_by_hand():
    trained = [scores([-1.0, -2.0], [7, 8], [1.0, 0.3])]
    saved = [scores([-1.1, -2.3], [7, 9], [1.0, 0.1])]
    untrained = [scores([-4.0, -5.0], [7, 8], [1.0, 0.3])]
    row = [HeldoutRow("r", [1, 2, 3], [-100, 2, 3])]
    found = verify(row, trained, saved, torch.bfloat16, untrained)
    # The other top token is forgiven: the trained model's own lead of 0.3 is within bfloat16's 1.5.
    assert (found.tokens, found.same_top) == (2, 1)
    assert found.mean_difference == pytest.approx(0.2)
    assert found.largest_difference == pytest.approx(0.3)
    assert found.mean_training_effect == pytest.approx(3.0)
    with pytest.raises(WorkError, match=r"answer token 2 is 0\.300 nats off .* float16 weights explain 0\.2"):
        verify(row, trained, saved, torch.float16, untrained)
    clear = [scores([-1.0, -2.0], [7, 8], [1.0, 1.6])]
    with pytest.raises(WorkError, match=r"most probable one at answer token 2, where that leads by 1\.600"):
        verify(row, clear, saved, torch.bfloat16)
    broken = [scores([-1.0, float("nan")], [7, 8], [1.0, 0.3])]
    with pytest.raises(WorkError, match="inf nats off"):
        verify(row, trained, broken, torch.bfloat16)


def test_token_scores_by_hand(model, cpu, settings):
    loaded = load_model(model, settings, choose_device(cpu)).eval()
    (found,) = token_scores(loaded, [HeldoutRow("r", [5, 6, 7, 2], [-100, -100, 7, 2])])
    with torch.inference_mode():
        expected = torch.log_softmax(loaded(torch.tensor([[5, 6, 7, 2]])).logits[0], dim=-1)
    torch.testing.assert_close(found.log_probs, torch.stack([expected[1, 7], expected[2, 2]]))
    assert found.top.tolist() == expected[1:3].argmax(dim=-1).tolist()
    best = expected[1:3].sort(dim=-1, descending=True).values
    torch.testing.assert_close(found.lead, best[:, 0] - best[:, 1])
