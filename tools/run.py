"""The command `run`: checks the recipe, finds results of earlier runs, and starts a pipeline of `pipelines.chain`.

ZenML and torch are imported inside the functions, after the recipe has been read, so that a wrong recipe is refused at
once.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from llm_engineering.errors import RequestError, WorkError
from llm_engineering.process import this_process
from llm_engineering.recipe.loading import check_name, differences, load_recipe, stored_recipe
from llm_engineering.recipe.recipe import Recipe
from llm_engineering.recipe.stages import STAGES
from tools.cli import DEFAULT_RECIPE, Config, Json, Overrides, prepare_zenml

if TYPE_CHECKING:
    from zenml.models import PipelineRunResponse

    from pipelines.inputs import Inputs
    from tools.scheduling.scheduled import Scheduled

logger = logging.getLogger("llm_engineering.run")

# A stage of the table, or one of two other names.
if TYPE_CHECKING:
    Pipeline = str
else:
    Pipeline = Literal[(*STAGES, "retrain", "datasets")]
_STAGES = "; ".join(f"{stage.name} ({stage.title})" for stage in STAGES.values())


def run(
    pipeline: Annotated[
        Pipeline,
        typer.Argument(
            help=f"A stage of the recipe's chain: {_STAGES}. The stages before it run first, unless an earlier run has "
            "trained them. Or retrain, which runs the whole chain in one run, or datasets, which only generates the data.",
        ),
    ],
    config: Config = DEFAULT_RECIPE,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print the resolved recipe, datasets and stages, the rows to expect, and an estimate of memory and time; run nothing.",
        ),
    ] = False,
    resume: Annotated[
        str | None,
        typer.Option("--resume", metavar="RUN|last", help="Continue a run that failed or was interrupted."),
    ] = None,
    attach: Annotated[
        str | None,
        typer.Option(
            "--attach",
            metavar="JOB",
            help="Follow this SageMaker job of a training step instead of starting a new job.",
        ),
    ] = None,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Run all steps, even if their results are cached.")
    ] = False,
    scheduled: Annotated[
        str | None,
        typer.Option(
            "--scheduled",
            metavar="PLACE",
            help="Used by schedules: the folder or S3 address of the schedule that this run belongs to (retrain only).",
        ),
    ] = None,
    as_json: Json = False,
) -> int:
    """Run a stage of the chain, the whole chain, or only the generation of data.

    Results of finished steps come from the cache, so after an error, the same command continues where the run ended.
    With --json, the last line of stdout is the JSON object, and everything else goes to stderr.

    Example: `llm-engineering run sft --config configs/local.yaml --set sft.learning_rate=1e-4`
    """
    if scheduled and (pipeline != "retrain" or dry_run or resume):
        raise RequestError("--scheduled can only be used with retrain, and without --dry-run and --resume.")

    def work(own: Scheduled | None) -> int:
        started = time.monotonic()
        recipe = load_recipe(config, overrides or ())
        check_name(config, overrides or ())
        # Imports leave no garbage. Looking for it would take a seventh of the time of a dry run, and a quarter of that of a run whose
        # steps are all cached.
        gc.disable()
        # These imports are slow, so they come after the recipe has been checked.
        from tools.forecast import warn_of_memory
        from tools.plan import print_plan, stages_of

        stages = stages_of(pipeline, recipe)
        if dry_run:
            print_plan(pipeline, recipe)
            return 0
        if attach:
            check_attachable(attach, recipe, stages)
        from tools.readiness import check_and_pin

        recipe, inputs = check_and_pin(recipe)
        warn_of_memory(recipe, stages)
        prepare_zenml()
        from zenml.integrations.registry import integration_registry

        import pipelines.chain  # noqa: F401 — `launch` needs it, and it is to be imported before the next lines
        from tools import results
        from tools.zenml_store import forget_lost

        # ZenML would import these two libraries for materializers of values that no step returns.
        for library in ("scipy", "sklearn"):
            integration_registry.integrations.pop(library, None)
        # What was imported stays, so it need not be looked through again.
        gc.freeze()
        gc.enable()
        results.repair_killed()
        forget_lost()
        if own is not None and not own.is_new(recipe, inputs):
            return own.skip("no new data")
        if resume:
            check_resumable(resume, pipeline, recipe)
        runs = launch(pipeline, recipe, inputs, cache=not no_cache)
        if attach:
            warn_if_unused(attach)
        result = results.collect(runs, time.monotonic() - started)
        if own is not None:
            own.judged(result.run_id, result.model_version, result.promotion)
        results.print_table(result, sys.stderr if as_json else sys.stdout)
        if as_json:
            print(json.dumps(result.as_json()))
        return 0

    if scheduled is None:
        return work(None)
    from tools.scheduling.scheduled import Scheduled

    return Scheduled(scheduled).run(work)


def launch(pipeline: str, recipe: Recipe, inputs: Inputs, cache: bool) -> list[PipelineRunResponse]:
    """Run a pipeline; returns its runs in order. A stage of which no adapter with this recipe is registered runs first."""
    from pipelines import chain

    if pipeline == "datasets":
        return [start(chain.generate_datasets, recipe, inputs, cache)]
    if pipeline == "retrain":
        return [_start_judged(chain.retrain, recipe, inputs, cache)]
    runs = []
    trained = recipe.trained_with(pipeline)
    before = [stage for stage in recipe.chain_to(pipeline) if stage not in trained]
    for stage in before:
        adapter = _registered_adapter(stage, inputs)
        if adapter is None:
            # The run of a later stage may train this one too.
            run_of = [name for name in before if stage in recipe.trained_with(name)][-1]
            logger.info("%s: training it first", _known_adapters(stage))
            runs.append(_start_judged(chain.stage_pipeline(run_of), recipe, inputs, cache, stage=run_of))
            adapter = _registered_adapter(stage, inputs)
            if adapter is None:
                raise WorkError(f"The run of {stage} ended without a registered adapter. `make runs` shows its state.")
        logger.info("The stage after %s starts from its adapter version %s", stage, adapter.version)
        inputs = inputs.model_copy(update={"adapters": {**inputs.adapters, stage: str(adapter.id)}})
    return [*runs, _start_judged(chain.stage_pipeline(pipeline), recipe, inputs, cache, stage=pipeline)]


def check_resumable(run: str, pipeline: str, recipe: Recipe) -> None:
    """Check that the pipeline and the recipe of a run are those of this command.

    To resume a run, the same command is run again: finished steps come from the cache, and training continues from its
    newest complete checkpoint.

    Args:
        run: name or id of the run, or `last`.

    Raises:
        RequestError: the run does not exist, is complete or still runs, or has another pipeline or recipe.
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
        raise RequestError(f"Run {former.name} is not a run of {name}. `make runs` lists the last runs.")
    if former.status == ExecutionStatus.COMPLETED:
        raise RequestError(f"Run {former.name} is complete, so there is nothing to resume. Leave out --resume.")
    if not former.status.is_finished and is_alive(former):
        raise RequestError(f"Run {former.name} is still {former.status}. Wait until it ends, or stop it first.")
    then = stored_recipe(former.config.parameters or {}, f"Run {former.name}", "Leave out --resume to start a new run.")
    different = differences(then.model_dump(mode="json"), recipe.model_dump(mode="json"))
    if different:
        raise RequestError(
            f"Run {former.name} was made with another recipe: {', '.join(different)} differ. "
            "Use the same recipe, or leave out --resume to start a new run."
        )
    logger.info("Continuing run %s", former.name)


