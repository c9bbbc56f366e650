"""Loads the model to train with unsloth, which has its own kernels for adapters, norms and the loss.

This module does not import unsloth. unsloth patches transformers, PEFT and TRL, so
`llm_engineering.models.device.import_backend` must have imported it before them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import peft
from transformers import PreTrainedModel

from llm_engineering.errors import RequestError, WorkError
from llm_engineering.models.base_model import hub_revision, mend_generation_config, model_path
from llm_engineering.models.device import Device
from llm_engineering.recipe.model_blocks import LoraConfig, Method, ModelConfig
from llm_engineering.recipe.settings import Settings
from llm_engineering.training.losses import row_lengths

# unsloth passes the starts of packed rows to the decoders of these types. Other types run transformers' forward.
FAST_MODELS = ("gemma", "gemma2", "llama", "mistral", "qwen2", "qwen3")
_ADAPTER_ARGUMENTS = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora")


class Loading(NamedTuple):
    """Settings that unsloth needs when it loads a model. With transformers, the trainer gets them later."""

    max_length: int
    gradient_checkpointing: bool
    seed: int


def load_policy(
    model: ModelConfig,
    start: Path | None,
    lora: LoraConfig,
    settings: Settings,
    device: Device,
    method: Method,
    loading: Loading,
) -> PreTrainedModel | peft.PeftModel:
    """Load the base model with an adapter, or with method `full` the model alone.

    A trained adapter is made afresh in the same shape, and gets the trained weights. unsloth's own loader would search
    for the base model by the name in the adapter's config, which is the recipe's name and not always a path.

    Args:
        start: folder of an adapter, or of a full model, that either backend trained; None for a fresh adapter.

    Raises:
        WorkError: the adapter and the model have different weights.
    """
    if method == "full" and start is not None:
        model = model.saved_in(start)
    base = _base(model, settings, device, method, loading)
    if method == "full":
        return base
    if start is None:
        return _with_adapter(base, lora.model_dump(include=set(_ADAPTER_ARGUMENTS)), loading)
    saved = json.loads((start / "adapter_config.json").read_text(encoding="utf-8"))
    policy = _with_adapter(base, {name: saved[name] for name in _ADAPTER_ARGUMENTS}, loading)
    outcome: Any = peft.set_peft_model_state_dict(policy, peft.load_peft_weights(str(start), device=device.name))
    wrong = [key for key in outcome.missing_keys if "lora_" in key] + list(outcome.unexpected_keys)
    if wrong:
        raise WorkError(
            f"The adapter {start} does not fit the model that unsloth built: {len(wrong)} weights are in only one of "
            f"them, for example {wrong[0]}. Use --set compute.backend=transformers."
        )
    return policy


def check_packable(model_type: str, stage: str) -> None:
    """Raise a RequestError if unsloth would let packed rows of this model type attend to each other."""
    if model_type not in FAST_MODELS:
        raise RequestError(
            f"compute.backend is unsloth and {stage}.packing is true, but unsloth has no packed forward for models of type "
            f"{model_type}. Use --set {stage}.packing=false, or compute.backend=transformers."
        )


def check_packed(batch: Mapping[str, Any]) -> None:
    """Raise a WorkError if a packed batch does not have the lengths of its rows.

    unsloth's attention reads only `packed_seq_lengths`. If it is missing or differs from the position ids, packed rows
    attend to each other, and no error shows it.

    Args:
        batch: `position_ids` has the shape `(1, tokens)`, and starts again at 0 for each row.
    """
    lengths = row_lengths(batch["position_ids"]) if "position_ids" in batch else []
    packed_lengths = batch.get("packed_seq_lengths")
    if packed_lengths is None or packed_lengths.tolist() != lengths:
        raise WorkError(
            "unsloth's batches do not have the lengths of the packed rows, so the rows would see each other. Use --set "
            "sft.packing=false, or --set compute.backend=transformers."
        )


def _base(model: ModelConfig, settings: Settings, device: Device, method: Method, loading: Loading) -> PreTrainedModel:
    token = settings.hf_token
    loaded, _ = _fast_language_model().from_pretrained(
        model_name=model_path(model, settings),
        revision=hub_revision(model),
        # unsloth would replace the model by its own quantised copy, which has other revisions than the recipe's.
        use_exact_model_name=True,
        trust_remote_code=model.trust_remote_code,
        token=token.get_secret_value() if token else None,
        max_seq_length=loading.max_length,
        dtype=device.dtype,
        load_in_4bit=method == "qlora",
        full_finetuning=method == "full",
        # Half-precision weights would lose updates smaller than their last bit.
        float32_mixed_precision=True if method == "full" else None,
        use_gradient_checkpointing="unsloth" if loading.gradient_checkpointing else False,
        random_state=loading.seed,
        # The tokenizer is loaded elsewhere. A pad token that unsloth adds would enlarge the embedding.
        fix_tokenizer=False,
    )
    assert isinstance(loaded, PreTrainedModel)
    mend_generation_config(loaded, model.name_or_path)
    return loaded


def _with_adapter(base: PreTrainedModel, arguments: Mapping[str, Any], loading: Loading) -> peft.PeftModel:
    policy = _fast_language_model().get_peft_model(
        base,
        **arguments,
        bias="none",
        # With "unsloth", the input of each layer waits in the machine's memory, not the GPU's, for the backward pass.
        use_gradient_checkpointing="unsloth" if loading.gradient_checkpointing else False,
        random_state=loading.seed,
    )
    assert isinstance(policy, peft.PeftModel)
    return policy


def _fast_language_model() -> Any:
    if "unsloth" not in sys.modules:
        raise WorkError(
            "unsloth must be imported before transformers, and this process imported transformers first. Train in a "
            "separate process: python -m llm_engineering.training."
        )
    return sys.modules["unsloth"].FastLanguageModel
