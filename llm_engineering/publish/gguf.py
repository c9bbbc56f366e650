"""Writes a merged Llama as one GGUF file, which llama.cpp and what is built on it load.

Weights keep their precision: smaller ones are made of this file by llama.cpp's own tools. Metadata and the order of rows
follow the specification (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md); the names of tensors are those of
the package `gguf`, which llama.cpp publishes.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from llm_engineering.errors import RequestError

_ARCHITECTURE = gguf.MODEL_ARCH.LLAMA
_TYPES = {
    torch.float32: (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    torch.float16: (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    torch.bfloat16: (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
}
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}
_NO_NORMALIZER = (None, {"type": "Sequence", "normalizers": []})
# llama.cpp cuts texts into words by rules of its own, which it knows by these names.
_PRE_TOKENIZERS = {"gpt-2": [_BYTE_LEVEL], "smollm": [_DIGITS, _BYTE_LEVEL]}


def write_gguf(folder: Path, output: Path, name: str) -> None:
    """Write the model of a folder in `transformers` layout, its tokenizer and chat template, to a new file.

    Raises:
        RequestError: this model or tokenizer cannot be written without guessing, or the file cannot be written.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    _check(model.config)
    words = _word_rules(tokenizer)
    partial = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        writer = gguf.GGUFWriter(partial, gguf.MODEL_ARCH_NAMES[_ARCHITECTURE])
        _add_model(writer, model.config, name, _TYPES[model.dtype][1])
        _add_tokenizer(writer, tokenizer, words, model.config.vocab_size)
        _add_tensors(writer, model)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        partial.rename(output)
    except OSError as error:
        raise RequestError(f"OUTPUT {output} cannot be written: {error.strerror}.") from error
    finally:
        partial.unlink(missing_ok=True)


def _check(config: PreTrainedConfig) -> None:
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    for wrong, what in (
        (config.model_type != "llama", f"it is a {config.model_type}"),
        (rope != "default", f"its rotary positions are scaled ({rope})"),
        (getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False), "its layers have biases"),
        (getattr(config, "hidden_act", "silu") != "silu", f"its activation is {getattr(config, 'hidden_act', None)}"),
    ):
        if wrong:
            raise RequestError(
                f"This model cannot be written as GGUF here: {what}, and only plain Llama models are. Export it as "
                "safetensors and convert it with llama.cpp's convert_hf_to_gguf.py."
            )


def _word_rules(tokenizer: PreTrainedTokenizerBase) -> str:
    """llama.cpp's name for how the tokenizer cuts a text, which it may not have changed before, into words."""
    parts: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    before = parts["pre_tokenizer"] or {}
    steps = before["pretokenizers"] if before.get("type") == "Sequence" else [before]
    steps = [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]
    for name, known in _PRE_TOKENIZERS.items():
        if steps == known and parts["model"]["type"] == "BPE" and parts["normalizer"] in _NO_NORMALIZER:
            return name
    raise RequestError(
        f"This model cannot be written as GGUF here: how its tokenizer changes texts "
        f"({json.dumps(parts['normalizer'])[:200]}) and cuts words ({json.dumps(steps)[:200]}) is none of the ways known "
        f"by name ({', '.join(_PRE_TOKENIZERS)}). Export it as safetensors and convert it with llama.cpp's "
        "convert_hf_to_gguf.py."
    )


def _add_model(writer: gguf.GGUFWriter, config: PreTrainedConfig, name: str, file_type: gguf.LlamaFileType) -> None:
    heads = config.num_attention_heads
    writer.add_name(name)
    writer.add_type("model")
    writer.add_file_type(file_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim or config.hidden_size // heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, words: str, size: int) -> None:
    parts: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = {index: token for token, index in tokenizer.get_vocab().items()}
    added = {token["id"]: token["special"] for token in parts["added_tokens"]}
    kinds = {True: gguf.TokenType.CONTROL, False: gguf.TokenType.USER_DEFINED}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words)
    # The embedding may have more rows than there are tokens.
    writer.add_token_list([tokens.get(index, f"[PAD{index}]") for index in range(size)])
    writer.add_token_types(
        [
            (kinds[added[index]] if index in added else gguf.TokenType.NORMAL)
            if index in tokens
            else gguf.TokenType.UNUSED
            for index in range(size)
        ]
    )
    merges = parts["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    for token_id, add in (
        (tokenizer.bos_token_id, writer.add_bos_token_id),
        (tokenizer.eos_token_id, writer.add_eos_token_id),
        (tokenizer.unk_token_id, writer.add_unk_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
    ):
        if token_id is not None:
            add(token_id)
    # The chat template writes the token that a conversation begins with.
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(tokenizer.chat_template)


def _add_tensors(writer: gguf.GGUFWriter, model: Any) -> None:
    config = model.config
    names = gguf.get_tensor_name_map(_ARCHITECTURE, config.num_hidden_layers)
    kind, _ = _TYPES[model.dtype]
    for name, tensor in model.state_dict().items():
        # Tied: it is the embedding, and a reader takes that.
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        written = names.get_name(name, try_suffixes=(".weight",))
        assert written is not None, name
        values = tensor.float()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            # GGUF's Llama rotates neighbouring dimensions, transformers' those half a head apart.
            values = values.view(heads, 2, -1, values.shape[1]).transpose(1, 2).reshape(values.shape)
        # Vectors, the norms, stay in float32: llama.cpp computes with them in no other precision.
        stored = kind if values.dim() > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(written, gguf.quants.quantize(values.numpy(), stored), raw_dtype=stored)
