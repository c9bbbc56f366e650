"""Tokens that the recipe adds: from the tokenizer through training, evaluation and merge to the served model."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from llm_engineering.data.rows import InstructionRow, Message
from llm_engineering.errors import RequestError
from llm_engineering.evaluation.incumbent import load_incumbent
from llm_engineering.evaluation.models import Models
from llm_engineering.formatting.datasets import format_rows
from llm_engineering.models.base_model import load_model
from llm_engineering.models.device import choose_device
from llm_engineering.models.new_tokens import with_added_tokens
from llm_engineering.models.tokenizer import load_tokenizer
from llm_engineering.publish.conversation import Conversation
from llm_engineering.publish.exports.gguf import write_gguf
from llm_engineering.publish.merge import Trained, merge
from llm_engineering.publish.verification import HeldoutRow
from llm_engineering.recipe.data_blocks import FormattingConfig
from llm_engineering.recipe.evaluation_blocks import EvaluationConfig
from llm_engineering.recipe.model_blocks import LoraConfig, ModelConfig
from llm_engineering.recipe.stage_blocks import DPOConfig, SFTConfig
from llm_engineering.training.policy import new_policy
from tests.renew_references import STEPS as REFERENCE_STEPS
from tests.tiny_models import CPU, formatted, train, training_setup, write_model
from tests.unit.training.steps import interrupt

STEPS = REFERENCE_STEPS | {"max_steps": 3, "save_steps": 3, "eval_steps": 3}
# The rows of `tests.tiny_models` spell the first two tokens. The template writes the others, and the last one ends answers.
NEW = {
    "new_tokens": ["this.", "Wha"],
    "new_special_tokens": ["<|im_start|>", "<|im_end|>"],
    "eos_token": "<|im_end|>",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of three models: input and output embeddings apart, tied, and tied with unused rows for the new tokens."""
    folder = tmp_path_factory.mktemp("models")
    for name, rows in (("tied", None), ("roomy", 320)):
        model = LlamaForCausalLM.from_pretrained(write_model(folder / name, "llama"))
        model.config.tie_word_embeddings = True
        model.tie_weights()
        if rows:
            model.resize_token_embeddings(rows)
        model.save_pretrained(folder / name)
    return {name: folder / name for name in ("tied", "roomy")} | {"llama": write_model(folder / "llama", "llama")}


def setup_of(folder, **more):
    setup = training_setup(folder, chat_template="chatml")
    return setup.model_copy(update={"model": ModelConfig(name_or_path=str(folder), **NEW, **more)})


def logits_of(model):
    with torch.inference_mode():
        return model.eval()(input_ids=torch.tensor([[5, 9, 281, 282, 284, 40]])).logits


def sft_config(**lora):
    return SFTConfig(**STEPS, packing=False, lora=LoraConfig(r=4, **lora))


def test_a_new_token_starts_as_the_mean_of_its_pieces(folders, settings):
    plain = AutoTokenizer.from_pretrained(folders["llama"])
    before = AutoModelForCausalLM.from_pretrained(folders["llama"])
    model = setup_of(folders["llama"]).model
    tokenizer = load_tokenizer(model, settings, "chatml")
    grown = load_model(model, settings, choose_device(CPU))
    for token in model.added_tokens:
        (new,) = tokenizer(token)["input_ids"]
        pieces = plain(token)["input_ids"]
        assert new >= len(plain)
        assert len(pieces) > 1
        for old, layer in (
            (before.get_input_embeddings(), grown.get_input_embeddings()),
            (before.lm_head, grown.lm_head),
        ):
            torch.testing.assert_close(layer.weight[new], old.weight[pieces].mean(dim=0))
    assert torch.equal(grown.lm_head.weight[: len(plain)], before.lm_head.weight)
    assert grown.config.vocab_size == len(tokenizer)


