"""Loads the model to train with transformers and PEFT, and saves it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import peft
import torch
from peft import PeftModel, get_peft_model_state_dict, prepare_model_for_kbit_training
from safetensors.torch import save_file
from transformers import AutoTokenizer, PreTrainedModel

from llm_engineering.models.base_model import hub_options, load_model, model_path
from llm_engineering.models.device import Device
from llm_engineering.models.fit import lora_config, train_rows, with_adapter
from llm_engineering.models.new_tokens import add_new_tokens
from llm_engineering.recipe.model_blocks import LoraConfig, Method, ModelConfig
from llm_engineering.recipe.settings import Settings


def new_policy(
    model: ModelConfig,
    lora: LoraConfig,
    settings: Settings,
    device: Device,
    method: Method = "lora",
) -> PreTrainedModel | PeftModel:
    """Load the base model with a fresh LoRA adapter (Hu et al. 2021, arXiv:2106.09685).

    A fresh adapter does not change the model's outputs, except with `init_lora_weights: false`. With method `full`, load
    only the base model.

    Raises:
        RequestError: the adapter does not fit the model.
    """
    if method == "full":
        return full_model(model, None, settings, device)
    config = lora_config(lora)
    base = _base(model, settings, device, method, config.modules_to_save)
    if model.added_tokens:
        tokenizer = AutoTokenizer.from_pretrained(model_path(model, settings), **hub_options(model, settings))
        train_rows(config, base, add_new_tokens(tokenizer, model))
    policy = with_adapter(base, config, lora, model.name_or_path)
    forget_base(policy, model)
    if lora.moves_base_weights:
        remember_start(policy)
    return policy


def remember_start(policy: PeftModel) -> None:
    """Remember the adapter that a part of the base weights was moved into, for `save_policy`.

    It is the same after a restart: it follows from the base weights and the seed.
    """
    weights = get_peft_model_state_dict(policy)
    policy.start_weights = {k: v.clone() for k, v in weights.items() if "lora_" in k}  # type: ignore[assignment]


def in_float32(base: PreTrainedModel, modules: Sequence[str] | None) -> None:
    """Convert the modules that the adapter trains whole (`modules_to_save`) to float32, with their later copies.

    Half-precision weights would lose updates smaller than their last bit. Autocast computes in half precision.
    """
    for name, module in base.named_modules():
        if name.endswith(tuple(modules or ())):
            module.float()


def trained_policy(
    model: ModelConfig, trained: Path, settings: Settings, device: Device, method: Method = "lora"
) -> PreTrainedModel | PeftModel:
    """Load a trained model to train it further: the base model with its adapter, or the full model.

    Args:
        trained: folder of the adapter, or of the full model.
    """
    if method == "full":
        return full_model(model, trained, settings, device)
    saved = peft.LoraConfig.from_pretrained(str(trained))
    base = _base(model, settings, device, method, saved.modules_to_save)
    policy = PeftModel.from_pretrained(base, str(trained), is_trainable=True)
    forget_base(policy, model)
    return policy


def forget_base(policy: PeftModel, model: ModelConfig) -> None:
    """Prevent that checkpoints have the whole embeddings, which PEFT saves if the base model's files have other sizes."""
    if model.added_tokens:
        policy.peft_config["default"].base_model_name_or_path = ""


def save_policy(
    policy: PreTrainedModel | PeftModel,
    model: ModelConfig,
    folder: Path,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write an adapter or a full model as safetensors.

    The adapter's config names the base model as the recipe does, not by a path of this machine. An adapter whose start
    was a part of the base weights is converted, so that it works on the unchanged base model.

    Args:
        weights: the gathered weights, if `policy` has only a shard of them.
    """
    if not isinstance(policy, PeftModel):
        policy.save_pretrained(str(folder), state_dict=weights)
        return
    policy.peft_config["default"].base_model_name_or_path = model.name_or_path
    policy.peft_config["default"].revision = model.revision
    policy.save_pretrained(
        str(folder),
        selected_adapters=["default"],
        state_dict=weights,
        # As in `forget_base`.
        save_embedding_layers=False if model.added_tokens else "auto",
    )
    # PEFT writes a model card that is only an empty template.
    (folder / "README.md").unlink(missing_ok=True)
    if hasattr(policy, "start_weights"):
        _convert(folder, policy.start_weights)
    _sort_sets(folder / peft.utils.CONFIG_NAME)


def _sort_sets(file: Path) -> None:
    """Sort the sets in an adapter's config. PEFT writes them in an order that differs between processes."""
    config = json.loads(file.read_text(encoding="utf-8"))
    for name in ("target_modules", "exclude_modules"):
        if isinstance(config[name], list):
            config[name].sort()
    file.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def _convert(folder: Path, start: dict[str, torch.Tensor]) -> None:
    """Convert a saved adapter to one for the unchanged base model.

    The base weights lost `B0 A0`, so the adapter for the unchanged base is `B A - B0 A0 = [B, -B0] [A; A0]`: it has twice
    the rank. PEFT's own conversion drops `modules_to_save`, and cannot read gathered weights.
    """
    saved = peft.load_peft_weights(str(folder), device="cpu")
    # If an adapter is on the output layer, PEFT saves the layer's base weights too, and here these are the changed ones.
    weights = {name: weight for name, weight in saved.items() if ".base_layer." not in name}
    for name, first in start.items():
        if "lora_A" in name or "lora_embedding_A" in name:
            weights[name] = torch.cat([weights[name], first.cpu()], dim=0)
        elif "lora_B" in name or "lora_embedding_B" in name:
            weights[name] = torch.cat([weights[name], -first.cpu()], dim=1)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = peft.LoraConfig.from_pretrained(str(folder))
    # The scale stays the same: alpha / r, or alpha / sqrt(r).
    factor = math.sqrt(2) if config.use_rslora else 2
    config.init_lora_weights, config.r, config.lora_alpha = True, 2 * config.r, factor * config.lora_alpha
    config.rank_pattern = {name: 2 * rank for name, rank in config.rank_pattern.items()}
    config.alpha_pattern = {name: factor * alpha for name, alpha in config.alpha_pattern.items()}
    config.save_pretrained(str(folder))


def _base(
    model: ModelConfig, settings: Settings, device: Device, method: Method, trained: Sequence[str] | None
) -> PreTrainedModel:
    base = load_model(model, settings, device, four_bits=method == "qlora")
    in_float32(base, trained)
    # The trainer turns gradient checkpointing on, if the recipe says so.
    return prepare_model_for_kbit_training(base, use_gradient_checkpointing=False) if method == "qlora" else base


def full_model(
    model: ModelConfig, trained: Path | None, settings: Settings, device: Device, *, scores: bool = False
) -> PreTrainedModel:
    """Load the base model, or the trained full model of a folder, to train all of its weights."""
    if trained is not None:
        model = model.saved_in(trained)
    # Half-precision weights would lose updates smaller than their last bit. Autocast computes in half precision.
    return load_model(model, settings, device._replace(dtype=torch.float32), scores=scores)
