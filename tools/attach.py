"""`--attach JOB`: the training step follows a SageMaker job that was started before."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

from llm_engineering.cloud.sagemaker import jobs
from llm_engineering.cloud.sagemaker.account import Account
from llm_engineering.cloud.sagemaker.dispatch import ATTACH
from llm_engineering.cloud.sagemaker.failures import translated
from llm_engineering.errors import RequestError
from llm_engineering.recipe.recipe import Recipe
from llm_engineering.recipe.settings import Settings

logger = logging.getLogger("llm_engineering.run")


def check_attachable(job: str, recipe: Recipe, stages: Sequence[str]) -> None:
    """Say to the training steps which job is meant; whether it does their work is known when the data is formatted.

    Raises:
        RequestError: the recipe trains here, or the job is none of these stages.
        WorkError: SageMaker does not know the job, or refuses to say.
    """
    if recipe.compute.sagemaker is None:
        raise RequestError(
            "--attach follows a SageMaker job, and this recipe trains here. Use the recipe that the job was started with."
        )
    account = Account.resolve(recipe.compute.sagemaker, Settings())
    client = account.client("sagemaker")
    with translated(f"Job {job} cannot be looked up"):
        if not jobs.exists(client, job):
            raise RequestError(f"There is no job {job} in {account.region}: correct its name, or AWS_REGION.")
        stage = jobs.tags_of(client, jobs.describe(client, job)).get(jobs.STAGE)
    if stage not in stages:
        raise RequestError(
            f"Job {job} trains {stage or 'nothing of this project'}, and this command trains {', '.join(stages)}. "
            "Name another job, or leave --attach out."
        )
    os.environ[ATTACH] = job


def warn_if_unused(job: str) -> None:
    """Say that no step has followed the job: the training step was served from the cache."""
    if os.environ.pop(ATTACH, None) is not None:
        logger.warning("Job %s was not followed: its training step was served from the cache", job)
