"""llama.cpp reads the GGUF files, and finds the same tokens and probabilities as transformers."""

import importlib.util
import json
import os
import urllib.request

import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    GemmaTokenizer,
    LlamaConfig,
    LlamaTokenizer,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from llm_engineering.publish.exports.gguf import write_gguf
from tests.tiny_models import KINDS, SIZES

# CI always has it. An environment that was built before it was added to the extra `dev` does not, until `make test`.
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None and not os.environ.get("CI"),
    reason="needs xllamacpp (make setup, then pip install -c requirements.lock xllamacpp)",
)

SENTENCES = ["What is the sum of these numbers? It is this.", "It's   the number 1234 of NUMBERS.\n\nThis is it."]
TEXTS = [
    "What is the sum of these 1234567 numbers?\n\tÄ “quoted” 'tis it's   done.",
    " The  spaces ",
    "It\n\n\nis\r\n THIS  \n",
    "naïve 漢字 🦙 ПРИВЕТ мир שלום",
    "isThis HTTPServer /x\n/y",
    "12 of 3",
]
LLAMA_31 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
GEMMA_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(kind, *steps, ignore_merges=False, normalizer=None):
    """A tokenizer of bytes with the tokens and the template of a kind of tiny model."""
    _, _, tokens, template = KINDS[kind]
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=list(tokens), initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    if kind == "llama3":
        begins(tokenizer, tokens[0])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=tokens[0], eos_token=tokens[-1], chat_template=template
    )


def regex(pattern):
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def pieces(*tokens):
    """Vocabulary and merges as in SentencePiece: any two tokens that make up a third one can be merged."""
    letters = sorted(set("".join(SENTENCES)) - {" "})
    # By score. "this" becomes t·h·is, and from the left it would become t·hi·s.
    words = [
        "is",
        "hi",
        "he",
        "▁t",
        "▁the",
        "um",
        "▁▁",
        "▁▁▁",
        "\n\n",
        "▁is",
        "▁s",
        "▁sum",
        "be",
        "ber",
        "12",
        "▁12",
        "34",
        "It",
        "'s",
    ]
    known = [*tokens, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *letters, *words]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(known))}
    splits = [(word[:cut], word[cut:]) for word in dict.fromkeys(words) for cut in range(1, len(word))]
    return {"vocab": vocabulary, "merges": [pair for pair in splits if vocabulary.keys() >= set(pair)]}


def begins(tokenizer, token):
    """Let a tokenizer write a token before each text."""
    special = [(token, tokenizer.token_to_id(token))]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{token} $A", special_tokens=special)


def mistral():
    _, _, tokens, template = KINDS["mistral"]
    tokenizer = LlamaTokenizer(**pieces("<unk>", *tokens), unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["[INST]", "[/INST]"]})
    tokenizer.chat_template = template
    return tokenizer


