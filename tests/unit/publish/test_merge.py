"""Merging: the saved files hold the trained model, and a difference is refused with its row and size."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from llm_engineering.errors import RequestError, WorkError
from llm_engineering.evaluation.models import Models
from llm_engineering.models.base_model import load_model
from llm_engineering.models.device import Device, choose_device
from llm_engineering.models.generate import generate_ids
from llm_engineering.models.tokenizer import load_tokenizer
from llm_engineering.publish import merge as merging
from llm_engineering.publish import shards
from llm_engineering.publish.merge import Trained, merge, merged_device
from llm_engineering.publish.verification import HeldoutRow, TokenScores, check_same, token_scores, verify
from llm_engineering.recipe.compute_blocks import ComputeConfig
from llm_engineering.recipe.model_blocks import LoraConfig, ModelConfig
from llm_engineering.training.policy import new_policy, save_policy

TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
ROWS = [HeldoutRow(f"row-{n}", [5, 6 + n, 7, 8, 2], [-100, -100, 7, 8, 2]) for n in range(6)]


@pytest.fixture
def model(small_llama):
    return ModelConfig(name_or_path=str(small_llama), revision="test")


def adapter(model, folder, settings, compute, size=0.05, **lora):
    """A trained adapter: its second matrices, which are zero at the start of training, have random values."""
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
    verification = merge(trained, ROWS, choose_device(cpu), torch.float32, settings, tmp_path / "merged")
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
    """Plain transformers layout: weights, tokenizer, chat template of training, end tokens, and repetition penalty."""
    trained = adapter(model, tmp_path / "adapter", settings, cpu)
    merge(trained, ROWS, choose_device(cpu), torch.float32, settings, tmp_path / "merged", repetition_penalty=1.1)
    assert json.loads((tmp_path / "merged" / "generation_config.json").read_text())["repetition_penalty"] == 1.1
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
    # No file has a path of this machine.
    for file in (tmp_path / "merged").glob("*.json"):
        assert str(tmp_path) not in file.read_text()
        assert model.name_or_path not in file.read_text()


def test_the_merged_model_answers_greedily_as_it_was_measured(small_llama, cpu, settings, tmp_path):
    base = shutil.copytree(small_llama, tmp_path / "base")
    sampling = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9, top_k=20, min_p=0.05, typical_p=0.9)
    sampling.save_pretrained(base)
    model = ModelConfig(name_or_path=str(base))
    trained = adapter(model, tmp_path / "adapter", settings, cpu, size=0.5)
    merge(trained, ROWS, choose_device(cpu), torch.float32, settings, tmp_path / "merged", repetition_penalty=1.1)
    written = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert (written["do_sample"], written["repetition_penalty"]) == (False, 1.1)
    assert {name: written[name] for name in sampling.to_diff_dict() if written.get(name)}.keys() <= {
        "transformers_version"
    }
    # The default of a server equals the evaluation's answers.
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    prompt = [5, 9, 11, 30]
    torch.manual_seed(3)
    served = saved.generate(torch.tensor([prompt]), max_new_tokens=12)[0, len(prompt) :].tolist()
    tokenizer = load_tokenizer(ModelConfig(name_or_path=str(trained.folder)), settings)
    models = Models(load_model(model, settings, choose_device(cpu)), {"sft": trained.folder}, tokenizer, 1, 1.1)
    with models.use("sft") as measured:
        options = {"do_sample": False, "repetition_penalty": 1.1}
        assert served == generate_ids(measured, tokenizer, [prompt], 12, **options)[0]


BF16 = ComputeConfig(device="cpu", dtype="bfloat16", attn_implementation="sdpa")


def test_an_adapter_on_a_half_precision_base_is_merged_without_loss(model, settings, tmp_path):
    """In float32, an update smaller than half the last bit of the base model's weights is kept."""
    trained = adapter(model, tmp_path / "adapter", settings, BF16, size=1e-3)
    verification = merge(trained, ROWS, choose_device(BF16), torch.float32, settings, tmp_path / "merged")
    assert verification.largest_difference < verification.mean_training_effect / 100
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == torch.float32


def test_the_precision_is_float32_unless_the_recipe_names_another():
    assert merged_device(BF16).dtype == torch.bfloat16
    assert merged_device(ComputeConfig(device="cpu")).dtype == torch.float32


