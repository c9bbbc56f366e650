"""The merge of one file at a time: the numbers of PEFT's merge, the memory of one file, and models that it leaves to PEFT."""

import gc
import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from llm_engineering.models.base_model import load_model
from llm_engineering.models.device import choose_device
from llm_engineering.publish import shards
from llm_engineering.publish.shards import ShardedMerge, empty_model, rounded, weight_files, write_parts
from llm_engineering.recipe.model_blocks import LoraConfig, ModelConfig
from llm_engineering.training.policy import new_policy, save_policy
from tests.tiny_models import CPU, KINDS, write_model

# For each case the model, and the keys of the block.
CASES = {
    **{kind: (kind, {}) for kind in KINDS},
    "rslora": ("llama", {"use_rslora": True, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"up_proj": 3}}),
    "dora": ("llama", {"use_dora": True}),
    "dora in GPT-2": ("gpt2", {"use_dora": True}),
    "biases": ("gpt2", {"lora_bias": True}),
    "whole embeddings": ("llama", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "LoRA of the embeddings": ("llama", {"target_modules": ["embed_tokens", "lm_head", "v_proj"]}),
    "tokens": ("llama", {"trainable_token_indices": [5, 9]}),
    "parameters": ("llama", {"target_parameters": ["q_proj.weight", "up_proj.weight"], "target_modules": []}),
    "blocks": ("llama", {"use_bdlora": {"target_modules_bd_a": ["q_proj"], "nblocks": 2, "match_strict": False}}),
}


@pytest.fixture
def trained(tmp_path, settings):
    """A function that makes a base model of several files, and an adapter all of whose weights are random."""

    def make(kind, lora, dtype=torch.float32):
        base = AutoModelForCausalLM.from_pretrained(write_model(tmp_path / "one", kind), dtype=dtype)
        base.save_pretrained(tmp_path / "base", max_shard_size="30KB")
        (tmp_path / "base" / "model.safetensors").unlink(missing_ok=True)
        model = ModelConfig(name_or_path=str(tmp_path / "base"), revision="test")
        policy = new_policy(model, LoraConfig(r=2, **lora), settings, choose_device(CPU))
        torch.manual_seed(1)
        for parameter in policy.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.3)
        save_policy(policy, model, tmp_path / "adapter")
        return model, tmp_path / "adapter"

    return make


def sharded(model, adapter, settings, dtype=torch.float32):
    return ShardedMerge(empty_model(model, adapter, settings), weight_files(model, settings), dtype)


def weights_of(folder):
    return {name: weight for file in folder.glob("*.safetensors") for name, weight in load_file(file).items()}


@pytest.mark.parametrize("case", CASES)
def test_every_number_is_that_of_the_merge_in_memory(case, trained, settings, tmp_path):
    model, adapter = trained(*CASES[case])
    merge = sharded(model, adapter, settings)
    assert merge.obstacle is None
    write_parts(merge.parts(), tmp_path / "merged")
    base = load_model(model, settings, choose_device(CPU))
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    expected = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload(safe_merge=True).state_dict()
    found = weights_of(tmp_path / "merged")
    assert found
    assert found.keys() | {"lm_head.weight"} == expected.keys() | {"lm_head.weight"}
    assert all(torch.equal(weight, expected[name]) for name, weight in found.items())
    assert any(not torch.equal(weight, before[name]) for name, weight in found.items())
    # transformers reads the files by their index.
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == found.keys()
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in found.values())


def test_a_base_in_half_precision_is_merged_in_float32_and_rounded_once(trained, settings, tmp_path):
    model, adapter = trained("llama", {}, torch.bfloat16)
    write_parts(sharded(model, adapter, settings, torch.bfloat16).parts(), tmp_path / "merged")
    exact = weights_of(tmp_path / "merged")
    base = load_model(model, settings, choose_device(CPU)._replace(dtype=torch.bfloat16)).float()
    expected = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload(safe_merge=True).state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in exact.items())
    write_parts(rounded(tmp_path / "merged", torch.bfloat16), tmp_path / "merged")
    half = weights_of(tmp_path / "merged")
    assert half.keys() == exact.keys()
    assert all(torch.equal(weight, exact[name].bfloat16()) for name, weight in half.items())


def test_the_weights_of_one_file_are_in_memory_at_a_time(trained, settings, tmp_path, monkeypatch):
    model, adapter = trained("llama", {"modules_to_save": ["lm_head"]})
    sizes, written = [], []
    save_file = shards.save_file

    def alive():
        gc.collect()
        tensors = [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and t.device.type == "cpu"]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    def measured(weights, *arguments, **options):
        written.append(sum(weight.nbytes for weight in weights.values()))
        sizes.append(alive() - before)
        save_file(weights, *arguments, **options)

    merge = sharded(model, adapter, settings)
    monkeypatch.setattr(shards, "save_file", measured)
    before = alive()
    write_parts(merge.parts(), tmp_path / "merged")
    assert len(written) > 4
    assert all(size <= own for size, own in zip(sizes, written, strict=True)), (sizes, written)


def test_files_without_the_name_of_the_inner_model_keep_their_names(trained, settings, tmp_path):
    model, adapter = trained("gpt2", {})
    write_parts(sharded(model, adapter, settings).parts(), tmp_path / "long")
    for file in (tmp_path / "base").glob("*.safetensors"):
        short = {name.removeprefix("transformer."): weight for name, weight in load_file(file).items()}
        shards.save_file(short, file)
    merge = sharded(model, adapter, settings)
    assert merge.obstacle is None
    write_parts(merge.parts(), tmp_path / "short")
    expected, found = weights_of(tmp_path / "long"), weights_of(tmp_path / "short")
    assert "h.0.attn.c_attn.weight" in found
    assert all(torch.equal(found[name.removeprefix("transformer.")], weight) for name, weight in expected.items())


def test_what_only_the_whole_model_can_merge_is_named(trained, settings, tmp_path):
    model, adapter = trained("llama", {"modules_to_save": ["embed_tokens"]})
    assert sharded(model, adapter, settings).obstacle is None
    tied = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    tied.config.tie_word_embeddings = True
    tied.config.save_pretrained(tmp_path / "base")
    assert sharded(model, adapter, settings).obstacle == (
        "the adapter changes an embedding that the input and the output share"
    )


def test_other_names_or_formats_of_files_are_left_to_the_merge_in_memory(trained, settings, tmp_path):
    model, adapter = trained("llama", {})
    files = weight_files(model, settings)
    for file in files:
        renamed = {name.replace("q_proj", "query"): weight for name, weight in load_file(file).items()}
        shards.save_file(renamed, file)
    assert "model.layers.0.self_attn.q_proj.weight" in sharded(model, adapter, settings).obstacle
    for file in [*files, tmp_path / "base" / "model.safetensors.index.json"]:
        file.unlink()
    assert sharded(model, adapter, settings).obstacle == "its weights are not in safetensors files"
