"""Writes a merged model as one GGUF file, the format of llama.cpp.

With the extra `gguf`, llama.cpp writes, quantises and answers (`llama_cpp`), and a file that differs too much from the model is
not kept. Without it, `write_gguf` writes a Llama, Mistral, Qwen2, Qwen3 or Gemma 3 (text), whose weights keep their
precision. Metadata and the order of rows follow the specification
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). Tensor names come from llama.cpp's package `gguf`.
"""

from __future__ import annotations

import json
import logging
import math
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llm_engineering.data.rows import Message
from llm_engineering.errors import RequestError
from llm_engineering.evaluation.measures.exam import ExamRow
from llm_engineering.formatting.render import prompt_ids
from llm_engineering.models.base_model import load_model
from llm_engineering.models.tokenizer import end_token_ids, load_tokenizer
from llm_engineering.publish.exports import llama_cpp
from llm_engineering.publish.exports.gguf_tokenizer import add_further_ends, add_tokenizer, refusal, tokenizer_kind
from llm_engineering.publish.merge import merged_device
from llm_engineering.publish.verification import FileCheck, HeldoutRow, compare_files, token_scores
from llm_engineering.recipe.recipe import Recipe
from llm_engineering.recipe.settings import Settings

logger = logging.getLogger(__name__)