@pytest.mark.parametrize("kind", ["llama", "tied", "roomy"])
def test_new_tokens_are_trained_measured_merged_and_served(kind, folders, settings, trained, tmp_path):
    setup, device = setup_of(folders[kind]), choose_device(CPU)
    tokenizer = load_tokenizer(setup.model, settings, setup.chat_template)
    new = tokenizer.convert_tokens_to_ids(setup.model.added_tokens)
    rows = formatted("instruction", 8, tokenizer, tmp_path)
    ids = rows["train"][0]["input_ids"]
    assert set(new) <= set(ids)
    assert ids[-1] == tokenizer.eos_token_id == new[-1]
    base = load_model(setup.model, settings, device)
    untrained = logits_of(base)

    # The adapter has the trained rows, and not the whole embeddings
    sft = train(rows, sft_config(), setup, settings)
    assert not torch.allclose(logits_of(trained[0]), untrained, atol=1e-2)
    weights = load_file(sft.adapter / "adapter_model.safetensors")
    trained_rows = {name: weight for name, weight in weights.items() if "lora_" not in name}
    assert [len(weight) for weight in trained_rows.values()] == [4] * (2 if kind == "llama" else 1)
    start = base.get_input_embeddings().weight[new]
    assert all(((weight - start).abs().max(dim=1).values > 1e-4).all() for weight in trained_rows.values())

    # DPO trains them further
    pairs = formatted("preference", 8, tokenizer, tmp_path)
    dpo = train(pairs, DPOConfig(**STEPS), setup, settings, start=sft.adapter)
    assert next(entry for entry in dpo.summary["history"] if "loss" in entry)["rewards/margins"] == 0

    # The base model can be found again from the trained one, and all three answer beside each other
    plain = ModelConfig(name_or_path=setup.model.name_or_path)
    assert with_added_tokens(plain, dpo.adapter).added_tokens == setup.model.added_tokens
    models = Models(base, {"sft": sft.adapter, "dpo": dpo.adapter}, tokenizer, batch_size=2)
    for name, logits in (("dpo", logits_of(trained[1])), ("sft", logits_of(trained[0])), ("base", untrained)):
        with models.use(name) as model:
            torch.testing.assert_close(logits_of(model), logits, atol=1e-4, rtol=1e-4)
    alone, name = load_incumbent(dpo.adapter, tokenizer, EvaluationConfig(), setup, settings)
    with alone.use(name) as model:
        torch.testing.assert_close(logits_of(model), logits_of(trained[1]), atol=1e-4, rtol=1e-4)

    # The merged model has them as any other token, and can be the base of another recipe
    held_out = [HeldoutRow("row", ids, rows["train"][0]["labels"])]
    merged = tmp_path / "merged"
    merge(Trained(setup.model, dpo.adapter), held_out, device, torch.float32, settings, merged)
    torch.testing.assert_close(
        logits_of(AutoModelForCausalLM.from_pretrained(merged)), logits_of(trained[1]), atol=1e-4, rtol=1e-4
    )
    read = AutoTokenizer.from_pretrained(merged)
    assert (len(read), read.eos_token, "new_tokens" in read.init_kwargs) == (len(tokenizer), "<|im_end|>", False)
    assert new[-1] in json.loads((merged / "generation_config.json").read_text())["eos_token_id"]
    conversation = Conversation(merged, device, settings, 4, trust_remote_code=False)
    assert conversation.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert conversation.model.get_input_embeddings().weight.shape[0] >= len(tokenizer)
    (tmp_path / "gguf").mkdir()
    write_gguf(merged, tmp_path / "gguf" / "model.gguf", "m")
    from_file = AutoModelForCausalLM.from_pretrained(tmp_path / "gguf", gguf_file="model.gguf", dtype=torch.float32)
    torch.testing.assert_close(logits_of(from_file), logits_of(trained[1]), atol=1e-3, rtol=1e-3)


def test_a_resumed_run_ends_with_the_same_bytes(folders, settings, tmp_path):
    setup = setup_of(folders["llama"])
    rows = formatted("instruction", 8, load_tokenizer(setup.model, settings, setup.chat_template), tmp_path)
    expected = (train(rows, sft_config(), setup, settings).adapter / "adapter_model.safetensors").read_bytes()
    interrupt(2, lambda: train(rows, sft_config(), setup, settings))
    (checkpoint,) = (settings.llm_output_dir / "training").glob("*/checkpoints/checkpoint-2/adapter_model.safetensors")
    assert not any(len(weight) > 200 for name, weight in load_file(checkpoint).items() if "embed" in name)
    resumed = train(rows, sft_config(), setup, settings)
    assert resumed.summary["resumed_from"] == "checkpoint-2"
    assert (resumed.adapter / "adapter_model.safetensors").read_bytes() == expected


