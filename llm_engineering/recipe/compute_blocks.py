"""The recipe's `compute` block: where training runs, in which precision, and in how many processes."""

from __future__ import annotations

import re
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from llm_engineering.recipe.block import Block


class VpcConfig(Block):
    """The network of the job's machines. Both lists hold ids."""

    subnets: list[str] = Field(min_length=1)
    security_group_ids: list[str] = Field(min_length=1)


class SageMakerConfig(Block):
    """The machines and the storage of a SageMaker job. Times are in seconds.

    With `scope: training` each training stage is a job. With `chain` generation by the local model, the exam and the
    evaluation are jobs too, on one machine each.

    `role`, `bucket` and `image` belong to an account rather than to a recipe. If they are None, the settings
    `SAGEMAKER_ROLE`, `SAGEMAKER_BUCKET` and `SAGEMAKER_IMAGE` apply. `fallback_instance_types` are tried in order if the
    type before has no capacity, and then, with `fallback_on_demand`, all types in the same order without spot. A job that
    waits longer than `max_pending_s` for its machines is stopped if there is another type to try. `max_wait_s` limits the
    wait for spot capacity and the run together; None means twice `max_run_s`.

    With `weights: s3` a model of the hub is copied to S3 once, and jobs read it there.

    With `keep_alive_s` the machines stay, and are paid, for this time after a job, and a job that follows starts on them
    at once. `training_plan_arn` names capacity that was reserved before. With `network_isolation` the job's process
    reaches no network, and `encrypt_traffic` encrypts the traffic between several machines.
    """

    scope: Literal["training", "chain"] = "training"
    instance_type: str = Field(pattern=r"^ml\.[a-z0-9-]+\.[a-z0-9]+$")
    fallback_instance_types: list[str] = Field(default_factory=list)
    instance_count: int = Field(1, ge=1)
    use_spot: bool = True
    fallback_on_demand: bool = False
    max_pending_s: int = Field(3600, ge=1, le=2_419_200)
    volume_size_gb: int = Field(100, ge=1, le=16384)  # SageMaker's bounds
    max_run_s: int = Field(86_400, ge=60, le=2_419_200)  # SageMaker's default and bound: a day, 28 days
    max_wait_s: int | None = Field(None, ge=60, le=2_419_200)
    role: str | None = None
    bucket: str | None = None
    prefix: str = Field("llm-engineering", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9._-]+)*/?$")
    image: str | None = None
    kms_key: str | None = None
    weights: Literal["hub", "s3"] = "hub"
    vpc: VpcConfig | None = None
    keep_alive_s: int | None = Field(None, ge=1, le=3600)  # SageMaker's bound
    training_plan_arn: str | None = Field(
        None, pattern=r"^arn:aws[a-z-]*:sagemaker:[a-z0-9-]+:\d{12}:training-plan/.+$"
    )
    network_isolation: bool = False
    encrypt_traffic: bool = False
    tags: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _times(self) -> Self:
        if self.max_wait_s is not None and not self.use_spot:
            raise ValueError("max_wait_s is the wait for spot capacity, and use_spot is false: remove it")
        if self.fallback_on_demand and not self.use_spot:
            raise ValueError("fallback_on_demand has no effect with use_spot false: remove it")
        reserved = "keep_alive_s" if self.keep_alive_s else "training_plan_arn" if self.training_plan_arn else None
        if reserved is not None and self.use_spot:
            raise ValueError(
                f"{reserved} needs machines on demand, because SageMaker takes spot machines back: set use_spot to false"
            )
        if self.training_plan_arn and self.fallback_instance_types:
            raise ValueError(
                "training_plan_arn reserves machines of one type, and SageMaker refuses others: set fallback_instance_types to []"
            )
        if self.max_wait_s is not None and self.max_wait_s < self.max_run_s:
            raise ValueError(
                f"max_wait_s {self.max_wait_s} is less than max_run_s {self.max_run_s}, but it includes the run: raise "
                "max_wait_s, or SageMaker refuses the job"
            )
        return self

    @property
    def has_cards(self) -> bool:
        """Whether machines of this type have NVIDIA's cards."""
        return re.match(r"ml\.[gp]\d", self.instance_type) is not None

    @property
    def wait_s(self) -> int | None:
        """Limit in seconds of the wait for spot capacity and the run together; None without spot."""
        if not self.use_spot:
            return None
        return self.max_wait_s or min(2 * self.max_run_s, 2_419_200)