def check_attachable(job: str, recipe: Recipe, stages: Sequence[str]) -> None:
    """Check the job, and pass its name to the training steps.

    The training step checks whether the job has the same inputs. They are known only after the data is formatted.

    Raises:
        RequestError: the recipe trains on this machine, the job does not exist, or it trains none of these stages.
        WorkError: SageMaker refuses the request.
    """
    from llm_engineering.cloud.sagemaker import jobs
    from llm_engineering.cloud.sagemaker.account import Account
    from llm_engineering.cloud.sagemaker.dispatch import ATTACH
    from llm_engineering.cloud.sagemaker.failures import translated
    from llm_engineering.recipe.settings import Settings

    if recipe.compute.sagemaker is None:
        raise RequestError(
            f"--attach follows a SageMaker job, but compute.target of this recipe is {recipe.compute.target}. Use the recipe that started the "
            "job."
        )
    account = Account.resolve(recipe.compute.sagemaker, Settings())
    client = account.client("sagemaker")
    with translated(f"Job {job} cannot be looked up"):
        if not jobs.exists(client, job):
            raise RequestError(f"There is no job {job} in {account.region}: correct its name, or AWS_REGION.")
        stage = jobs.tags_of(client, jobs.describe(client, job)).get(jobs.STAGE)
    if stage not in stages:
        raise RequestError(
            f"Job {job} trains {stage or 'nothing of this project'}, but this command trains {', '.join(stages)}. "
            "Name another job, or leave out --attach."
        )
    os.environ[ATTACH] = job


