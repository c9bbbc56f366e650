"""GGUF files that transformers reads back with the same tokens, template and logits; unsupported models are refused."""

import json

import pytest
import torch
from gguf import GGUFReader
from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llm_engineering.errors import RequestError
from llm_engineering.publish.gguf import check_gguf, write_gguf
from tests.tiny_models import SIZES, Kind, write_model

TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
TEXT = "What is the sum of these 12 numbers?\n\tÄ “quoted” 'tis <|endoftext|> it's   done."


def saved(source, folder, dtype, **changes):
    """Save the model of `source` in a precision, with a chat template and changes to its configuration."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    if changes:
        config = folder / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip(small_llama, tmp_path, dtype):
    folder = saved(small_llama, tmp_path / "model", dtype)
    write_gguf(folder, tmp_path / "model.gguf", "my-model")
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    assert kinds["blk.1.attn_q.weight"] == {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[str(dtype)[6:]]
    assert kinds["blk.1.attn_norm.weight"] == "F32"
    ids = torch.tensor([[5, 9, 11, 250, 2, 7]])
    with torch.inference_mode():
        torch.testing.assert_close(read(ids).logits, model(ids).logits, atol=1e-6, rtol=1e-5)
    assert {name: tensor.shape for name, tensor in read.state_dict().items()} == {
        name: tensor.shape for name, tensor in model.state_dict().items()
    }


@pytest.mark.parametrize("head_size", [8, 16])
def test_the_file_computes_the_same_by_the_rules_of_llama_cpp(small_llama, tmp_path, head_size):
    """The file's own lengths, shapes and rotation give the model's logits, without transformers reading it."""
    config = LlamaConfig.from_pretrained(small_llama, head_dim=head_size)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    folder = saved(small_llama, tmp_path / "model", torch.float32)
    model.save_pretrained(folder)
    write_gguf(folder, tmp_path / "model.gguf", "my-model")
    ids = [5, 9, 11, 250, 2, 7]
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0].double()
    torch.testing.assert_close(computed(GGUFReader(tmp_path / "model.gguf"), ids), expected, atol=1e-5, rtol=1e-4)


def computed(reader, ids):
    """Logits `(tokens, vocabulary)` of a file of the architecture llama, in float64."""
    fields = {name.removeprefix("llama."): field.contents() for name, field in reader.fields.items()}
    weights = {t.name.removesuffix(".weight"): torch.from_numpy(t.data.copy()).double() for t in reader.tensors}
    heads, groups = fields["attention.head_count"], fields["attention.head_count_kv"]
    # As in llama.cpp: without the key, a head has the hidden size divided by the heads.
    size = fields.get("attention.key_length", fields["embedding_length"] // heads)
    angles = torch.outer(
        torch.arange(len(ids)).double(),
        fields["rope.freq_base"] ** (-torch.arange(0, fields["rope.dimension_count"], 2).double() / size),
    )

    def norm(x, name):
        return (
            x * (x.pow(2).mean(-1, keepdim=True) + fields["attention.layer_norm_rms_epsilon"]).rsqrt() * weights[name]
        )

    def rotated(x):
        # Neighbouring dimensions are a pair.
        even, odd = x[..., ::2], x[..., 1::2]
        return torch.stack(
            [even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos()], -1
        ).flatten(-2)

    def split(x, count):
        return x.view(len(ids), count, size).transpose(0, 1)

    hidden = weights["token_embd"][ids]
    for layer in range(fields["block_count"]):
        block = f"blk.{layer}"
        x = norm(hidden, f"{block}.attn_norm")
        query = rotated(split(x @ weights[f"{block}.attn_q"].T, heads))
        key, value = (split(x @ weights[f"{block}.attn_{part}"].T, groups) for part in "kv")
        key, value = (part.repeat_interleave(heads // groups, dim=0) for part in (rotated(key), value))
        scores = query @ key.transpose(1, 2) / size**0.5 + torch.full((len(ids),) * 2, -torch.inf).triu(1)
        attended = (scores.softmax(-1) @ value).transpose(0, 1).flatten(1)
        hidden = hidden + attended @ weights[f"{block}.attn_output"].T
        x = norm(hidden, f"{block}.ffn_norm")
        gated = torch.nn.functional.silu(x @ weights[f"{block}.ffn_gate"].T) * (x @ weights[f"{block}.ffn_up"].T)
        hidden = hidden + gated @ weights[f"{block}.ffn_down"].T
    return norm(hidden, "output_norm") @ weights.get("output", weights["token_embd"]).T


def test_tokenizer_and_template_are_written(small_llama, tmp_path):
    folder = saved(small_llama, tmp_path / "model", torch.float32)
    write_gguf(folder, tmp_path / "model.gguf", "my-model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    read = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert read(TEXT, add_special_tokens=False)["input_ids"] == tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert read.chat_template == TEMPLATE
    fields = {name: field.contents() for name, field in GGUFReader(tmp_path / "model.gguf").fields.items()}
    assert fields["general.architecture"] == "llama"
    assert fields["general.name"] == "my-model"
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    # The end token must be a control token: llama.cpp prints other tokens.
    assert fields["tokenizer.ggml.token_type"][tokenizer.eos_token_id] == 3
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert len(fields["tokenizer.ggml.tokens"]) == fields["llama.vocab_size"]


def test_tied_embedding_is_written_once(tiny_model, tmp_path):
    folder = saved(tiny_model, tmp_path / "model", torch.float32)
    write_gguf(folder, tmp_path / "model.gguf", "tiny")
    names = [tensor.name for tensor in GGUFReader(tmp_path / "model.gguf").tensors]
    assert "token_embd.weight" in names
    assert "output.weight" not in names


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rotary positions are scaled"),
        ({"attention_bias": True}, "its layers have biases"),
        ({"hidden_act": "gelu"}, "its activation is gelu"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_llamas_are_refused(small_llama, tmp_path, changes, words):
    folder = saved(small_llama, tmp_path / "model", torch.float32, **changes)
    with pytest.raises(RequestError, match=words):
        write_gguf(folder, tmp_path / "model.gguf", "my-model")
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_other_architectures_are_refused(base_model, tmp_path):
    with pytest.raises(
        RequestError,
        match="it is a gpt2, and only plain models of the types llama, mistral, qwen2, qwen3 are supported",
    ):
        write_gguf(saved(base_model, tmp_path / "model", torch.float32), tmp_path / "model.gguf", "my-model")


def test_an_unknown_pre_tokenizer_is_refused(small_llama, tmp_path):
    folder = saved(small_llama, tmp_path / "model", torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save_pretrained(folder)
    with pytest.raises(RequestError, match="has the normalizer null and the pre-tokenizer .*Whitespace"):
        write_gguf(folder, tmp_path / "model.gguf", "my-model")


def test_a_tokenizer_with_a_normalizer_is_refused(small_llama, tmp_path):
    folder = saved(small_llama, tmp_path / "model", torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save_pretrained(folder)
    with pytest.raises(RequestError, match="has the normalizer .*Lowercase"):
        write_gguf(folder, tmp_path / "model.gguf", "my-model")


def words(digits):
    """The regular expression of Llama 3 and of Qwen, with the digits that stay together."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


