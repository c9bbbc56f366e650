"""Loads the model that is trained. A faster backend than transformers would load it here, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import peft
from peft import PeftModel, get_peft_model

from llm_engineering.compute.device import Device
from llm_engineering.config import LoraConfig, ModelConfig
from llm_engineering.models import load_model
from llm_engineering.settings import Settings


def new_policy(model: ModelConfig, lora: LoraConfig, settings: Settings, device: Device) -> PeftModel:
    """The base model with a fresh LoRA adapter (Hu et al. 2021, arXiv:2106.09685), which starts as no change."""
    base = load_model(model, settings, device)
    policy = get_peft_model(
        base,
        peft.LoraConfig(
            r=lora.r,
            lora_alpha=lora.lora_alpha,
            lora_dropout=lora.lora_dropout,
            target_modules=lora.target_modules,
            task_type="CAUSAL_LM",
        ),
    )
    assert isinstance(policy, PeftModel)
    return policy


def trained_policy(model: ModelConfig, adapter: Path, settings: Settings, device: Device) -> PeftModel:
    """The base model with an adapter that was trained before, to be trained on."""
    return PeftModel.from_pretrained(load_model(model, settings, device), str(adapter), is_trainable=True)


def save_adapter(policy: PeftModel, model: ModelConfig, folder: Path) -> None:
    """Write the adapter as safetensors; it names its base model as the recipe does, not by a path of this machine."""
    policy.peft_config["default"].base_model_name_or_path = model.name_or_path
    policy.peft_config["default"].revision = model.revision
    policy.save_pretrained(str(folder), selected_adapters=["default"])
    # PEFT's template of a model card says nothing about this model.
    (folder / "README.md").unlink(missing_ok=True)
