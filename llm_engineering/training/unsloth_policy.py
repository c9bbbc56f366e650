"""Loads the model that is trained with unsloth, whose kernels replace those of adapters, norms and the loss.

Nothing here imports unsloth: it patches transformers, PEFT and TRL, and so was imported before all of them
(`llm_engineering.models.device.import_backend`), or it is too late.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
from transformers import PreTrainedModel

from llm_engineering.errors import RequestError, WorkError
from llm_engineering.models.device import Device
from llm_engineering.models.loading import hub_revision, model_path
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.training_blocks import LoraConfig, Method, ModelConfig

# Whose decoders unsloth tells where packed rows begin. It loads others with transformers' forward.
FAST_MODELS = ("gemma", "gemma2", "llama", "mistral", "qwen2", "qwen3")
_ADAPTER_ARGUMENTS = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora")


class Loading(NamedTuple):
    """What unsloth has to know when it loads a model; transformers' trainer gets it later."""

    max_length: int
    gradient_checkpointing: bool
    seed: int


def new_policy(
    model: ModelConfig, lora: LoraConfig, settings: Settings, device: Device, method: Method, loading: Loading
) -> PreTrainedModel | peft.PeftModel:
    """The base model with a fresh adapter; with method `full`, the base model itself."""
    base = _base(model, settings, device, method, loading)
    if method == "full":
        return base
    return _with_adapter(base, lora.model_dump(include=set(_ADAPTER_ARGUMENTS)), loading)


def trained_policy(
    model: ModelConfig, trained: Path, settings: Settings, device: Device, method: Method, loading: Loading
) -> PreTrainedModel | peft.PeftModel:
    """What was trained before, by either backend: the base model with the adapter, or the full model of that folder.

    The adapter is made anew in its own shape and filled: unsloth's own way of loading it would look for the base model
    under the name that the recipe has for it.

    Raises:
        WorkError: weights of the adapter have no place in the model, or places no weights.
    """
    if method == "full":
        folder = ModelConfig(name_or_path=str(trained), trust_remote_code=model.trust_remote_code)
        return _base(folder, settings, device, method, loading)
    saved = json.loads((trained / "adapter_config.json").read_text(encoding="utf-8"))
    base = _base(model, settings, device, method, loading)
    policy = _with_adapter(base, {name: saved[name] for name in _ADAPTER_ARGUMENTS}, loading)
    outcome: Any = peft.set_peft_model_state_dict(policy, peft.load_peft_weights(str(trained), device=device.name))
    wrong = [key for key in outcome.missing_keys if "lora_" in key] + list(outcome.unexpected_keys)
    if wrong:
        raise WorkError(
            f"The adapter {trained} does not fit the model that unsloth built: {len(wrong)} weights, {wrong[0]} among "
            "them, are in one of the two alone. Use --set compute.backend=transformers."
        )
    return policy


def check_packable(model_type: str) -> None:
    """Raise a RequestError for a kind of model whose packed rows unsloth would let see each other."""
    if model_type not in FAST_MODELS:
        raise RequestError(
            f"compute.backend is unsloth and sft.packing is true, but unsloth has no packed forward for models of type "
            f"{model_type}. Use --set sft.packing=false, or compute.backend=transformers."
        )


def check_packed(batch: Mapping[str, Any]) -> None:
    """Raise a WorkError unless a packed batch tells unsloth where its rows begin.

    Its attention reads `packed_seq_lengths` alone: without it, or with others than the position ids say, packed rows
    would see each other without a word.

    Args:
        batch: `position_ids` has the shape `(1, tokens)`, and starts again at each row.
    """
    lengths: list[int] = []
    if "position_ids" in batch:
        positions = batch["position_ids"].flatten().cpu()
        starts = torch.nonzero(positions == 0).flatten()
        lengths = torch.diff(starts, append=torch.tensor([len(positions)])).tolist()
    told = batch.get("packed_seq_lengths")
    if told is None or told.tolist() != lengths:
        raise WorkError(
            "unsloth is not told where packed rows begin, so that they would see each other. Use --set "
            "sft.packing=false, or compute.backend=transformers."
        )


def _base(model: ModelConfig, settings: Settings, device: Device, method: Method, loading: Loading) -> PreTrainedModel:
    token = settings.hf_token
    loaded, _ = _fast_language_model().from_pretrained(
        model_name=model_path(model, settings),
        revision=hub_revision(model),
        # Its own copy, quantised before, has other revisions than the recipe's model.
        use_exact_model_name=True,
        trust_remote_code=model.trust_remote_code,
        token=token.get_secret_value() if token else None,
        max_seq_length=loading.max_length,
        dtype=device.dtype,
        load_in_4bit=method == "qlora",
        full_finetuning=method == "full",
        # As with transformers: weights in half precision lose updates smaller than their last bit.
        float32_mixed_precision=True if method == "full" else None,
        use_gradient_checkpointing="unsloth" if loading.gradient_checkpointing else False,
        random_state=loading.seed,
        # The tokenizer is loaded elsewhere; a pad token of unsloth's choice would make the embedding larger.
        fix_tokenizer=False,
    )
    assert isinstance(loaded, PreTrainedModel)
    return loaded


def _with_adapter(base: PreTrainedModel, arguments: Mapping[str, Any], loading: Loading) -> peft.PeftModel:
    policy = _fast_language_model().get_peft_model(
        base,
        **arguments,
        bias="none",
        # Activations between the layers wait in the machine's memory.
        use_gradient_checkpointing="unsloth" if loading.gradient_checkpointing else False,
        random_state=loading.seed,
    )
    assert isinstance(policy, peft.PeftModel)
    return policy


def _fast_language_model() -> Any:
    if "unsloth" not in sys.modules:
        raise WorkError(
            "unsloth has to be imported before transformers, and this process did not: training with it takes a process "
            "of its own, such as `python -m llm_engineering.training` is."
        )
    return sys.modules["unsloth"].FastLanguageModel
