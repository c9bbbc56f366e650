"""Writes a merged Llama as one GGUF file, the format of llama.cpp.

Weights keep their precision; llama.cpp's own tools can quantize the file. Metadata and the order of rows follow the
specification (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). Tensor names come from llama.cpp's package
`gguf`.
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
# llama.cpp has its own pre-tokenizers, which a file selects by name.
_PRE_TOKENIZERS = {"gpt-2": [_BYTE_LEVEL], "smollm": [_DIGITS, _BYTE_LEVEL]}


def write_gguf(folder: Path, output: Path, name: str) -> None:
    """Write a model in `transformers` layout, with its tokenizer and chat template, to a new file.

    Raises:
        RequestError: this kind of model or tokenizer is not supported here, or the file cannot be written.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    _check(model.config)
    pre_tokenizer = _pre_tokenizer(tokenizer)
    partial = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        writer = gguf.GGUFWriter(partial, gguf.MODEL_ARCH_NAMES[_ARCHITECTURE])
        _add_model(writer, model.config, name, _TYPES[model.dtype][1])
        _add_tokenizer(writer, tokenizer, pre_tokenizer, model.config.vocab_size)
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
    for is_unsupported, reason in (
        (config.model_type != "llama", f"it is a {config.model_type}"),
        (rope != "default", f"its rotary positions are scaled ({rope})"),
        (getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False), "its layers have biases"),
        (getattr(config, "hidden_act", "silu") != "silu", f"its activation is {getattr(config, 'hidden_act', None)}"),
    ):
        if is_unsupported:
            raise RequestError(
                f"This model cannot be written as GGUF here: {reason}, and only plain Llama models are supported. Export it "
                "as safetensors and convert it with llama.cpp's convert_hf_to_gguf.py."
            )


def _pre_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """llama.cpp's name of the tokenizer's pre-tokenizer. The tokenizer must not normalize texts."""
    parts: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    before = parts["pre_tokenizer"] or {}
    steps = before["pretokenizers"] if before.get("type") == "Sequence" else [before]
    steps = [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]
    for name, known in _PRE_TOKENIZERS.items():
        if steps == known and parts["model"]["type"] == "BPE" and parts["normalizer"] in _NO_NORMALIZER:
            return name
    raise RequestError(
        "This model cannot be written as GGUF here: its tokenizer has the normalizer "
        f"{json.dumps(parts['normalizer'])[:200]} and the pre-tokenizer {json.dumps(steps)[:200]}, but only "
        f"{' and '.join(_PRE_TOKENIZERS)} without a normalizer are supported. Export it as safetensors and convert it with "
        "llama.cpp's convert_hf_to_gguf.py."
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
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    # llama.cpp's default for both lengths is hidden size / heads.
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, pre_tokenizer: str, size: int) -> None:
    parts: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = {index: token for token, index in tokenizer.get_vocab().items()}
    added = {token["id"]: token["special"] for token in parts["added_tokens"]}
    kinds = {True: gguf.TokenType.CONTROL, False: gguf.TokenType.USER_DEFINED}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
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
    # The chat template itself writes the first token of a conversation.
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(tokenizer.chat_template)


def _add_tensors(writer: gguf.GGUFWriter, model: Any) -> None:
    config = model.config
    names = gguf.get_tensor_name_map(_ARCHITECTURE, config.num_hidden_layers)
    kind, _ = _TYPES[model.dtype]
    for name, tensor in model.state_dict().items():
        # Tied weights: readers use the embedding.
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        written = names.get_name(name, try_suffixes=(".weight",))
        assert written is not None, name
        values = tensor.float()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            # GGUF's Llama rotates neighbouring dimensions; transformers rotates dimensions half a head apart.
            values = values.view(heads, 2, -1, values.shape[1]).transpose(1, 2).reshape(values.shape)
        # Vectors (the norms) stay in float32: llama.cpp needs them in that precision.
        stored = kind if values.dim() > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(written, gguf.quants.quantize(values.numpy(), stored), raw_dtype=stored)