# By transformers' `model_type`. Mistral is a Llama for llama.cpp.
_ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
}
# What llama.cpp's adapters do not have, with the values that change nothing. Its converter ignores some of these.
_PLAIN_LORA: dict[str, tuple[Any, ...]] = {
    "method": ("adapter",),
    "peft_type": ("LORA",),
    "use_rslora": (False,),
    "use_dora": (False,),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "fan_in_fan_out": (False,),
    "bias": ("none",),
}
# Architectures whose sliding window llama.cpp ignores.
_WITHOUT_WINDOW = ("llama", "mistral", "mixtral", "phi3", "qwen2", "qwen3", "starcoder2")
_TYPES = {
    torch.float32: (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    torch.float16: (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    torch.bfloat16: (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
}


def check_gguf(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a RequestError if this kind of model or tokenizer cannot be written. Needs no weights."""
    if not llama_cpp.is_installed():
        _refuse_what_our_writer_lacks(config)
        _refuse_what_llama_cpp_miscomputes(config)
        tokenizer_kind(tokenizer)
        return
    _refuse_what_llama_cpp_miscomputes(config)
    with tempfile.TemporaryDirectory(prefix="gguf-") as folder:
        _save(config, folder)
        tokenizer.save_pretrained(folder)
        llama_cpp.run_jobs([llama_cpp.Job(folder, f"{folder}/vocabulary.gguf", "", only_vocabulary=True)])


def _save(config: PreTrainedConfig, folder: str) -> None:
    # The configuration of the embedded model names no class, and models with code of their own are not in the table.
    config.architectures = config.architectures or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.save_pretrained(folder)


def export_lora(adapter: Path, base: PreTrainedConfig, output: Path) -> None:
    """Write a LoRA adapter for GGUF files of its base model.

    Raises:
        RequestError: the folder has no adapter, or llama.cpp has no adapters of this kind.
        WorkError: llama.cpp's converter failed.
    """
    file = adapter / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"method": "full"}
    changed = next((key for key, plain in _PLAIN_LORA.items() if config.get(key, plain[0]) not in plain), None)
    if changed is not None:
        raise RequestError(
            f"This version cannot be written as a GGUF adapter: it was trained with {changed} {json.dumps(config[changed])[:100]}, "
            "which llama.cpp's adapters do not have. Export the merged model: FORMAT=gguf"
        )
    partial = output.with_name(f".{output.name}.partial")
    with tempfile.TemporaryDirectory(prefix="gguf-") as folder:
        _save(base, folder)
        try:
            llama_cpp.convert_lora(adapter, Path(folder), partial)
            partial.rename(output)
        finally:
            partial.unlink(missing_ok=True)


def export_gguf(
    folder: Path,
    output: Path,
    recipe: Recipe,
    quant: str | None,
    rows: Sequence[HeldoutRow],
    exam: Sequence[tuple[ExamRow, bool]],
    max_new_tokens: int,
    settings: Settings,
) -> FileCheck:
    """Write a merged model with llama.cpp, ask the file, and keep it if it loses no more than the recipe allows.

    Args:
        quant: a kind of quantisation, e.g. `Q4_K_M`; None keeps the precision of the weights.
        exam: questions, each with whether the trained model answered it right.
        max_new_tokens: the limit of an answer to them.

    Raises:
        RequestError: llama.cpp's converter does not know the model or its tokenizer.
        WorkError: llama.cpp failed, or the file loses too much. There is no file then.
    """
    source = recipe.model.saved_in(folder)
    device = merged_device(recipe.compute.here)
    model, tokenizer = load_model(source, settings, device).eval(), load_tokenizer(source, settings)
    expected, ends = token_scores(model, rows), end_token_ids(model, tokenizer)
    del model
    # It gets its name when it has passed.
    partial = output.with_name(f".{output.name}.partial")
    job = llama_cpp.Job(
        folder=str(folder),
        output=str(partial),
        name=recipe.name,
        dtype=_TYPES[device.dtype][0].name.lower(),
        quant=quant,
        rows=[(row.input_ids, row.labels) for row in rows],
        prompts=[prompt_ids([Message(role="user", content=row.question)], tokenizer) for row, _ in exam],
        max_new_tokens=max_new_tokens,
        ends=ends,
        repetition_penalty=recipe.evaluation.repetition_penalty,
    )
    try:
        [asked] = llama_cpp.run_jobs([job])
        texts = [str(tokenizer.decode(answer, skip_special_tokens=True)).strip() for answer in asked.answers]
        check = FileCheck(
            quant=quant,
            tensors=Counter(tensor.tensor_type.name for tensor in gguf.GGUFReader(partial).tensors),
            rows=len(rows),
            **compare_files(expected, asked.scores),
            asked=len(exam),
            right=sum(row.is_right(text) for (row, _), text in zip(exam, texts, strict=True)),
            right_before=sum(was_right for _, was_right in exam),
        )
        logger.info("Asked:       %s: %s", output.name, check.sentence)
        check.require(recipe.export)
        partial.rename(output)
    finally:
        for file in (partial, llama_cpp.unquantised(partial)):
            file.unlink(missing_ok=True)
    return check


def write_gguf(folder: Path, output: Path, name: str) -> None:
    """Write a model in `transformers` layout, with its tokenizer and chat template, to a new file.

    Raises:
        RequestError: this kind of model or tokenizer is not supported here, or the file cannot be written.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    _refuse_what_our_writer_lacks(model.config)
    _refuse_what_llama_cpp_miscomputes(model.config)
    kind = tokenizer_kind(tokenizer)
    partial = output.with_name(f".{output.name}.partial")
    try:
        writer = gguf.GGUFWriter(partial, gguf.MODEL_ARCH_NAMES[_ARCHITECTURES[model.config.model_type]])
        _add_model(writer, model.config, name, _TYPES[model.dtype][1])
        add_tokenizer(writer, tokenizer, kind, model.config.vocab_size)
        add_further_ends(writer, end_token_ids(model, tokenizer), tokenizer.eos_token_id)
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


def _refuse_what_our_writer_lacks(config: PreTrainedConfig) -> None:
    is_gemma = config.model_type == "gemma3_text"
    rope = _rope(config)
    kind = rope.get("rope_type", "default")
    activation = getattr(config, "hidden_activation" if is_gemma else "hidden_act", "silu")
    unsupported = (
        (config.model_type not in _ARCHITECTURES, f"it is a {config.model_type}"),
        (kind not in ("default", "linear", "llama3"), f"its rotary positions are scaled ({kind})"),
        (rope.get("partial_rotary_factor", 1) != 1, "its rotary positions turn a part of each head"),
        (getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False), "its layers have biases"),
        (activation != ("gelu_pytorch_tanh" if is_gemma else "silu"), f"its activation is {activation}"),
    )
    for is_so, reason in unsupported:
        if is_so:
            raise refusal(
                f"{reason}, and only plain models of the types {', '.join(_ARCHITECTURES)} are supported without llama.cpp",
                llama_cpp.INSTALL,
            )


def _refuse_what_llama_cpp_miscomputes(config: PreTrainedConfig) -> None:
    """llama.cpp's converter accepts these models, and llama.cpp computes something else."""
    windows = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    reason = None
    if windows and config.model_type in _WITHOUT_WINDOW:
        reason = f"its attention has a window of {windows} tokens"
    elif config.model_type == "gemma3_text" and not _is_plain_gemma(config):
        reason = "it differs from Gemma 3 in its windows, or in how it scales scores"
    if reason is not None:
        raise refusal(f"{reason}, which llama.cpp does not compute", "Export it as safetensors.")


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
