"""Loads the model to train with transformers and PEFT, or passes the work to `unsloth_policy`."""

from __future__ import annotations

from pathlib import Path

import peft
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import PreTrainedModel

from llm_engineering.models.base_model import load_model
from llm_engineering.models.device import Device
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.training_blocks import LoraConfig, Method, ModelConfig
from llm_engineering.training import unsloth_policy
from llm_engineering.training.unsloth_policy import Loading


def new_policy(
    model: ModelConfig,
    lora: LoraConfig,
    settings: Settings,
    device: Device,
    method: Method = "lora",
    loading: Loading | None = None,
) -> PreTrainedModel | PeftModel:
    """Load the base model with a fresh LoRA adapter (Hu et al. 2021, arXiv:2106.09685).

    A fresh adapter does not change the model's outputs. With method `full`, load only the base model. Only unsloth needs
    `loading`.
    """
    if device.backend == "unsloth":
        assert loading is not None
        return unsloth_policy.new_policy(model, lora, settings, device, method, loading)
    if method == "full":
        return _full_model(model, settings, device)
    policy = get_peft_model(_base(model, settings, device, method), lora_config(lora))
    assert isinstance(policy, PeftModel)
    return policy


def lora_config(lora: LoraConfig) -> peft.LoraConfig:
    """Translate the recipe's adapter block to PEFT's config."""
    return peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=lora.target_modules,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        task_type="CAUSAL_LM",
    )


def trained_policy(
    model: ModelConfig,
    trained: Path,
    settings: Settings,
    device: Device,
    method: Method = "lora",
    loading: Loading | None = None,
) -> PreTrainedModel | PeftModel:
    """Load a trained model to train it further: the base model with its adapter, or the full model.

    Args:
        trained: folder of the adapter, or of the full model.
        loading: only unsloth needs it.
    """
    if device.backend == "unsloth":
        assert loading is not None
        return unsloth_policy.trained_policy(model, trained, settings, device, method, loading)
    if method == "full":
        folder = ModelConfig(name_or_path=str(trained), trust_remote_code=model.trust_remote_code)
        return _full_model(folder, settings, device)
    return PeftModel.from_pretrained(_base(model, settings, device, method), str(trained), is_trainable=True)


def save_policy(
    policy: PreTrainedModel | PeftModel,
    model: ModelConfig,
    folder: Path,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write an adapter or a full model as safetensors.

    The adapter's config names the base model as the recipe does, not by a path of this machine.

    Args:
        weights: the gathered weights, if `policy` has only a shard of them.
    """
    if not isinstance(policy, PeftModel):
        policy.save_pretrained(str(folder), state_dict=weights)
        return
    policy.peft_config["default"].base_model_name_or_path = model.name_or_path
    policy.peft_config["default"].revision = model.revision
    policy.save_pretrained(str(folder), selected_adapters=["default"], state_dict=weights)
    # PEFT writes a model card that is only an empty template.
    (folder / "README.md").unlink(missing_ok=True)


def _base(model: ModelConfig, settings: Settings, device: Device, method: Method) -> PreTrainedModel:
    base = load_model(model, settings, device, four_bits=method == "qlora")
    # The trainer turns gradient checkpointing on, if the recipe says so.
    return prepare_model_for_kbit_training(base, use_gradient_checkpointing=False) if method == "qlora" else base


def _full_model(model: ModelConfig, settings: Settings, device: Device) -> PreTrainedModel:
    # Half-precision weights would lose updates smaller than their last bit. Autocast computes in half precision.
    return load_model(model, settings, device._replace(dtype=torch.float32))
