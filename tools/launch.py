"""Starts pipelines, and finds what earlier runs left to build on."""

from __future__ import annotations

import logging
from typing import Any

from pydantic import ValidationError
from zenml import Model
from zenml.client import Client
from zenml.enums import ExecutionMode, ExecutionStatus
from zenml.exceptions import RunInterruptedException
from zenml.models import PipelineRunResponse

from llm_engineering.errors import RequestError, WorkError
from llm_engineering.recipe.loading import differences
from llm_engineering.recipe.recipe import Recipe
from pipelines import chain
from pipelines.inputs import Inputs
from pipelines.registry import incumbent
from tools.processes import is_alive, repair_killed, this_process

logger = logging.getLogger("llm_engineering.run")


def launch(pipeline: str, recipe: Recipe, inputs: Inputs, cache: bool) -> list[PipelineRunResponse]:
    """Run a pipeline; `dpo` runs `sft` first if no SFT model of this recipe is registered. Returns all runs."""
    if pipeline == "datasets":
        return [_start(chain.generate_datasets, recipe, inputs, cache)]
    if pipeline != "dpo":
        return [_start_judged(_PIPELINES[pipeline], recipe, inputs, cache)]
    runs = []
    adapter = _registered_adapter(inputs.sft_recipe)
    if adapter is None:
        others = Client().list_artifact_versions(artifact="sft_adapter", size=1).total
        known = (
            f"{others} SFT models are registered, of other recipes or data" if others else "No SFT model is registered"
        )
        logger.info("%s: training SFT first", known)
        runs.append(_start_judged(chain.sft, recipe, inputs, cache))
        adapter = _registered_adapter(inputs.sft_recipe)
        if adapter is None:
            raise WorkError("The SFT run ended without a registered adapter. `make runs` shows its state.")
    logger.info("DPO starts from SFT adapter version %s", adapter.version)
    return [*runs, _start_judged(chain.dpo, recipe, inputs, cache, sft_adapter=adapter)]


def check_resumable(run: str, pipeline: str, recipe: Recipe) -> None:
    """Say which run goes on, and refuse one that was another pipeline or recipe.

    Finished steps come from the cache and training goes on from its newest complete checkpoint, so that going on
    is the same command again; this makes sure that it is the same.
    """
    repair_killed()
    name = {"datasets": "generate_datasets"}.get(pipeline, pipeline)
    if run == "last":
        found = Client().list_pipeline_runs(pipeline=name, sort_by="desc:created", size=1, hydrate=True).items
        if not found:
            raise RequestError(f"There is no run of {name} to resume. `make runs` lists the last runs.")
        former = found[0]
    else:
        try:
            former = Client().get_pipeline_run(run)
        except (KeyError, ValueError) as error:
            raise RequestError(f"There is no run {run}. `make runs` lists the last runs.") from error
    if former.pipeline is None or former.pipeline.name != name:
        raise RequestError(f"Run {former.name} is no run of {name}. `make runs` lists the last runs.")
    if former.status == ExecutionStatus.COMPLETED:
        raise RequestError(f"Run {former.name} is complete: there is nothing to resume. Leave --resume out.")
    if not former.status.is_finished and is_alive(former):
        raise RequestError(f"Run {former.name} is still {former.status}: let it end or stop it first.")
    try:
        # ZenML keeps the values that were set: validation adds the defaults again.
        then = Recipe.model_validate((former.config.parameters or {})["recipe"])
    except (KeyError, ValidationError) as error:
        raise RequestError(
            f"Run {former.name} was made with another version of the recipe's schema. Leave --resume out to start anew."
        ) from error
    different = differences(then.model_dump(mode="json"), recipe.model_dump(mode="json"))
    if different:
        raise RequestError(
            f"Run {former.name} was made with another recipe: {', '.join(different)} differ. "
            "Use the same recipe, or leave --resume out to start anew."
        )
    logger.info("Going on with run %s", former.name)


def _registered_adapter(sft_recipe: str) -> Any:
    """The newest SFT adapter of this recipe and these inputs, or None."""
    found = Client().list_artifact_versions(
        artifact="sft_adapter", run_metadata=[f"recipe_hash:{sft_recipe}"], sort_by="desc:created", size=1, hydrate=True
    )
    return found.items[0] if found.items else None


def _start_judged(pipeline: Any, recipe: Recipe, inputs: Inputs, cache: bool, **arguments: Any) -> PipelineRunResponse:
    """Start a pipeline that ends with the gate, and hand it the model in production to be measured beside its own."""
    found = incumbent(recipe.name)
    if found is None:
        return _start(pipeline, recipe, inputs, cache, **arguments)
    logger.info("In production is version %d: it is measured beside the new model", found.number)
    inputs = inputs.model_copy(update={"incumbent": found.number})
    return _start(pipeline, recipe, inputs, cache, incumbent=found.adapter.artifact, **arguments)


def _start(pipeline: Any, recipe: Recipe, inputs: Inputs, cache: bool, **arguments: Any) -> PipelineRunResponse:
    model = Model(name=recipe.name, tags=["llm-engineering"], save_models_to_registry=False)
    configured = pipeline.with_options(
        model=model,
        enable_cache=None if cache else False,
        extra=this_process(),
        # The other modes raise an error that names the step and not what was wrong.
        execution_mode=ExecutionMode.FAIL_FAST,
    )
    logger.info("Running %s", pipeline.name)
    try:
        run = configured(recipe=recipe, inputs=inputs, **arguments)
    except RunInterruptedException as error:
        # ZenML's own name for Ctrl-C inside a step.
        raise KeyboardInterrupt from error
    assert isinstance(run, PipelineRunResponse)
    return Client().get_pipeline_run(run.id)


_PIPELINES = {"sft": chain.sft, "retrain": chain.retrain}