def warn_if_unused(job: str) -> None:
    """Warn if no step has followed the job, because the result of the training step came from the cache."""
    from llm_engineering.cloud.sagemaker.dispatch import ATTACH

    if os.environ.pop(ATTACH, None) is not None:
        logger.warning("Job %s was not followed, because the result of its training step came from the cache", job)


def _registered_adapter(stage: str, inputs: Inputs) -> Any:
    """The newest adapter of a stage with this recipe and these inputs, or None."""
    from tools.zenml_store import newest_stored

    return newest_stored(f"{stage}_adapter", [f"recipe_hash:{inputs.recipes[stage]}"])


def _known_adapters(stage: str) -> str:
    from zenml.client import Client

    others = Client().list_artifact_versions(artifact=f"{stage}_adapter", size=1).total
    if not others:
        return f"No {stage} model is registered"
    return f"{others} {stage} models are registered, but with other recipes or data"


def _start_judged(pipeline: Any, recipe: Recipe, inputs: Inputs, cache: bool, **arguments: Any) -> PipelineRunResponse:
    """Start a pipeline that ends with the gate. It gets the model in production, to compare the new model with it."""
    from pipelines.registry import incumbent

    found = incumbent(recipe.name)
    if found is None:
        return start(pipeline, recipe, inputs, cache, **arguments)
    from steps.materializers import is_lost

    if is_lost(found.adapter.artifact.uri):
        raise RequestError(
            f"Version {found.number} is in production, and its files are gone: {found.adapter.artifact.uri}. Restore this folder, "
            "or put another version into production: make rollback, or make promote VERSION=…"
        )
    logger.info("Version %d is in production: the new model is compared with it", found.number)
    inputs = inputs.model_copy(update={"incumbent": found.number})
    return start(pipeline, recipe, inputs, cache, incumbent=found.adapter.artifact, **arguments)


def start(
    pipeline: Any, recipe: Recipe, inputs: Inputs, cache: bool, versioned: bool = True, **arguments: Any
) -> PipelineRunResponse:
    """Run a pipeline to its end; returns the run. Without `versioned` it makes no version of the model."""
    from zenml import Model
    from zenml.client import Client
    from zenml.enums import ExecutionMode
    from zenml.exceptions import RunInterruptedException
    from zenml.models import PipelineRunResponse

    from llm_engineering.recipe.settings import Settings
    from llm_engineering.training.trainer.checkpoints import remove_finished
    from pipelines.registry import adapter_of
    from pipelines.repeats import drop_repeated_version, version_of
    from tools.model_versions.signatures import sign_new

    process = this_process()
    model = Model(name=recipe.name, tags=["llm-engineering"], save_models_to_registry=False) if versioned else None
    configured = pipeline.with_options(
        model=model,
        enable_cache=None if cache else False,
        extra=process,
        # With the other modes, the error names only the failed step and not the cause.
        execution_mode=ExecutionMode.FAIL_FAST,
    )
    logger.info("Running %s", pipeline.name)
    try:
        run = configured(recipe=recipe, inputs=inputs, **arguments)
    except BaseException as error:
        started = (
            Client().list_pipeline_runs(pipeline=pipeline.name, sort_by="desc:created", size=1, hydrate=True).items
        )
        # Another process may have started a run meanwhile.
        if started and started[0].config.extra == process:
            drop_repeated_version(started[0])
        # ZenML raises this error for Ctrl-C inside a step.
        if isinstance(error, RunInterruptedException):
            raise KeyboardInterrupt from error
        raise
    assert isinstance(run, PipelineRunResponse)
    drop_repeated_version(Client().get_pipeline_run(run.id))
    # All models are stored, so nothing will resume from the checkpoints.
    remove_finished(Settings().llm_output_dir / "training")
    run = Client().get_pipeline_run(run.id)
    made = version_of(run)
    if made is not None and adapter_of(made) is not None:
        sign_new(made, Settings())
    return run