def test_a_recipe_that_trains_with_flash_attention_is_merged_and_served_with_sdpa(monkeypatch):
    for name, answer in (("is_available", True), ("get_device_name", "a card"), ("is_bf16_supported", True)):
        monkeypatch.setattr(torch.cuda, name, lambda *args, answer=answer, **kwargs: answer)
    monkeypatch.setattr("llm_engineering.models.device._is_installed", lambda package: True)
    recipe = ComputeConfig(attn_implementation="flash_attention_2")
    trains, serves = choose_device(recipe), merged_device(recipe)
    assert (trains.dtype, trains.attn_implementation) == (torch.bfloat16, "flash_attention_2")
    assert (serves.dtype, serves.attn_implementation) == (torch.float32, "sdpa")
    half = merged_device(recipe.model_copy(update={"dtype": "bfloat16"}))
    assert (half.dtype, half.attn_implementation) == (torch.bfloat16, "flash_attention_2")


def test_weights_are_rounded_once_if_the_recipe_asks_for_it(model, settings, tmp_path):
    trained = adapter(model, tmp_path / "adapter", settings, BF16, size=0.5)
    verification = merge(trained, ROWS, choose_device(BF16), torch.bfloat16, settings, tmp_path / "merged")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert saved.dtype == torch.bfloat16
    # The float32 sum is rounded.
    both = PeftModel.from_pretrained(load_model(model, settings, choose_device(BF16)).float(), str(trained.folder))
    merged = both.merge_and_unload().model.layers[0].mlp.up_proj.weight
    assert torch.equal(saved.model.layers[0].mlp.up_proj.weight, merged.bfloat16())
    assert 0 < verification.mean_difference < verification.mean_training_effect / 10
    assert "this is the cost of rounding" in verification.sentence


