"""The jobs of a training stage: what they are told apart by, their names, and which of them is to be gone on with."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from botocore.exceptions import ClientError
from datasets import DatasetDict

from llm_engineering.compute.sagemaker.storage import folder_hash
from llm_engineering.config import SageMakerConfig
from llm_engineering.training.job import Job
from llm_engineering.training.run import dataset_digests

logger = logging.getLogger(__name__)

# Tags of a job; the last says that its results were brought back, and when.
STAGE = "llm-engineering:stage"
IDENTITY = "llm-engineering:identity"
RECIPE = "llm-engineering:recipe"
FETCHED = "llm-engineering:fetched"

ENDED = ("Completed", "Failed", "Stopped")
_NAME_CHARACTERS = 63


def job_identity(job: Job, data: DatasetDict) -> dict[str, Any]:
    """All that decides what a job computes: recipe, model, data, and the model that it starts from.

    On which machines it runs, and where its metrics go, does not.
    """
    setup = job.setup.model_copy(update={"compute": job.setup.compute.in_job})
    return {
        **setup.model_dump(mode="json", exclude={"tracking": True, "compute": {"target", "sagemaker"}}),
        job.stage: job.config,
        "dataset": dataset_digests(data),
        "start": folder_hash(job.start) if job.start else None,
    }


@dataclass(frozen=True)
class JobNames:
    """Names of the jobs of one recipe, stage and identity: `<recipe>-<stage>-<digest>-<number>`."""

    recipe: str
    stage: str
    digest: str

    @classmethod
    def of(cls, recipe: str, stage: str, identity: Mapping[str, Any]) -> JobNames:
        """The names for an identity."""
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
        return cls(recipe, stage, digest)

    @property
    def part(self) -> str:
        """What the names of all jobs of this identity have in common, whatever the recipe is called."""
        return f"-{self.stage}-{self.digest}-"

    def name(self, number: int) -> str:
        """A name that SageMaker takes: 63 characters at most, letters, digits and single hyphens in between."""
        ending = f"{self.part}{number:04d}"
        recipe = re.sub(r"[^A-Za-z0-9]+", "-", self.recipe).strip("-")[: _NAME_CHARACTERS - len(ending)]
        return f"{recipe.rstrip('-')}{ending}"

    def number(self, name: str) -> int:
        """The number of one of these jobs."""
        return int(name.rpartition("-")[2])

    def newest(self, client: Any) -> dict[str, Any] | None:
        """What DescribeTrainingJob says of the job with the highest number; None if there is none."""
        pages = client.get_paginator("list_training_jobs").paginate(NameContains=self.part)
        names = [found["TrainingJobName"] for page in pages for found in page["TrainingJobSummaries"]]
        ours = [name for name in names if re.search(rf"{re.escape(self.part)}\d+$", name)]
        return describe(client, max(ours, key=self.number)) if ours else None


def describe(client: Any, name: str) -> dict[str, Any]:
    """What SageMaker says of a job."""
    description: dict[str, Any] = client.describe_training_job(TrainingJobName=name)
    return description


def exists(client: Any, name: str) -> bool:
    """Whether there is a job of this name."""
    try:
        describe(client, name)
    except ClientError as error:
        if "not found" in error.response["Error"]["Message"]:
            return False
        raise
    return True


def tags_of(client: Any, description: Mapping[str, Any]) -> dict[str, str]:
    """A job's tags."""
    pages = client.get_paginator("list_tags").paginate(ResourceArn=description["TrainingJobArn"])
    return {tag["Key"]: tag["Value"] for page in pages for tag in page["Tags"]}


def is_running(description: Mapping[str, Any]) -> bool:
    """Whether a job has not ended yet."""
    return description["TrainingJobStatus"] not in ENDED


def instance_types(config: SageMakerConfig) -> list[str]:
    """The types of machine that a recipe names, in the order in which they are tried."""
    return list(dict.fromkeys([config.instance_type, *config.fallback_instance_types]))


def types_after(config: SageMakerConfig, tried: str) -> list[str]:
    """The types that are left when one had no capacity."""
    types = instance_types(config)
    return types[types.index(tried) + 1 :] if tried in types else []


def create_first(client: Any, requests: Mapping[str, dict[str, Any]]) -> tuple[dict[str, Any], bool]:
    """Create a job with the first request whose type of machine the account's quota allows.

    Args:
        requests: by type of machine, at least one, in the order in which they are tried.

    Returns:
        the job, and whether it is new: another process may have made it under this name meanwhile.

    Raises:
        ClientError: AWS refuses; of several quotas that do not suffice, the last.
    """
    kinds = list(requests)
    for kind, request in requests.items():
        try:
            client.create_training_job(**request)
        except client.exceptions.ResourceLimitExceeded as error:
            if kind == kinds[-1]:
                raise
            logger.warning("%s: the quota does not suffice. %s", kind, error.response["Error"]["Message"])
        except client.exceptions.ResourceInUse:
            return describe(client, request["TrainingJobName"]), False
        else:
            return describe(client, request["TrainingJobName"]), True
    raise AssertionError("there is at least one request")
