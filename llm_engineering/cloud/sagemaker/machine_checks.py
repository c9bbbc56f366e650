"""Checks that the recipe's instance types exist, have a quota, and have enough disk space for the job."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import partial

from llm_engineering.cloud.sagemaker.account import Account, botocore_session
from llm_engineering.cloud.sagemaker.problems import Problem, run_check
from llm_engineering.cloud.sagemaker.request import Machine, machines
from llm_engineering.recipe.compute_blocks import SageMakerConfig
from llm_engineering.recipe.recipe import Recipe
from llm_engineering.recipe.settings import Settings

_GIB = 2**30
# The quota for `max_run_s`, in seconds.
_LONGEST_RUN = "Longest run time for a training job"
# training/train.py keeps two checkpoints while it writes a third.
_CHECKPOINTS = 3
# Disk space for data, caches and the libraries' own files.
_OTHER_BYTES = 10 * _GIB


def machine_problems(recipe: Recipe, config: SageMakerConfig, account: Account, settings: Settings) -> list[Problem]:
    """Check the recipe's machines. A machine that cannot start is only a warning if another one can."""
    known, found = botocore_session().get_service_model("sagemaker").shape_for("TrainingInstanceType").enum, []
    for instance_type in dict.fromkeys(machine.instance_type for machine in machines(config)):
        if instance_type not in known:
            near = get_close_matches(instance_type, known, n=3)
            hint = f"perhaps {' or '.join(near)} is meant" if near else "https://aws.amazon.com/sagemaker/pricing/"
            what = f"SageMaker trains on no {instance_type}"
            found.append(Problem(what, f"Correct compute.sagemaker: {hint}"))
    asked = [machine for machine in machines(config) if machine.instance_type in known]
    if not asked:
        return found
    # The machines that cannot start, filled by the checks.
    refused: set[Machine] = set()
    unavailable = [
        *run_check(f"The instance types in {account.region}", partial(_offer_problems, asked, account, refused)),
        *(
            # The capacity of a training plan is reserved already.
            []
            if config.training_plan_arn
            else run_check("The service quota", partial(_quota_problems, asked, config, account, refused))
        ),
    ]
    if refused != set(asked):
        unavailable = [problem._replace(is_warning=True) for problem in unavailable]
    disks = partial(_disk_problems, recipe, config, asked, account, settings)
    return [*found, *unavailable, *run_check("The disk space of the instance types", disks)]


def _offer_problems(asked: Sequence[Machine], account: Account, refused: set[Machine]) -> Iterator[Problem]:
    """Check that EC2 lists the instance types for the region; adds machines that it does not list to `refused`.

    SageMaker does not list the types of a region. EC2 lists them, without the prefix `ml.`.
    """
    names = sorted({machine.instance_type.removeprefix("ml.") for machine in asked})
    pages = account.client("ec2").get_paginator("describe_instance_type_offerings")
    filters = [{"Name": "instance-type", "Values": names}]
    offered = {
        offering["InstanceType"]
        for page in pages.paginate(LocationType="region", Filters=filters)
        for offering in page["InstanceTypeOfferings"]
    }
    for name in names:
        if name not in offered:
            refused.update(machine for machine in asked if machine.instance_type == f"ml.{name}")
            yield Problem(
                f"{account.region} has no ml.{name}",
                "Choose another type in compute.sagemaker, or a region that has it "
                f"(`aws ec2 describe-instance-type-offerings --filters Name=instance-type,Values={name} --region …`)",
            )


def _quota_problems(
    asked: Sequence[Machine], config: SageMakerConfig, account: Account, refused: set[Machine]
) -> Iterator[Problem]:
    """Check that the quotas allow `max_run_s` and the number of machines of each kind; adds machines without quota to `refused`."""
    count = config.instance_count
    names = [(f"{m.instance_type} for {'spot ' if m.spot else ''}training job usage", m) for m in asked]
    if config.keep_alive_s is not None:
        names += [(f"{m.instance_type} for training warm pool usage", m) for m in asked]
    wanted = dict.fromkeys((name for name, _ in names), count) | {_LONGEST_RUN: config.max_run_s}
    names += [(_LONGEST_RUN, m) for m in asked]
    for name, problem in small_quotas(wanted, account):
        refused.update(machine for quota, machine in names if quota == name)
        yield problem


