"""The step that trains a stage."""

from collections.abc import Callable
from importlib import import_module
from typing import Annotated, Any

from datasets import DatasetDict
from zenml import get_step_context, log_metadata

from llm_engineering.recipe.reward_blocks import RewardSet
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.stages import Stage
from llm_engineering.recipe.training_blocks import TrainingSetup
from llm_engineering.reports.page import write_page
from llm_engineering.reports.training_report import training_page
from llm_engineering.training.processes.job import RUN_ID, Job, TrainingResult
from llm_engineering.training.rewards import reward_files
from steps.caching import code_version, project_step
from steps.logging import log_artifact, page_facts
from steps.materializers import Directory, DirectoryMaterializer


@project_step(output_materializers={"{stage}_adapter": DirectoryMaterializer, "training_report": DirectoryMaterializer})
def train(
    formatted: DatasetDict,
    stage: str,
    function: tuple[str, str],
    config: dict[str, Any],
    setup: TrainingSetup,
    recipe_hash: str,
    start: Directory | None = None,
    reward_model: Directory | None = None,
) -> tuple[Annotated[Directory, "{stage}_adapter"], Annotated[Directory, "training_report"]]:
    """Train a stage on the machine that the recipe names.

    Args:
        function: module and name of the stage's function. The step does not read it from the table of stages, because a
            change of another stage must not change the step's code.
        config: the stage's block of the recipe.
        recipe_hash: covers everything that decides the result; the next stage finds the adapter by it.
        start: the adapter or full model of the stage before.
        reward_model: the model of the reward `reward_model`; None without this reward.
    """
    # torch and transformers take seconds to import, and a run that takes this step from the cache does without.
    from llm_engineering.cloud.sagemaker.dispatch import dispatch_training
    from llm_engineering.cloud.skypilot import train_with_skypilot
    from llm_engineering.training.processes.launch import launch_training

    # Train
    job = Job(
        stage=stage,
        config=config,
        setup=setup,
        start=start.path if start else None,
        parameters=_lineage(recipe_hash),
        reward_model=reward_model.path if reward_model else None,
    )
    if setup.compute.target == "local":
        train_job: Callable[..., TrainingResult] = getattr(import_module(function[0]), function[1])
        result = launch_training(train_job, job, formatted, Settings())
    else:
        dispatch = dispatch_training if setup.compute.target == "sagemaker" else train_with_skypilot
        recipe = get_step_context().model.name
        result = dispatch(job, formatted, Settings(), recipe, lambda facts: log_metadata(metadata=facts))

    # Write the page, and log what a person would filter by
    summary = result.summary
    rewards = {key: config[key] for key in RewardSet.model_fields if key in config}
    code = reward_files(RewardSet.model_validate(rewards)) if rewards else {}
    facts = page_facts(setup.model.name_or_path)
    write_page(result.report, training_page(summary, facts, setup.model_dump(mode="json")))
    log_artifact(
        f"{stage}_adapter",
        recipe_hash=recipe_hash,
        base_model=setup.model.name_or_path,
        base_revision=str(setup.model.revision),
        **{
            name: summary[name]
            for name in ("train_loss", "steps", "tokens_per_second", "peak_memory_bytes", "flops", "environment")
        },
        **{f"comet_{name}": value for name, value in summary["comet"].items()},
        **summary.get("sagemaker", {}),
        **({"reward_code": code} if code else {}),
    )
    return Directory(path=result.adapter), Directory(path=result.report)


def train_step(stage: Stage) -> Any:
    """The step `train` for a stage: its outputs have the stage's name, and its cache key covers the stage's own code."""
    version = code_version(__name__, train.name, also=stage.train)
    return train.with_options(substitutions={"stage": stage.name}, environment={"CODE_VERSION": version})


def _lineage(recipe_hash: str) -> dict[str, str]:
    """The run, the recipe and the versions of the inputs. Trackers log them, so that a tracked run leads back here."""
    context = get_step_context()
    inputs = [version for versions in context.step_run.inputs.values() for version in versions]
    versions = {f"{version.artifact.name}_version": str(version.id) for version in inputs}
    return {RUN_ID: str(context.pipeline_run.id), "recipe_hash": recipe_hash, **versions}