@pytest.mark.parametrize(
    ("config", "shape", "digits", "pre"),
    [
        (LlamaConfig, {}, "{1,3}", "llama-bpe"),
        (MistralConfig, {"sliding_window": None}, "{1,3}", "llama-bpe"),
        (Qwen2Config, {"tie_word_embeddings": True}, "", "qwen2"),
        (Qwen3Config, {"head_dim": 128}, "", "qwen2"),
    ],
)
def test_other_architectures_have_the_same_logits_and_tokens(config, shape, digits, pre, tmp_path):
    source = write_model(tmp_path / "source", Kind(config, SIZES | shape))
    folder = saved(source, tmp_path / "model", torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    split = pre_tokenizers.Split(Regex(words(digits)), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    if pre == "qwen2":
        tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    tokenizer.save_pretrained(folder)
    write_gguf(folder, tmp_path / "model.gguf", "my-model")
    fields = {name: field.contents() for name, field in GGUFReader(tmp_path / "model.gguf").fields.items()}
    assert fields["tokenizer.ggml.pre"] == pre
    if "head_dim" in shape:
        assert fields["qwen3.attention.key_length"] == fields["qwen3.attention.value_length"] == 128
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([[5, 9, 11, 250, 2, 7]])
    with torch.inference_mode():
        torch.testing.assert_close(read(ids).logits, model(ids).logits, atol=1e-6, rtol=1e-5)


def test_the_scaling_of_llama_31_is_that_of_transformers(small_llama, tmp_path):
    scaling = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 400,
    }  # fmt: skip
    folder = saved(
        small_llama, tmp_path / "model", torch.float32, rope_parameters=scaling, max_position_embeddings=3200
    )
    write_gguf(folder, tmp_path / "model.gguf", "my-model")
    factors = next(t.data for t in GGUFReader(tmp_path / "model.gguf").tensors if t.name == "rope_freqs.weight")
    config = AutoConfig.from_pretrained(folder)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    width = config.hidden_size // config.num_attention_heads
    plain = 500000.0 ** -(torch.arange(0, width, 2) / width)
    torch.testing.assert_close(plain / torch.tensor(factors), scaled)
    assert len(set(factors.tolist())) > 2


def test_a_window_is_refused_without_weights(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(write_model(tmp_path / "model", "mistral"))
    with pytest.raises(RequestError, match="its attention has a window of 16 tokens"):
        check_gguf(AutoConfig.from_pretrained(tmp_path / "model"), tokenizer)


def test_every_end_token_is_written(small_llama, tmp_path, caplog):
    folder = saved(small_llama, tmp_path / "model", torch.float32)
    end = AutoTokenizer.from_pretrained(folder).eos_token_id
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, 7, 8, 9]}))
    write_gguf(folder, tmp_path / "model.gguf", "my-model")
    fields = {name: field.contents() for name, field in GGUFReader(tmp_path / "model.gguf").fields.items()}
    assert [fields[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot", "eom")] == [end, 7, 8]
    assert "Left out: [9]" in caplog.text
