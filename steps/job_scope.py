"""Decides for each step that uses a model whether it runs as a SageMaker job."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from zenml import get_step_context

from llm_engineering.recipe.generation_blocks import ClientConfig
from llm_engineering.recipe.recipe import Recipe


def sent_to_job(function: Callable[..., Any]) -> Callable[..., Any]:
    """A step's function that starts a job if the recipe says so, and else calls `function`."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        context = get_step_context()
        recipe = (context.pipeline_run.config.parameters or {})["recipe"]
        arguments = signature.bind(*args, **kwargs).arguments
        sagemaker = recipe.get("compute", {}).get("sagemaker") or {}
        # An endpoint answers on its own machines.
        asks_endpoint = any(isinstance(v, ClientConfig) and v.client != "local" for v in arguments.values())
        if sagemaker.get("scope") != "chain" or asks_endpoint:
            return function(*args, **kwargs)
        # boto3 and transformers take seconds to import, and a run that takes its steps from the cache does without.
        from steps.in_job import dispatched

        return dispatched(function, Recipe.model_validate(recipe), arguments)

    return run
