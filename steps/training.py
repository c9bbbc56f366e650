"""Steps that train a stage."""

from collections.abc import Callable
from typing import Annotated

from datasets import DatasetDict
from zenml import get_step_context, log_metadata

from llm_engineering.cloud.sagemaker.dispatch import dispatch_training
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.training_blocks import DPOConfig, SFTConfig, TrainingSetup
from llm_engineering.reports.page import write_page
from llm_engineering.reports.training_report import training_page
from llm_engineering.training.dpo import train_dpo_job
from llm_engineering.training.job import Job, TrainingResult
from llm_engineering.training.launch import launch_training
from llm_engineering.training.sft import train_sft_job
from steps.caching import project_step
from steps.logging import log_artifact
from steps.materializers import Directory, DirectoryMaterializer


@project_step(output_materializers={"sft_adapter": DirectoryMaterializer, "training_report": DirectoryMaterializer})
def train_sft(
    formatted_sft: DatasetDict, config: SFTConfig, setup: TrainingSetup, recipe_hash: str
) -> tuple[Annotated[Directory, "sft_adapter"], Annotated[Directory, "training_report"]]:
    """Train the SFT adapter. `recipe_hash` covers everything that decides its result; DPO finds the adapter by it."""
    job = Job(stage="sft", config=config.model_dump(), setup=setup, parameters=_lineage(recipe_hash, "formatted_sft"))
    result = _train(train_sft_job, job, formatted_sft)
    _log(result, "sft_adapter", setup, recipe_hash)
    return Directory(path=result.adapter), Directory(path=result.report)


@project_step(output_materializers={"dpo_adapter": DirectoryMaterializer, "training_report": DirectoryMaterializer})
def train_dpo(
    formatted_dpo: DatasetDict, sft_adapter: Directory, config: DPOConfig, setup: TrainingSetup, recipe_hash: str
) -> tuple[Annotated[Directory, "dpo_adapter"], Annotated[Directory, "training_report"]]:
    """Train the DPO adapter on top of the SFT adapter."""
    lineage = _lineage(recipe_hash, "formatted_dpo", "sft_adapter")
    job = Job(stage="dpo", config=config.model_dump(), setup=setup, start=sft_adapter.path, parameters=lineage)
    result = _train(train_dpo_job, job, formatted_dpo)
    _log(result, "dpo_adapter", setup, recipe_hash)
    return Directory(path=result.adapter), Directory(path=result.report)


def _train(
    train: Callable[[Job, DatasetDict, Settings], TrainingResult], job: Job, data: DatasetDict
) -> TrainingResult:
    """Train on the machine that the recipe names, and write a page about the summary."""
    if job.setup.compute.target == "local":
        result = launch_training(train, job, data, Settings())
    else:
        recipe = get_step_context().model.name
        result = dispatch_training(job, data, Settings(), recipe, lambda facts: log_metadata(metadata=facts))
    write_page(result.report, training_page(result.summary))
    return result


def _lineage(recipe_hash: str, *inputs: str) -> dict[str, str]:
    """The run, the recipe and the versions of the inputs. Trackers log them, so that a tracked run leads back here."""
    context = get_step_context()
    versions = {f"{name}_version": str(v.id) for name in inputs for v in context.step_run.inputs[name]}
    return {"run_id": str(context.pipeline_run.id), "recipe_hash": recipe_hash, **versions}


def _log(result: TrainingResult, adapter: str, setup: TrainingSetup, recipe_hash: str) -> None:
    summary = result.summary
    log_artifact(
        adapter,
        recipe_hash=recipe_hash,
        base_model=setup.model.name_or_path,
        base_revision=str(setup.model.revision),
        **{name: summary[name] for name in ("train_loss", "steps", "tokens_per_second", "peak_memory_bytes")},
        **{f"comet_{name}": value for name, value in summary["comet"].items()},
        **summary.get("sagemaker", {}),
    )