def test_training_that_is_rounded_away_is_refused(model, settings, tmp_path):
    """The update is smaller than half the last bit of bfloat16 weights."""
    trained = adapter(model, tmp_path / "adapter", settings, BF16, size=1e-6)
    with pytest.raises(
        WorkError, match=r"rounding to bfloat16 changes .* Save without loss: --set compute.dtype=float32"
    ):
        merge(trained, ROWS, choose_device(BF16), torch.bfloat16, settings, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_small_mistake_is_refused_in_every_precision(model, settings, tmp_path, monkeypatch, dtype):
    """The update of one of fourteen matrices is missing, which is less than rounding to bfloat16 may cost."""
    trained = adapter(model, tmp_path / "adapter", settings, BF16, size=0.5)
    merge_layer = shards.ShardedMerge._merge_layer

    def all_but_one(self, name):
        if name == "model.layers.0.self_attn.k_proj":
            torch.nn.init.zeros_(self.layers[name].lora_B["default"].weight)
        return merge_layer(self, name)

    monkeypatch.setattr(shards.ShardedMerge, "_merge_layer", all_but_one)
    with pytest.raises(WorkError, match=r"on held-out row row-\d"):
        merge(trained, ROWS, choose_device(BF16), dtype, settings, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_model_that_does_not_fit_on_the_card_is_compared_on_the_processor(model, settings, tmp_path, monkeypatch):
    free = {"cuda": 2_000_000_000, "cpu": 40_000_000_000}
    monkeypatch.setattr(merging, "free_memory", lambda device: free[device.name])
    card = Device("cuda", torch.bfloat16, "sdpa", [])
    assert merging._device_with_room(card, 1_900_000_000).name == "cuda"
    assert merging._device_with_room(card, 32_000_000_000) == card._replace(name="cpu")
    with pytest.raises(
        RequestError, match=r"takes 41\.0 GB of memory, and this machine has 40\.0 GB free\. Close other"
    ):
        merging._device_with_room(card, 41_000_000_000)
    # Nothing is computed for a model that does not fit.
    trained = adapter(model, tmp_path / "adapter", settings, BF16)
    free["cpu"] = 1000
    monkeypatch.setattr(merging, "load_model", None)
    with pytest.raises(RequestError, match="in float32, which takes 0.0 GB of memory"):
        merge(trained, ROWS, choose_device(BF16), torch.float32, settings, tmp_path / "merged")


def test_full_memory_on_the_card_is_told_with_what_to_do(model, cpu, settings, tmp_path, monkeypatch):
    trained = adapter(model, tmp_path / "adapter", settings, cpu)

    def no_memory(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(merging, "check_same", no_memory)
    with pytest.raises(WorkError, match="memory of the card became full .* --set compute.device=cpu"):
        merge(trained, ROWS, choose_device(cpu), torch.float32, settings, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_full_model_is_verified_too(model, cpu, settings, tmp_path):
    full = load_model(model, settings, choose_device(cpu))
    torch.manual_seed(1)
    with torch.no_grad():
        full.lm_head.weight += 0.1 * torch.randn_like(full.lm_head.weight)
    full.save_pretrained(tmp_path / "full")
    load_tokenizer(model, settings, TEMPLATE).save_pretrained(tmp_path / "full")
    trained = Trained(model, tmp_path / "full")
    exact = merge(trained, ROWS, choose_device(cpu), torch.float32, settings, tmp_path / "exact")
    assert exact.largest_difference < 1e-4 < 0.01 < exact.mean_training_effect
    rounded = merge(trained, ROWS, choose_device(cpu), torch.bfloat16, settings, tmp_path / "rounded")
    assert rounded.mean_training_effect == pytest.approx(exact.mean_training_effect)
    assert exact.largest_difference < rounded.largest_difference < 0.1
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "rounded").dtype == torch.bfloat16


def test_a_merge_without_held_out_rows_is_refused(model, cpu, settings, tmp_path):
    trained = adapter(model, tmp_path / "adapter", settings, cpu)
    with pytest.raises(WorkError, match="no held-out row"):
        merge(trained, [], choose_device(cpu), torch.float32, settings, tmp_path / "merged")


def scores(log_probs, top, lead):
    return TokenScores(torch.tensor(log_probs), torch.tensor(top), torch.tensor(lead))


ROW = [HeldoutRow("r", [1, 2, 3], [-100, 2, 3])]


def test_differences_by_hand():
    trained = [scores([-1.0, -2.0], [7, 8], [1.0, 0.3])]
    saved = [scores([-1.1, -2.3], [7, 9], [1.0, 0.1])]
    untrained = [scores([-4.0, -5.0], [7, 8], [1.0, 0.3])]
    found = verify(ROW, trained, saved, untrained, torch.bfloat16)
    assert (found.tokens, found.same_top) == (2, 1)
    assert found.mean_difference == pytest.approx(0.2)
    assert found.largest_difference == pytest.approx(0.3)
    assert found.mean_training_effect == pytest.approx(3.0)
    # 0.2 nats are more than a tenth of a training effect of 1.9 nats.
    with pytest.raises(WorkError, match="changes log-probabilities by 0.2 nats on average, .* changed them by 1.9"):
        verify(ROW, trained, saved, [scores([-2.9, -3.9], [7, 8], [1.0, 0.3])], torch.bfloat16)
    with pytest.raises(WorkError, match=r"row r the log-probability of answer token 2 differs by 0\.300 nats"):
        verify(ROW, trained, saved, untrained, torch.float32)
    broken = [scores([-1.0, float("nan")], [7, 8], [1.0, 0.3])]
    with pytest.raises(WorkError, match="by nan nats"):
        verify(ROW, trained, broken, untrained, torch.float16)
    with pytest.raises(WorkError, match="differs by inf nats"):
        verify(ROW, trained, broken, untrained, torch.float32)


def test_the_same_model_has_the_same_most_probable_tokens():
    other = [scores([-1.0, -2.0], [7, 9], [1.0, 0.3])]
    with pytest.raises(
        WorkError, match=r"most probable one at answer token 2, where the trained model\'s token leads by 0\.300 nats"
    ):
        check_same(ROW, [scores([-1.0, -2.0], [7, 8], [1.0, 0.3])], other)
    # Tokens this close may swap when a sum is computed in another order.
    check_same(ROW, [scores([-1.0, -2.0], [7, 8], [1.0, 0.0005])], other)


def test_token_scores_by_hand(model, cpu, settings):
    loaded = load_model(model, settings, choose_device(cpu)).eval()
    (found,) = token_scores(loaded, [HeldoutRow("r", [5, 6, 7, 2], [-100, -100, 7, 2])])
    with torch.inference_mode():
        expected = torch.log_softmax(loaded(torch.tensor([[5, 6, 7, 2]])).logits[0], dim=-1)
    torch.testing.assert_close(found.log_probs, torch.stack([expected[1, 7], expected[2, 2]]))
    assert found.top.tolist() == expected[1:3].argmax(dim=-1).tolist()
    best = expected[1:3].sort(dim=-1, descending=True).values
    torch.testing.assert_close(found.lead, best[:, 0] - best[:, 1])