def test_a_full_model_is_trained_and_merged_with_new_tokens(folders, settings, trained, tmp_path):
    setup, device = setup_of(folders["llama"]).model_copy(update={"method": "full"}), choose_device(CPU)
    tokenizer = load_tokenizer(setup.model, settings, setup.chat_template)
    rows = formatted("instruction", 8, tokenizer, tmp_path)
    full = train(rows, SFTConfig(**STEPS, packing=False), setup, settings)
    models = Models(load_model(setup.model, settings, device), {"sft": full.adapter}, tokenizer, batch_size=2)
    with models.use("sft") as model:
        torch.testing.assert_close(logits_of(model), logits_of(trained[0]), atol=1e-4, rtol=1e-4)
    held_out = [HeldoutRow("row", rows["train"][0]["input_ids"], rows["train"][0]["labels"])]
    merge(Trained(setup.model, full.adapter), held_out, device, torch.float32, settings, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits_of(merged), logits_of(trained[0]), atol=1e-4, rtol=1e-4)


def test_the_data_may_spell_new_tokens_and_not_the_special_ones(folders, settings):
    model = ModelConfig(
        name_or_path=str(folders["llama"]), new_tokens=["<|tool|>"], new_special_tokens=["<|call|>", "<|pad|>"]
    )
    tokenizer = load_tokenizer(model, settings, "alpaca")
    assert tokenizer.pad_token == "<|pad|>"
    rows = [
        InstructionRow(
            prompt=[Message(role="user", content=f"Use {token} now")],
            completion=[Message(role="assistant", content="Yes.")],
            source="s",
            origin="o",
        )
        for token in ("<|tool|>", "<|call|>")
    ]
    plain, special = format_rows(rows, "instruction", tokenizer, FormattingConfig(max_length=256))
    assert tokenizer.convert_tokens_to_ids("<|tool|>") in plain.records[0]["input_ids"]
    assert special.rejected.reason == "special_token_in_text"
    # A new token is no padding unless it is named so.
    model = model.model_copy(update={"new_special_tokens": ["<|call|>"]})
    assert load_tokenizer(model, settings, "alpaca").pad_token not in model.added_tokens


def test_new_tokens_that_cannot_be_trained_are_refused(folders, settings):
    folder = folders["llama"]
    known = ModelConfig(name_or_path=str(folder), new_tokens=["this."])
    with pytest.raises(RequestError, match=r"model\.new_tokens names a, which is a token of .* already"):
        load_tokenizer(ModelConfig(name_or_path=str(folder), new_tokens=["a"]), settings, "alpaca")
    for lora, words in (
        ({"modules_to_save": ["embed_tokens"]}, "new tokens need both embeddings. Name embed_tokens and lm_head"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "target_modules names an embedding"),
    ):
        with pytest.raises(RequestError, match=words):
            new_policy(known, LoraConfig(r=4, **lora), settings, choose_device(CPU))
    # Rows on a half-precision base are trained in float32.
    half = choose_device(CPU.model_copy(update={"dtype": "bfloat16"}))
    policy = new_policy(known, LoraConfig(r=4), settings, half)
    assert {p.dtype for p in policy.parameters() if p.requires_grad} == {torch.float32}
    # Both embeddings are trained whole.
    policy = new_policy(
        known, LoraConfig(r=4, modules_to_save=["embed_tokens", "lm_head"]), settings, choose_device(CPU)
    )
    assert policy.peft_config["default"].trainable_token_indices is None


def test_rows_of_an_output_layer_with_a_bias_are_refused(tmp_path, settings):
    """PEFT computes such a layer without its bias."""
    from transformers import PhiConfig, PhiForCausalLM

    folder = write_model(tmp_path, "gpt2")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    PhiForCausalLM(PhiConfig(vocab_size=281, **sizes)).save_pretrained(folder)
    for model, lora in (
        (ModelConfig(name_or_path=str(folder), new_tokens=["this."]), {}),
        (ModelConfig(name_or_path=str(folder)), {"trainable_token_indices": {"lm_head": [5]}}),
    ):
        with pytest.raises(RequestError, match="output layer of this model has a bias"):
            new_policy(model, LoraConfig(r=4, **lora), settings, choose_device(CPU))
