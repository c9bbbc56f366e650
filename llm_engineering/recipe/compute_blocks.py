"""The recipe's `compute` block: where training runs, in which precision, and in how many processes."""

from __future__ import annotations

import re
from typing import Literal, Self

from pydantic import Field, model_validator

from llm_engineering.recipe.block import Block


class VpcConfig(Block):
    """The network that the job's machines are in; both lists are ids."""

    subnets: list[str] = Field(min_length=1)
    security_group_ids: list[str] = Field(min_length=1)


class SageMakerConfig(Block):
    """The machines of a SageMaker training job, and where it reads and writes.

    `role`, `bucket` and `image` belong to an account rather than to a recipe: where they are None, the settings say
    (`SAGEMAKER_ROLE`, `SAGEMAKER_BUCKET`, `SAGEMAKER_IMAGE`). `fallback_instance_types` are tried in order when the
    one before has no capacity. Times are in seconds; `max_wait_s` counts the wait for spot capacity and the run, and
    None is twice `max_run_s`.
    """

    instance_type: str = Field(pattern=r"^ml\.[a-z0-9-]+\.[a-z0-9]+$")
    fallback_instance_types: list[str] = Field(default_factory=list)
    instance_count: int = Field(1, ge=1)
    use_spot: bool = True
    volume_size_gb: int = Field(100, ge=1, le=16384)  # SageMaker's bounds
    max_run_s: int = Field(86_400, ge=60, le=2_419_200)  # SageMaker's default and bound: a day, 28 days
    max_wait_s: int | None = Field(None, ge=60, le=2_419_200)
    role: str | None = None
    bucket: str | None = None
    prefix: str = Field("llm-engineering", pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$")
    image: str | None = None
    kms_key: str | None = None
    vpc: VpcConfig | None = None
    tags: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _times(self) -> Self:
        if self.max_wait_s is not None and not self.use_spot:
            raise ValueError("max_wait_s is the wait for spot capacity, and use_spot is false: remove it")
        if self.max_wait_s is not None and self.max_wait_s < self.max_run_s:
            raise ValueError(
                f"max_wait_s {self.max_wait_s} is less than max_run_s {self.max_run_s}, and counts the run too: "
                "SageMaker refuses that"
            )
        return self

    @property
    def wait_s(self) -> int | None:
        """Seconds to wait for spot capacity and the run together; None on demand."""
        if not self.use_spot:
            return None
        return self.max_wait_s or min(2 * self.max_run_s, 2_419_200)


class ComputeConfig(Block):
    """Where training runs, in which precision, in how many processes, and what loads the model that is trained.

    On CUDA each of the `num_processes` has a card of its own. `distributed` is what they share: with `ddp` each holds
    the whole model and they average gradients; `fsdp2` shards weights, gradients and optimiser state over them;
    `deepspeed` shards what `zero_stage` says (1 the optimiser state, 2 gradients too, 3 weights too).

    With `target: sagemaker` each training stage is a job of its own there, on the machines in the block `sagemaker`; the
    other keys speak of those machines, and what is not training runs here, on what is here. `num_processes` counts
    those of all machines.

    `backend: auto` is unsloth where CUDA and the package are there and the recipe asks for nothing that it lacks, else
    transformers.
    """

    target: Literal["local", "sagemaker"] = "local"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    backend: Literal["auto", "transformers", "unsloth"] = "auto"
    num_processes: int = Field(1, ge=1)
    distributed: Literal["ddp", "fsdp2", "deepspeed"] = "ddp"
    zero_stage: Literal[1, 2, 3] | None = None
    sagemaker: SageMakerConfig | None = None

    @model_validator(mode="after")
    def _processes(self) -> Self:
        if self.target == "sagemaker" and self.sagemaker is None:
            raise ValueError("target sagemaker needs the block sagemaker, at least its instance_type")
        if self.target == "local" and self.sagemaker is not None:
            raise ValueError("the block sagemaker has no effect with target local: remove it, or set target sagemaker")
        if self.sagemaker is not None and self.num_processes % self.sagemaker.instance_count:
            raise ValueError(
                f"num_processes {self.num_processes} counts those of all machines, and cannot be shared by "
                f"sagemaker.instance_count {self.sagemaker.instance_count}"
            )
        if self.sagemaker is not None and self.sagemaker.instance_count > 1 and self.distributed != "ddp":
            raise ValueError(
                f"distributed {self.distributed} writes its shards to a disk that all processes see, which several "
                "machines have not: use ddp, or sagemaker.instance_count 1"
            )
        if self.distributed != "ddp" and self.num_processes == 1:
            raise ValueError(
                f"distributed {self.distributed} has no effect with num_processes 1: remove it, or set num_processes"
            )
        if self.distributed != "ddp" and self.device == "cpu":
            raise ValueError(f"distributed {self.distributed} needs CUDA: use ddp with device cpu")
        if self.distributed == "deepspeed" and self.zero_stage is None:
            raise ValueError("distributed deepspeed needs zero_stage: 1, 2 or 3, which shards the weights too")
        if self.distributed != "deepspeed" and self.zero_stage is not None:
            raise ValueError(f"zero_stage has no effect with distributed {self.distributed}: remove it")
        return self

    @property
    def in_job(self) -> ComputeConfig:
        """What the training job itself gets: for it, its machine is here.

        A machine with cards is paid for them: `auto` is `cuda` there, so that a job that sees none ends at once.
        """
        has_cards = self.sagemaker is not None and re.match(r"ml\.[gp]\d", self.sagemaker.instance_type)
        device = "cuda" if self.device == "auto" and has_cards else self.device
        return self.model_copy(update={"target": "local", "sagemaker": None, "device": device})

    @property
    def here(self) -> ComputeConfig:
        """What a model of this recipe is used with here, once it is trained: of another machine, its precision alone."""
        return self if self.target == "local" else ComputeConfig(dtype=self.dtype)

    @property
    def one_process(self) -> ComputeConfig:
        """What work in a single process here depends on, so that it is not repeated when training gets more of them,
        or goes elsewhere."""
        if self.target == "sagemaker":
            return ComputeConfig()
        return self.model_copy(update={"num_processes": 1, "distributed": "ddp", "zero_stage": None})