def old_llama():
    """A tokenizer.json as Llama 2 has it: a space before each part, by a normalizer."""
    tokenizer = Tokenizer(models.BPE(**pieces("<unk>", "<s>", "</s>"), byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    begins(tokenizer, "<s>")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=KINDS["mistral"].template
    )


def gemma():
    _, _, tokens, template = KINDS["gemma3"]
    known = pieces("<pad>", "<unk>", "<mask>", *tokens)
    tokenizer = GemmaTokenizer(**known)
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    tokenizer.add_tokens([AddedToken("\n\n", normalized=False), AddedToken("▁▁", normalized=True)])
    begins(tokenizer.backend_tokenizer, tokens[0])
    tokenizer.chat_template = template
    return tokenizer


class LlamaCpp:
    """llama.cpp's server, on loopback, with a model in float32."""

    def __init__(self, path):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.port = 0
        params.n_ctx, params.n_parallel = 512, 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.warmup = params.fit_params = False
        params.verbosity = -1
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        self.server = xllamacpp.Server(params)

    def post(self, path, **body):
        request = urllib.request.Request(self.server.listening_address + path, json.dumps(body).encode())
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def tokens(self, text):
        return self.post("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]

    def complete(self, ids, **options):
        return self.post("/completion", prompt=ids, temperature=0.0, cache_prompt=False, return_tokens=True, **options)


def write_model(folder, config, shape, tokenizer):
    """Save a model with random weights and its tokenizer in `folder/model`."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config(
            vocab_size=len(tokenizer) + 3,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=None,
            **SIZES | shape,
        )
    )
    for weights in model.parameters():
        # Norms of other sizes than one, and attention that depends on the positions.
        is_norm = weights.dim() == 1
        torch.nn.init.normal_(weights, mean=float(is_norm and config is not Gemma3TextConfig), std=0.2)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return model.eval()


CASES = {
    "llama-3.1": (
        LlamaConfig,
        {"rope_parameters": LLAMA_31, "max_position_embeddings": 512},
        lambda: byte_level("llama3", *regex(WORDS % "{1,3}"), ignore_merges=True),
    ),
    "smollm2": (
        LlamaConfig,
        {"tie_word_embeddings": True},
        lambda: byte_level("qwen3", pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)),
    ),
    "qwen2.5": (Qwen2Config, {}, lambda: byte_level("qwen3", *regex(WORDS % ""), normalizer=normalizers.NFC())),
    "qwen3": (Qwen3Config, {"head_dim": 16}, lambda: byte_level("qwen3", *regex(WORDS % ""))),
    "mistral": (MistralConfig, {"sliding_window": None}, mistral),
    "mistral tekken": (
        MistralConfig,
        {"sliding_window": None, "head_dim": 16},
        lambda: byte_level("mistral", *regex(TEKKEN), ignore_merges=True),
    ),
    "llama 2": (LlamaConfig, {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}, old_llama),
    "gemma 3": (
        Gemma3TextConfig,
        {
            "num_hidden_layers": 7,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 8,
            "rope_parameters": GEMMA_ROPE,
        },
        gemma,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_agrees_with_transformers(case, tmp_path):
    config, shape, make = CASES[case]
    model = write_model(tmp_path, config, shape, make())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    write_gguf(tmp_path / "model", tmp_path / "model.gguf", "tiny")
    llama_cpp = LlamaCpp(tmp_path / "model.gguf")
    for text in TEXTS:
        messages = [
            {"role": "user", "content": text},
            {"role": "assistant", "content": "It is this."},
            {"role": "user", "content": text},
        ]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        expected = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert llama_cpp.tokens(llama_cpp.post("/apply-template", messages=messages)["prompt"]) == expected, text
        # By one rule of transformers, a text outside a conversation begins with a space, which llama.cpp does not know.
        if case != "mistral":
            assert llama_cpp.tokens(text) == tokenizer(text)["input_ids"], text
    # Longer than Gemma's window. Its activation has half precision in llama.cpp.
    ids, size = expected[:40], model.config.vocab_size
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    answer = llama_cpp.complete(ids, n_predict=1, n_probs=size)
    found = {each["id"]: each["logprob"] for each in answer["completion_probabilities"][0]["top_logprobs"]}
    assert len(found) > size / 2
    tolerance = 1e-2 if config is Gemma3TextConfig else 1e-4
    assert found == pytest.approx({index: logits[index].item() for index in found}, abs=tolerance)
    assert answer["tokens"] == [logits.argmax().item()]


def test_llama_cpp_stops_at_every_end_token(tmp_path):
    tokenizer = byte_level("llama3", *regex(WORDS % "{1,3}"), ignore_merges=True)
    write_model(tmp_path, LlamaConfig, {}, tokenizer)
    (tmp_path / "model" / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [tokenizer.eos_token_id, 70, 80]})
    )
    write_gguf(tmp_path / "model", tmp_path / "model.gguf", "tiny")
    llama_cpp = LlamaCpp(tmp_path / "model.gguf")
    for end in (tokenizer.eos_token_id, 70, 80):
        assert llama_cpp.complete([5, 9], n_predict=3, logit_bias=[[end, 1000]])["stop_type"] == "eos"
    assert llama_cpp.complete([5, 9], n_predict=3, logit_bias=[[90, 1000]])["stop_type"] == "limit"