def small_quotas(wanted: Mapping[str, int], account: Account) -> Iterator[tuple[str, Problem]]:
    """The quotas that are less than the wanted value, each with the problem."""
    quotas = _quotas("list_service_quotas", account)
    if not wanted.keys() <= quotas.keys():
        # A quota that was never changed may be listed only among the default quotas.
        quotas = _quotas("list_aws_default_service_quotas", account) | quotas
    for name, count in wanted.items():
        if name == _LONGEST_RUN and name not in quotas:
            continue
        if name not in quotas:
            yield (
                name,
                Problem(
                    f"There is no quota `{name}` in {account.region}: SageMaker does not offer this type for this use there",
                    "Choose another type, or another region",
                ),
            )
            continue
        value, code = quotas[name]
        if value < count:
            yield (
                name,
                Problem(
                    f"The quota `{name}` is {value:.0f}, but the recipe asks for {count}",
                    f"Run `aws service-quotas request-service-quota-increase --service-code sagemaker --quota-code {code} "
                    f"--desired-value {count} --region {account.region}`; Amazon answers in minutes to days",
                ),
            )


def _quotas(operation: str, account: Account) -> dict[str, tuple[float, str]]:
    """SageMaker's quotas: value and code by name."""
    pages = account.client("service-quotas").get_paginator(operation).paginate(ServiceCode="sagemaker")
    return {quota["QuotaName"]: (quota["Value"], quota["QuotaCode"]) for page in pages for quota in page["Quotas"]}


def _disk_problems(
    recipe: Recipe, config: SageMakerConfig, asked: Sequence[Machine], account: Account, settings: Settings
) -> Iterator[Problem]:
    """Check that the disk of each instance type is large enough.

    A type with local NVMe disks gets no volume. SageMaker uses these disks, and refuses a larger `volume_size_gb`.
    """
    size, local = config.volume_size_gb, _local_disks(asked, account)
    smaller = {name: disk for name, disk in local.items() if disk is not None and size > disk}
    if smaller:
        listed = " and ".join(f"{name} has {disk} GB" for name, disk in smaller.items())
        yield Problem(
            f"compute.sagemaker.volume_size_gb {size} is more than the local disks that SageMaker uses in place of a volume: "
            f"{listed}",
            f"Set it to {min(smaller.values())}, or choose other types",
        )
    try:
        needed = volume_bytes(recipe, settings)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        sizes = [f"{name} has {disk} GB" for name, disk in local.items() if disk is not None]
        volume = f"compute.sagemaker.volume_size_gb {size}"
        yield Problem(
            f"The size of {recipe.model.name_or_path} is not known: {reason}",
            f"Make sure that it fits: {', '.join([*sizes, *([volume] if None in local.values() else [])])}",
            is_warning=True,
        )
        return
    takes = f"model, checkpoints and results take about {needed / _GIB:.0f} GB"
    for name, disk in local.items():
        if disk is not None and needed > disk * 10**9:
            yield Problem(f"{name} has {disk} GB of local disk, but {takes}", "Choose a type with a larger disk")
    if None in local.values() and needed > size * _GIB:
        yield Problem(
            f"compute.sagemaker.volume_size_gb {size} is too small: {takes}",
            f"Set it to {math.ceil(needed * 1.2 / _GIB)} or more",
        )


def _local_disks(asked: Sequence[Machine], account: Account) -> dict[str, int | None]:
    """GB of the local disks by instance type; None for a type that gets a volume. Types that EC2 does not list are missing."""
    names = sorted({machine.instance_type.removeprefix("ml.") for machine in asked})
    pages = account.client("ec2").get_paginator("describe_instance_types")
    return {
        f"ml.{found['InstanceType']}": found.get("InstanceStorageInfo", {}).get("TotalSizeInGB")
        for page in pages.paginate(Filters=[{"Name": "instance-type", "Values": names}])
        for found in page["InstanceTypes"]
    }


def volume_bytes(recipe: Recipe, settings: Settings) -> int:
    """Bytes that a job needs on its disk, computed from the model's config, without its weights.

    The sum of:
    - the base model: its parameters times the bytes of `config.dtype` (bfloat16 if the config names none);
    - three checkpoints: 12 bytes for each trained parameter (float32 weight and AdamW's two moments);
    - the result: 4 bytes for each trained parameter;
    - 10 GiB for data and caches.

    Raises:
        OSError, ValueError: the model's config cannot be loaded.
    """
    # Imported only here: schedules import this module, and their `--help` must not wait for torch.
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from llm_engineering.models.base_model import load_config
    from llm_engineering.models.fit import shape_config

    config = load_config(recipe.model, settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=recipe.model.trust_remote_code)
        parameters: int = sum(parameter.numel() for parameter in model.parameters())
        if recipe.method == "full":
            trained = parameters
        else:
            adapted = get_peft_model(model, shape_config(recipe.lora))
            trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    dtype: torch.dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16
    return parameters * dtype.itemsize + trained * (12 * _CHECKPOINTS + 4) + _OTHER_BYTES
