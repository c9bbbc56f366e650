"""Writes a merged Llama, Mistral, Qwen2 or Qwen3 as one GGUF file, the format of llama.cpp.

Weights keep their precision; llama.cpp's own tools can quantize the file. Metadata and the order of rows follow the
specification (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). Tensor names come from llama.cpp's package
`gguf`.
"""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from llm_engineering.errors import RequestError
from llm_engineering.models.tokenizer import end_token_ids

logger = logging.getLogger(__name__)

# By transformers' `model_type`. Mistral is a Llama for llama.cpp.
_ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
_TYPES = {
    torch.float32: (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    torch.float16: (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    torch.bfloat16: (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
}
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}
_NO_NORMALIZER = (None, {"type": "Sequence", "normalizers": []})
_NFC = {"type": "NFC"}
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(digits: str) -> list[dict[str, Any]]:
    """The pre-tokenizer of Llama 3 and Qwen: a regular expression, then bytes. They differ in the digits that stay together."""
    pattern = {"Regex": _WORDS % digits}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    return [split, _BYTE_LEVEL | {"use_regex": False}]


# llama.cpp has its own pre-tokenizers, which a file selects by name. Llama.cpp's qwen2 does not normalize, so a text in NFC
# has the same tokens, and another one may not.
_PRE_TOKENIZERS: dict[str, tuple[list[dict[str, Any]], tuple[Any, ...]]] = {
    "gpt-2": ([_BYTE_LEVEL], _NO_NORMALIZER),
    "smollm": ([_DIGITS, _BYTE_LEVEL], _NO_NORMALIZER),
    "llama-bpe": (_split("{1,3}"), _NO_NORMALIZER),
    "qwen2": (_split(""), (*_NO_NORMALIZER, _NFC)),
}


def check_gguf(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a RequestError if this kind of model or tokenizer cannot be written. Needs no weights."""
    _check(config)
    _pre_tokenizer(tokenizer)


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
        writer = gguf.GGUFWriter(partial, gguf.MODEL_ARCH_NAMES[_ARCHITECTURES[model.config.model_type]])
        _add_model(writer, model.config, name, _TYPES[model.dtype][1])
        _add_tokenizer(writer, tokenizer, pre_tokenizer, model.config.vocab_size)
        _add_further_ends(writer, end_token_ids(model, tokenizer), tokenizer.eos_token_id)
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
    windows = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    for is_unsupported, reason in (
        (config.model_type not in _ARCHITECTURES, f"it is a {config.model_type}"),
        (rope not in ("default", "llama3"), f"its rotary positions are scaled ({rope})"),
        (windows, f"its attention has a window of {windows} tokens"),
        (getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False), "its layers have biases"),
        (getattr(config, "hidden_act", "silu") != "silu", f"its activation is {getattr(config, 'hidden_act', None)}"),
    ):
        if is_unsupported:
            raise RequestError(
                f"This model cannot be written as GGUF here: {reason}, and only plain models of the types "
                f"{', '.join(_ARCHITECTURES)} are supported. Export it as safetensors and convert it with llama.cpp's convert_hf_to_gguf.py."
            )


def _pre_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """llama.cpp's name of the tokenizer's pre-tokenizer. The tokenizer must not normalize texts."""
    parts: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    before = parts["pre_tokenizer"] or {}
    steps = before["pretokenizers"] if before.get("type") == "Sequence" else [before]
    steps = [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]
    for name, (known, normalizers) in _PRE_TOKENIZERS.items():
        if steps == known and parts["model"]["type"] == "BPE" and parts["normalizer"] in normalizers:
            return name
    raise RequestError(
        "This model cannot be written as GGUF here: its tokenizer has the normalizer "
        f"{json.dumps(parts['normalizer'])[:200]} and the pre-tokenizer {json.dumps(steps)[:200]}, but only "
        f"those of {', '.join(_PRE_TOKENIZERS)} are supported. Export it as safetensors and convert it with "
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
    width = _head_width(config)
    writer.add_rope_dimension_count(width)
    # Readers have different defaults: llama.cpp takes hidden size / heads, and transformers 128 for Qwen3.
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _head_width(config: PreTrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _rope_factors(config: PreTrainedConfig) -> torch.Tensor:
    """The divisor of each rotary frequency with Llama 3.1's scaling, as llama.cpp reads it: `(head width / 2,)`."""
    rope = config.rope_parameters
    width, factor, low, high = _head_width(config), rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    frequencies: torch.Tensor = rope["rope_theta"] ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    # The share of its former speed that a frequency keeps: all above `high` turns within the former context, none below `low`.
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    kept: torch.Tensor = ((turns - low) / (high - low)).clamp(0, 1)
    factors: torch.Tensor = 1 / ((1 - kept) / factor + kept)
    return factors.float()


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


def _add_further_ends(writer: gguf.GGUFWriter, ends: list[int], end: int) -> None:
    """Write the end tokens beside the tokenizer's own. The format has a field for the end of a turn and of a message."""
    further = [token for token in ends if token != end]
    for token, add in zip(further, (writer.add_eot_token_id, writer.add_eom_token_id), strict=False):
        add(token)
    if len(further) > 2:
        logger.warning("GGUF has fields for three end tokens, and the model has more. Left out: %s", further[2:])


def _add_tensors(writer: gguf.GGUFWriter, model: Any) -> None:
    config = model.config
    architecture = _ARCHITECTURES[config.model_type]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    if config.rope_parameters.get("rope_type") == "llama3":
        name = gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.ROPE_FREQS] + ".weight"
        writer.add_tensor(name, _rope_factors(config).numpy(), raw_dtype=gguf.GGMLQuantizationType.F32)
    kind, _ = _TYPES[model.dtype]
    for name, tensor in model.state_dict().items():
        # Tied weights: readers use the embedding.
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        written = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert written is not None, name
        values = tensor.float()
        if architecture == gguf.MODEL_ARCH.LLAMA and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            # GGUF's Llama rotates neighbouring dimensions; transformers rotates dimensions half a head apart.
            values = values.view(heads, 2, -1, values.shape[1]).transpose(1, 2).reshape(values.shape)
        # Vectors (the norms) stay in float32: llama.cpp needs them in that precision.
        stored = kind if values.dim() > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(written, gguf.quants.quantize(values.numpy(), stored), raw_dtype=stored)
