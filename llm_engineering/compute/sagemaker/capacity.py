"""Checks of the machines: offered in the region, within the account's quota, and with a disk that is large enough."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches

import peft
import torch
from botocore.session import get_session
from transformers import AutoModelForCausalLM

from llm_engineering.compute.sagemaker.account import Account
from llm_engineering.compute.sagemaker.problems import Problem
from llm_engineering.config import Recipe, SageMakerConfig
from llm_engineering.models import load_config
from llm_engineering.settings import Settings
from llm_engineering.training.policy import lora_config

GIB = 2**30
# Two checkpoints are kept (training/run.py), beside the one that is being written.
_CHECKPOINTS = 3
# Data, caches and what the libraries write.
_BESIDES = 10 * GIB


def type_problems(config: SageMakerConfig, account: Account) -> Iterator[Problem]:
    """Whether SageMaker knows the instance types, and the region has them. EC2's list is the one that can be asked."""
    model = get_session().get_service_model("sagemaker")
    known = model.shape_for("TrainingInstanceType").enum
    for instance_type in _types(config):
        if instance_type not in known:
            near = get_close_matches(instance_type, known, n=3)
            hint = f"perhaps {' or '.join(near)} is meant" if near else "https://aws.amazon.com/sagemaker/pricing/"
            yield Problem(f"SageMaker trains on no {instance_type}", f"Correct compute.sagemaker: {hint}")
    asked = {t.removeprefix("ml."): t for t in _types(config) if t in known}
    offered: set[str] = set()
    if asked:
        pages = account.client("ec2").get_paginator("describe_instance_type_offerings")
        for page in pages.paginate(
            LocationType="region", Filters=[{"Name": "instance-type", "Values": sorted(asked)}]
        ):  # fmt: skip
            offered |= {found["InstanceType"] for found in page["InstanceTypeOfferings"]}
    for name, instance_type in asked.items():
        if name not in offered:
            yield Problem(
                f"{account.region} has no {instance_type}",
                "Choose another compute.sagemaker.instance_type, or a region that has it "
                f"(`aws ec2 describe-instance-type-offerings --filters Name=instance-type,Values={name} --region …`)",
            )


def quota_problems(config: SageMakerConfig, account: Account) -> Iterator[Problem]:
    """Whether the account may use as many machines; of fallback types, too small a quota is a warning."""
    use = "spot training" if config.use_spot else "training"
    names = {instance_type: f"{instance_type} for {use} job usage" for instance_type in _types(config)}
    quotas = _quotas("list_service_quotas", account)
    if not set(names.values()) <= quotas.keys():
        # Of a quota that was never changed there may be the default alone.
        quotas = _quotas("list_aws_default_service_quotas", account) | quotas
    for instance_type, name in names.items():
        is_fallback = instance_type != config.instance_type
        if name not in quotas:
            yield Problem(
                f"There is no quota `{name}` in {account.region}: SageMaker does not train on this type there",
                "Choose another type in compute.sagemaker, or another region",
                is_fallback,
            )
            continue
        value, code = quotas[name]
        if value < config.instance_count:
            yield Problem(
                f"The quota `{name}` is {value:.0f}, and {config.instance_count} are asked for",
                f"`aws service-quotas request-service-quota-increase --service-code sagemaker --quota-code {code} "
                f"--desired-value {config.instance_count} --region {account.region}`; an answer takes minutes to days",
                is_fallback,
            )


def _quotas(operation: str, account: Account) -> dict[str, tuple[float, str]]:
    """SageMaker's quotas: value and code by name."""
    pages = account.client("service-quotas").get_paginator(operation).paginate(ServiceCode="sagemaker")
    return {found["QuotaName"]: (found["Value"], found["QuotaCode"]) for page in pages for found in page["Quotas"]}


def volume_problems(recipe: Recipe, config: SageMakerConfig, settings: Settings) -> Iterator[Problem]:
    """Whether the disk holds model and checkpoints."""
    needed = volume_bytes(recipe, settings)
    if needed > config.volume_size_gb * GIB:
        yield Problem(
            f"compute.sagemaker.volume_size_gb {config.volume_size_gb} is too small: model, checkpoints and results "
            f"take about {needed / GIB:.0f}",
            f"Set it to {-(-int(needed * 1.2) // GIB)} or more",
        )


def volume_bytes(recipe: Recipe, settings: Settings) -> int:
    """Bytes that a job needs on its disk, from the model's config alone.

    The weights as they are published (their number, counted on a model without content, times the bytes of
    `config.dtype`, bfloat16 where it names none); three checkpoints of 12 bytes for each trained weight (float32, with
    AdamW's two moments); the result in float32; and 10 GiB for data and caches.

    Raises:
        OSError, ValueError: the model's config cannot be had.
    """
    config = load_config(recipe.model, settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=recipe.model.trust_remote_code)
        weights: int = sum(parameter.numel() for parameter in model.parameters())
        if recipe.sft.method == "full":
            trained = weights
        else:
            adapted = peft.get_peft_model(model, lora_config(recipe.sft.lora))
            trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    dtype: torch.dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16
    published = weights * dtype.itemsize
    return published + trained * (12 * _CHECKPOINTS + 4) + _BESIDES


def wait_problems(config: SageMakerConfig) -> Iterator[Problem]:
    """Whether the wait for spot machines leaves room for the run."""
    if config.wait_s is not None and config.wait_s < config.max_run_s:
        yield Problem(
            f"compute.sagemaker.max_wait_s {config.wait_s} is less than max_run_s {config.max_run_s}, and counts the "
            "run too: SageMaker refuses that",
            "Raise max_wait_s, or leave it out for twice max_run_s",
        )


def _types(config: SageMakerConfig) -> list[str]:
    return list(dict.fromkeys([config.instance_type, *config.fallback_instance_types]))