class SkyPilotConfig(Block):
    """The machine of a training stage that is a SkyPilot task.

    `resources` and `file_mounts` are those of SkyPilot's tasks (https://docs.skypilot.co/en/latest/reference/yaml-spec.html).
    Without `resources.autostop` the machine is taken down after 15 idle minutes. `setup` are the commands that make `.venv` in the
    project's folder. Checkpoints are written to `output_dir`: if it is in a bucket of `file_mounts`, another machine continues
    from them.
    """

    resources: dict[str, Any] = Field(default_factory=dict)
    file_mounts: dict[str, Any] = Field(default_factory=dict)
    setup: str = (
        "python3 -m pip install --quiet uv && python3 -m uv venv --quiet --allow-existing --python 3.11 .venv && "
        "python3 -m uv pip install --quiet --python .venv --no-deps --requirement docker/training.lock"
    )
    output_dir: str = "outputs"

    @property
    def task_resources(self) -> dict[str, Any]:
        """The task's `resources`. The default of `autostop` limits what a forgotten machine costs."""
        return {"autostop": {"idle_minutes": 15, "down": True}, **self.resources}


class ComputeConfig(Block):
    """Where training runs, in which precision, in how many processes, and which library loads the trained model.

    On CUDA each of the `num_processes` has its own card. With `distributed: ddp` each process holds the whole model, and
    the gradients are averaged. `fsdp2` shards weights, gradients and optimiser state over the processes. `deepspeed`
    shards by `zero_stage`: 1 the optimiser state, 2 also the gradients, 3 also the weights.

    With `target: sagemaker` each training stage is a SageMaker job on the machines of the block `sagemaker`. The other
    keys then describe those machines, and `num_processes` counts the processes of all of them. Everything except
    training runs on this machine, unless `sagemaker.scope` is `chain`. With `target: skypilot` each training stage is a
    SkyPilot task on one machine of the block `skypilot`.

    `backend: auto` is unsloth if CUDA and the package are available and unsloth supports the recipe, else transformers.
    """

    target: Literal["local", "sagemaker", "skypilot"] = "local"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    backend: Literal["auto", "transformers", "unsloth"] = "auto"
    num_processes: int = Field(1, ge=1)
    distributed: Literal["ddp", "fsdp2", "deepspeed"] = "ddp"
    zero_stage: Literal[1, 2, 3] | None = None
    sagemaker: SageMakerConfig | None = None
    skypilot: SkyPilotConfig | None = None

    @model_validator(mode="after")
    def _processes(self) -> Self:
        if self.target == "sagemaker" and self.sagemaker is None:
            raise ValueError("target sagemaker needs the block sagemaker: add it with at least instance_type")
        for target in ("sagemaker", "skypilot"):
            if self.target != target and getattr(self, target) is not None:
                raise ValueError(
                    f"the block {target} has no effect with target {self.target}: remove it, or set target {target}"
                )
        if self.target == "skypilot" and self.skypilot is None:
            raise ValueError(
                "target skypilot needs the block skypilot: add it with resources, e.g. {accelerators: L40S}"
            )
        if self.sagemaker is not None and self.num_processes % self.sagemaker.instance_count:
            raise ValueError(
                f"num_processes {self.num_processes} counts the processes of all machines: make it a multiple of "
                f"sagemaker.instance_count {self.sagemaker.instance_count}"
            )
        if self.distributed != "ddp" and self.num_processes == 1:
            raise ValueError(
                f"distributed {self.distributed} has no effect with num_processes 1: remove it, or set num_processes"
            )
        if self.distributed != "ddp" and self.device == "cpu":
            raise ValueError(f"distributed {self.distributed} needs CUDA: use ddp with device cpu")
        if self.distributed == "deepspeed" and self.zero_stage is None:
            raise ValueError("distributed deepspeed needs zero_stage: 1, 2 or 3; only 3 shards the weights")
        if self.distributed != "deepspeed" and self.zero_stage is not None:
            raise ValueError(f"zero_stage has no effect with distributed {self.distributed}: remove it")
        return self

    @property
    def shards_weights(self) -> bool:
        """Whether each process keeps only a part of the weights."""
        return self.distributed == "fsdp2" or self.zero_stage == 3

    @property
    def in_job(self) -> ComputeConfig:
        """The `compute` block for the process inside the training job.

        Its `target` is `local`, because the process trains on the machine that it runs on.

        On a machine with cards `device: auto` becomes `cuda`, so that a job that finds no card ends at once instead of
        training slowly on a paid machine.
        """
        has_cards = (self.sagemaker is not None and self.sagemaker.has_cards) or (
            self.skypilot is not None and "accelerators" in self.skypilot.resources
        )
        device = "cuda" if self.device == "auto" and has_cards else self.device
        return self.model_copy(update={"target": "local", "sagemaker": None, "skypilot": None, "device": device})

    @property
    def here(self) -> ComputeConfig:
        """The block for using a trained model on this machine. If it was trained elsewhere, only `dtype` applies."""
        return self if self.target == "local" else ComputeConfig(dtype=self.dtype)

    @property
    def one_process(self) -> ComputeConfig:
        """The block for the steps that run in one process on this machine.

        Their results come from the cache even if training moves to more processes or to other machines.
        """
        return self.here.model_copy(update={"num_processes": 1, "distributed": "ddp", "zero_stage": None})
