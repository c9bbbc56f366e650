"""Runs a pipeline: reads the recipe, checks it, finds what earlier runs left to build on, and starts `pipelines.chain`.

ZenML and torch are imported inside the functions, after the recipe has been read: a wrong recipe is refused at once.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from pydantic import ValidationError

from llm_engineering.errors import RequestError, WorkError
from llm_engineering.recipe.loading import differences, load_recipe
from llm_engineering.recipe.recipe import Recipe
from tools.cli import DEFAULT_RECIPE, Config, Json, Overrides, prepare_zenml

if TYPE_CHECKING:
    from zenml.models import PipelineRunResponse

    from pipelines.inputs import Inputs
    from tools.scheduled import Scheduled

logger = logging.getLogger("llm_engineering.run")

Pipeline = Literal["sft", "dpo", "retrain", "datasets"]


def run(
    pipeline: Annotated[
        Pipeline,
        typer.Argument(
            help="sft trains on answers; dpo goes on from it with preferences; retrain does both in one run; datasets only generates the data."
        ),
    ],
    config: Config = DEFAULT_RECIPE,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved recipe, what would run, and its memory and time.")
    ] = False,
    resume: Annotated[
        str | None,
        typer.Option("--resume", metavar="RUN|last", help="Go on with a run that failed or was interrupted."),
    ] = None,
    attach: Annotated[
        str | None,
        typer.Option(
            "--attach", metavar="JOB", help="Follow this SageMaker job of the training step instead of starting one."
        ),
    ] = None,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Run every step, also those with a cached result.")
    ] = False,
    scheduled: Annotated[
        str | None,
        typer.Option(
            "--scheduled",
            metavar="PLACE",
            help="Be a run of the schedule that is kept there (retrain only). It ends at once if nothing is new.",
        ),
    ] = None,
    as_json: Json = False,
) -> int:
    """Run a pipeline: sft, dpo, retrain or datasets.

    Finished steps come from the cache, so the same command goes on where it ended. With --json, stdout holds one object
    on its last line, and everything else goes to stderr.

    Example: `llm-engineering run sft --config configs/local.yaml --set sft.learning_rate=1e-4`
    """
    if scheduled and (pipeline != "retrain" or dry_run or resume):
        raise RequestError("--scheduled goes with retrain alone, without --dry-run and --resume.")

    def work(own: Scheduled | None) -> int:
        started = time.monotonic()
        recipe = load_recipe(config, overrides or ())
        # Only now the slow imports: a wrong recipe is told at once.
        from tools.plan import preflight, print_plan, stages_of, warn_of_memory

        if dry_run:
            print_plan(pipeline, recipe)
            return 0
        if attach:
            check_attachable(attach, recipe, stages_of(pipeline))
        recipe, inputs = preflight(recipe)
        warn_of_memory(recipe, stages_of(pipeline))
        prepare_zenml()
        from tools import results

        if own is not None and not own.is_new(recipe, inputs):
            return own.skip("no new data")
        if resume:
            check_resumable(resume, pipeline, recipe)
        runs = launch(pipeline, recipe, inputs, cache=not no_cache)
        if attach:
            warn_if_unused(attach)
        result = results.collect(runs, time.monotonic() - started)
        if own is not None:
            version = runs[-1].model_version
            own.judged(result.run_id, version.number if version else None, result.promotion)
        results.print_table(result, sys.stderr if as_json else sys.stdout)
        if as_json:
            print(json.dumps(result.as_json()))
        return 0

    if scheduled is None:
        return work(None)
    from tools.scheduled import Scheduled

    return Scheduled(scheduled).run(work)


def launch(pipeline: Pipeline, recipe: Recipe, inputs: Inputs, cache: bool) -> list[PipelineRunResponse]:
    """Run a pipeline; `dpo` runs `sft` first if no SFT model of this recipe is registered. Returns all runs."""
    from zenml.client import Client

    from pipelines import chain

    if pipeline == "datasets":
        return [_start(chain.generate_datasets, recipe, inputs, cache)]
    if pipeline != "dpo":
        return [_start_judged(getattr(chain, pipeline), recipe, inputs, cache)]
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


def check_resumable(run: str, pipeline: Pipeline, recipe: Recipe) -> None:
    """Say which run goes on, and refuse one that was another pipeline or recipe.

    Finished steps come from the cache and training goes on from its newest complete checkpoint, so that going on
    is the same command again; this makes sure that it is the same.
    """
    from zenml.client import Client
    from zenml.enums import ExecutionStatus

    from tools.results import is_alive, repair_killed

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


def check_attachable(job: str, recipe: Recipe, stages: Sequence[str]) -> None:
    """Tell the training steps which job is meant; whether it does their work is known when the data is formatted.

    Raises:
        RequestError: the recipe trains here, or the job is none of these stages.
        WorkError: SageMaker does not know the job, or refuses to say.
    """
    from llm_engineering.cloud.sagemaker import jobs
    from llm_engineering.cloud.sagemaker.account import Account
    from llm_engineering.cloud.sagemaker.dispatch import ATTACH
    from llm_engineering.cloud.sagemaker.failures import translated
    from llm_engineering.recipe.settings import Settings

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
    """Warn if no step has followed the job: the training step was served from the cache."""
    from llm_engineering.cloud.sagemaker.dispatch import ATTACH

    if os.environ.pop(ATTACH, None) is not None:
        logger.warning("Job %s was not followed: its training step was served from the cache", job)


def _registered_adapter(sft_recipe: str) -> Any:
    """The newest SFT adapter of this recipe and these inputs, or None."""
    from zenml.client import Client

    found = Client().list_artifact_versions(
        artifact="sft_adapter", run_metadata=[f"recipe_hash:{sft_recipe}"], sort_by="desc:created", size=1, hydrate=True
    )
    return found.items[0] if found.items else None


def _start_judged(pipeline: Any, recipe: Recipe, inputs: Inputs, cache: bool, **arguments: Any) -> PipelineRunResponse:
    """Start a pipeline that ends with the gate, and hand it the model in production to be measured beside its own."""
    from pipelines.registry import incumbent

    found = incumbent(recipe.name)
    if found is None:
        return _start(pipeline, recipe, inputs, cache, **arguments)
    logger.info("In production is version %d: it is measured beside the new model", found.number)
    inputs = inputs.model_copy(update={"incumbent": found.number})
    return _start(pipeline, recipe, inputs, cache, incumbent=found.adapter.artifact, **arguments)


def _start(pipeline: Any, recipe: Recipe, inputs: Inputs, cache: bool, **arguments: Any) -> PipelineRunResponse:
    from zenml import Model
    from zenml.client import Client
    from zenml.enums import ExecutionMode
    from zenml.exceptions import RunInterruptedException
    from zenml.models import PipelineRunResponse

    from tools.results import this_process

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


if __name__ == "__main__":
    # Timers that an earlier version wrote start `python -m tools.run`.
    from tools.cli import main

    sys.exit(main(["run", *sys.argv[1:]]))
