"""Writes a merged Llama, Mistral, Qwen2, Qwen3 or Gemma 3 (text) as one GGUF file, the format of llama.cpp.

Weights keep their precision; llama.cpp's own tools can quantize the file. Metadata and the order of rows follow the
specification (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). Tensor names come from llama.cpp's package
`gguf`.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from llm_engineering.errors import RequestError
from llm_engineering.models.tokenizer import end_token_ids
from llm_engineering.publish.gguf_tokenizer import add_tokenizer, tokenizer_kind

logger = logging.getLogger(__name__)

# By transformers' `model_type`. Mistral is a Llama for llama.cpp.
_ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
}
_TYPES = {
    torch.float32: (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    torch.float16: (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    torch.bfloat16: (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
}


def check_gguf(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a RequestError if this kind of model or tokenizer cannot be written. Needs no weights."""
    _check(config)
    tokenizer_kind(tokenizer)


def write_gguf(folder: Path, output: Path, name: str) -> None:
    """Write a model in `transformers` layout, with its tokenizer and chat template, to a new file.

    Raises:
        RequestError: this kind of model or tokenizer is not supported here, or the file cannot be written.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    _check(model.config)
    kind = tokenizer_kind(tokenizer)
    partial = output.with_name(f".{output.name}.partial")
    try:
        writer = gguf.GGUFWriter(partial, gguf.MODEL_ARCH_NAMES[_ARCHITECTURES[model.config.model_type]])
        _add_model(writer, model.config, name, _TYPES[model.dtype][1])
        add_tokenizer(writer, tokenizer, kind, model.config.vocab_size)
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
    is_gemma = config.model_type == "gemma3_text"
    rope = _rope(config)
    kind = rope.get("rope_type", "default")
    activation = getattr(config, "hidden_activation" if is_gemma else "hidden_act", "silu")
    windows = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    for is_unsupported, reason in (
        (config.model_type not in _ARCHITECTURES, f"it is a {config.model_type}"),
        (kind not in ("default", "linear", "llama3"), f"its rotary positions are scaled ({kind})"),
        (rope.get("partial_rotary_factor", 1) != 1, "its rotary positions turn a part of each head"),
        (windows and not is_gemma, f"its attention has a window of {windows} tokens"),
        (getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False), "its layers have biases"),
        (activation != ("gelu_pytorch_tanh" if is_gemma else "silu"), f"its activation is {activation}"),
        (
            is_gemma and not _is_plain_gemma(config),
            "it differs from Gemma 3 in its windows, or in how it scales scores",
        ),
    ):
        if is_unsupported:
            raise RequestError(
                f"This model cannot be written as GGUF here: {reason}, and only plain models of the types "
                f"{', '.join(_ARCHITECTURES)} are supported. Export it as safetensors and convert it with llama.cpp's convert_hf_to_gguf.py."
            )


def _is_plain_gemma(config: Any) -> bool:
    """Whether the model has all that llama.cpp takes for granted in a Gemma 3."""
    layers = ["sliding_attention" if (layer + 1) % 6 else "full_attention" for layer in range(config.num_hidden_layers)]
    within = config.rope_parameters["sliding_attention"]
    # llama.cpp knows the model of 27B by its 62 layers.
    scale = config.hidden_size // config.num_attention_heads if len(layers) == 62 else config.head_dim
    return (
        config.layer_types == layers
        and (within["rope_type"], within["rope_theta"]) == ("default", 10_000)
        and config.query_pre_attn_scalar == scale
        and not (config.attn_logit_softcapping or config.final_logit_softcapping or config.use_bidirectional_attention)
    )


def _rope(config: PreTrainedConfig) -> dict[str, Any]:
    """Parameters of the rotary positions; of Gemma 3, those of the layers without a window."""
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    return rope.get("full_attention") or rope


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
    rope = _rope(config)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if config.model_type == "gemma3_text":
        writer.add_sliding_window(config.sliding_window)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _head_width(config: PreTrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _rope_factors(config: PreTrainedConfig) -> torch.Tensor:
    """The divisor of each rotary frequency with Llama 3.1's scaling, as llama.cpp reads it: `(head width / 2,)`."""
    rope = _rope(config)
    width, factor, low, high = _head_width(config), rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    frequencies: torch.Tensor = rope["rope_theta"] ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    # The share of its former speed that a frequency keeps: all above `high` turns within the former context, none below `low`.
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    kept: torch.Tensor = ((turns - low) / (high - low)).clamp(0, 1)
    factors: torch.Tensor = 1 / ((1 - kept) / factor + kept)
    return factors.float()


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
    if _rope(config)["rope_type"] == "llama3":
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
        if architecture == gguf.MODEL_ARCH.GEMMA3 and name.endswith("norm.weight"):
            # Gemma multiplies with 1 + weight, and GGUF's reader with the weight.
            values = values + 1
        # Vectors (the norms) stay in float32: llama.cpp needs them in that precision.
        stored = kind if values.dim() > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(written, gguf.quants.quantize(values.numpy(), stored), raw_dtype=stored)
