"""Recipe values that only the model can judge are judged on a model without weights."""

import logging

import pytest
from transformers import GPTJConfig

from benchmarks.architectures import ARCHITECTURES
from llm_engineering.errors import RequestError
from llm_engineering.models.fit import left_out, on_meta, table_of_positions
from llm_engineering.models.tokenizer import check_rows, load_tokenizer
from llm_engineering.recipe.model_blocks import ModelConfig
from tests.cases.refusals import UNPACKED, config_of, judged


@pytest.mark.parametrize(
    ("name", "overrides", "changes", "words"),
    [
        ("Phi-3", ["cpt.lora.target_modules=[q_proj,o_proj]"], {}, "q_proj is no name .* o_proj, qkv_proj"),
        (
            "BLOOM",
            [*UNPACKED, "compute.attn_implementation=sdpa"],
            {},
            r"is sdpa, which my/model \(bloom\) does not have",
        ),
        ("BLOOM", [], {}, "takes no position ids"),
        (
            "Qwen2",
            [],
            {"quantization_config": {"quant_method": "awq", "bits": 4}},
            "The weights of my/model are quantised",
        ),
        (
            "GPT-2",
            ["formatting.max_length=500"],
            {},
            "has 512 positions, .*together more. Lower formatting.max_length to 488",
        ),
        ("OPT", ["formatting.max_length=600"], {}, "has 512 positions, .* Lower formatting.max_length to 488"),
        ("Qwen2", ["sft.router_aux_loss_coef=0.01"], {}, "sft.router_aux_loss_coef is set, but my/model has no router"),
        ("Phi-3", [], {"pad_token_id": 300}, "my/model cannot be built as a causal language model: Padding_idx"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(name, overrides, changes, words):
    with pytest.raises(RequestError, match=words):
        judged(name, *overrides, **changes)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_default_recipe_fits_every_architecture_that_takes_position_ids(name):
    judged(name, *(UNPACKED if name == "BLOOM" else ()))


def test_only_tables_of_positions_limit_the_length():
    tables = {
        name: table_of_positions(on_meta(config_of(name), None, "eager", False))
        for name in ("GPT-2", "OPT", "Qwen2", "BLOOM")
    }
    assert tables == {"GPT-2": 512, "OPT": 512, "Qwen2": None, "BLOOM": None}
    rotary_table = GPTJConfig(vocab_size=300, n_positions=64, n_embd=32, n_layer=1, n_head=2, rotary_dim=8)
    assert table_of_positions(on_meta(rotary_table, None, "eager", False)) == 64


def test_layers_and_experts_without_an_adapter_are_named():
    named = [left_out(judged("Phi-3", "cpt.lora.target_modules=[o_proj]")), left_out(judged("gpt-oss"))]
    assert (logging.INFO, "lora: adapters on o_proj, and none on down_proj, gate_up_proj, qkv_proj") in named[0]
    (experts,) = (note for level, note in named[1] if level == logging.WARNING)
    assert experts.startswith("lora: the experts' weights get no adapter (down_proj, gate_up_proj).")
    with_head = left_out(judged("Qwen2", "cpt.lora.modules_to_save=[embed_tokens,lm_head]"))
    assert not [note for _, note in with_head if "none on" in note]


def test_tokens_without_a_row_in_the_embedding_are_refused(small_llama, settings):
    tokenizer = load_tokenizer(ModelConfig(name_or_path=str(small_llama)), settings, "chatml")
    check_rows(tokenizer, len(tokenizer) + 100)
    tokenizer.add_tokens(["<tool>"])
    with pytest.raises(RequestError, match=r"has 1 tokens without a row .* of \d+ rows: <tool> \(\d+\)\. Remove them"):
        check_rows(tokenizer, len(tokenizer) - 1)
