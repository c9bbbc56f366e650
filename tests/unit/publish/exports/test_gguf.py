"""What GGUF files contain, and which models are refused. test_gguf_llama_cpp.py reads the files with llama.cpp."""

import contextlib
import json

import pytest
import torch
from gguf import GGUFReader
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Gemma3TextConfig, PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llm_engineering.errors import RequestError
from llm_engineering.publish.exports import llama_cpp
from llm_engineering.publish.exports.gguf import check_gguf, write_gguf
from llm_engineering.publish.exports.gguf_tokenizer import tokenizer_kind
from tests.tiny_models import SIZES, write_model

TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
TEXT = "What is the sum of these 12 numbers?\n\tÄ “quoted” 'tis <|endoftext|> it's   done."


@pytest.fixture(autouse=True)
def without_llama_cpp(monkeypatch):
    """Without the extra `gguf`, the project's own writer is used."""
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)


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
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            r"rotary positions are scaled \(dynamic\)",
        ),
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
        match="it is a gpt2, and only plain models of the types llama, mistral, qwen2, qwen3, gemma3_text are supported",
    ):
        write_gguf(saved(base_model, tmp_path / "model", torch.float32), tmp_path / "model.gguf", "my-model")


@pytest.mark.parametrize(
    ("part", "value", "words"),
    [
        ("pre_tokenizer", pre_tokenizers.Whitespace(), "the normalizer null and the pre-tokenizer .*Whitespace"),
        ("normalizer", normalizers.Lowercase(), "the normalizer .*Lowercase"),
        # A byte-level BPE that uses whole words without merging, which llama.cpp does with the words of Llama 3 only.
        ("model", models.BPE(ignore_merges=True), r"the model BPE \(ignore_merges: True\)"),
        ("model", models.WordLevel({"a": 0}), "the model WordLevel"),
    ],
)
def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused(base_model, part, value, words):
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    tokenizer_kind(tokenizer)
    setattr(tokenizer.backend_tokenizer, part, value)
    with pytest.raises(RequestError, match=words):
        tokenizer_kind(tokenizer)


def test_tokens_that_take_the_spaces_around_them_are_refused(base_model):
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    tokenizer.add_tokens([AddedToken("<mask>", lstrip=True)])
    with pytest.raises(RequestError, match="its tokens <mask> take the spaces around them"):
        tokenizer_kind(tokenizer)


ANSWER = "{{ bos_token }}{% for m in messages %}[INST]{{ m.content }}{{ eos_token }}{% endfor %}"
TOKENS = ["<unk>", "<s>", "</s>", "[INST]", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abc", "ab", "bc", "abc"]
MERGES = [("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")]


def sentencepiece(scheme, template=ANSWER, merges=MERGES):
    """A tokenizer like SentencePiece's with a rule that says where a space is put before a text."""
    vocabulary = {token: index for index, token in enumerate(TOKENS)}
    bpe = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    bpe.add_special_tokens(TOKENS[:4])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", chat_template=template)


@pytest.mark.parametrize(("scheme", "has_prefix"), [("always", True), ("first", False), ("never", False)])
def test_spaces_are_put_before_the_parts_of_a_conversation_as_in_transformers(scheme, has_prefix):
    assert tokenizer_kind(sentencepiece(scheme)) == ("llama", "default", has_prefix)


@pytest.mark.parametrize(
    ("scheme", "template"),
    [
        # The first part begins with a space, and the second one, after an end token, does not.
        ("first", ANSWER.removeprefix("{{ bos_token }}[INST]").replace("[INST]", "").removeprefix("{{ bos_token }}")),
        # transformers puts no second space before the first part; llama.cpp would.
        ("always", ANSWER.replace("[INST]{{", "[INST]{{ ' ' if loop.first }}{{")),
    ],
)
def test_a_space_at_the_start_of_some_parts_only_is_refused(scheme, template):
    with pytest.raises(RequestError, match="train with a chat template that begins with the token"):
        tokenizer_kind(sentencepiece(scheme, template))


def test_merges_that_are_not_those_of_sentencepiece_are_refused():
    with pytest.raises(RequestError, match="but no merge of a and bc, and llama.cpp would merge them"):
        tokenizer_kind(sentencepiece("never", merges=MERGES[:3]))


GEMMA = SIZES | {"num_hidden_layers": 6, "head_dim": 16, "query_pre_attn_scalar": 16, "vocab_size": 300}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"layer_types": ["full_attention"] * 6}, "differs from Gemma 3 in its windows"),
        ({"query_pre_attn_scalar": 8}, "how it scales scores"),
        ({"final_logit_softcapping": 30.0}, "how it scales scores"),
        ({"use_bidirectional_attention": True}, "differs from Gemma 3"),
        (
            {"rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 1e6}}},
            "differs from Gemma 3",
        ),
        ({"rope_parameters": {"full_attention": {"rope_type": "dynamic", "factor": 2.0}}}, "are scaled .dynamic"),
        ({"hidden_activation": "gelu"}, "its activation is gelu"),
    ],
)
def test_a_gemma_that_llama_cpp_does_not_know_is_refused(base_model, changes, words):
    config = Gemma3TextConfig(**GEMMA | changes)
    with pytest.raises(RequestError, match=words) if words else contextlib.nullcontext():
        check_gguf(config, AutoTokenizer.from_pretrained(base_model))


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
