"""The step that applies the gate to a run's model and moves the model version to a stage.

It is here and not in steps/, because it changes the registry.
"""

import tempfile
from pathlib import Path
from typing import Annotated, Any

from zenml import add_tags, get_step_context, link_artifact_to_model, log_metadata
from zenml.client import Client
from zenml.models import PipelineRunResponse

from llm_engineering.evaluation.gate import PromotionDecision, decide
from llm_engineering.recipe.data_blocks import UNFIT
from llm_engineering.recipe.loading import recipe_hash
from llm_engineering.recipe.recipe import Recipe
from llm_engineering.reports.evaluation_report import evaluation_page
from llm_engineering.reports.page import write_page
from pipelines.registry import StaleError, move
from pipelines.repeats import earlier_version, in_production
from steps.caching import project_step
from steps.logging import log_artifact, page_facts
from steps.materializers import Directory, DirectoryMaterializer, HashedPydanticMaterializer

# Measures in the metadata of a run and of its last step.
MEASURES_SHOWN = 5


# Never cached: the rules or the model in production may have changed, even if all other steps come from the cache.
@project_step(
    output_materializers={"promotion_decision": HashedPydanticMaterializer, "evaluation_page": DirectoryMaterializer},
    enable_cache=False,
)
def promote(
    evaluation_report: Directory,
    training_report: Directory,
    recipe: Recipe,
    code_version: str,
    incumbent: int | None,
    adapters: list[str],
) -> tuple[Annotated[PromotionDecision, "promotion_decision"], Annotated[Directory, "evaluation_page"]]:
    """Apply the gate to this run's measures. If it passes, move the run's model version to a stage. Write the evaluation's page.

    If all training came from the cache, an earlier version has this model, and is moved and gets the measures. If that one
    is in production, it was compared with itself, and nothing changes.

    Args:
        incumbent: the version in production when the run began. If production has changed since, nothing is moved.
        adapters: the versions of the adapters from earlier runs. They are linked to this run's model version too.
    """
    report = evaluation_report.report()
    facts = {
        **report["metrics"],
        "recipe": recipe.model_dump(mode="json"),
        "recipe_hash": recipe_hash(recipe),
        "code_version": code_version,
    }
    context = get_step_context()
    unfit = _unfit(Client().get_pipeline_run(context.pipeline_run.id))
    for number in adapters:
        link_artifact_to_model(Client().get_artifact_version(number), context.model)
    own = Client().get_model_version(None, context.model.id)
    version = earlier_version(own) or own
    decision = decide(report, recipe.promotion, incumbent, version.number)
    if in_production(version, incumbent):
        reason = f"Nothing changes: this is the model of version {version.number}, which is in production."
        decision = decision.model_copy(update={"stage": None, "reason": reason})
    else:
        log_metadata(metadata=facts | ({UNFIT: unfit} if unfit else {}), model_version_id=version.id)
    if decision.stage is not None:
        try:
            move(version, decision.stage, incumbent, f"gate of run {context.pipeline_run.name}", decision.reason)
        except StaleError as error:
            reason = f"Every rule passed, but {error}. Run the same command again to compare with that."
            decision = decision.model_copy(update={"outcome": "stale", "stage": None, "reason": reason})
    log_artifact("promotion_decision", outcome=decision.outcome, stage=str(decision.stage), reason=decision.reason)
    # The dashboard shows a run as completed whatever the gate decided, and the metadata of artifacts only with a click.
    shown = summary(report, recipe, decision)
    run = context.pipeline_run.id
    log_metadata(metadata=shown)
    log_metadata(metadata=shown, run_id_name_or_prefix=run)
    add_tags(tags=[f"gate {decision.outcome}", *(["not fit"] if unfit else [])], run=run)
    # Write the page. It is not written by the evaluation, which may come from the cache and does not know the gate's decision.
    folder = Path(tempfile.mkdtemp())
    about = page_facts(recipe.model.name_or_path) | {"Version": str(version.number)}
    write_page(folder, evaluation_page(report, training_report.report(), about, decision))
    return decision, Directory(path=folder)


def summary(report: dict[str, Any], recipe: Recipe, decision: PromotionDecision) -> dict[str, Any]:
    """What a person looks for first: the verdict, the recipe, the base model, and five measures of the newest model.

    Measures that the gate judged come first. They are rounded to four significant digits.
    """
    names = dict.fromkeys([*(rule.measure for rule in decision.rules), *report["measures"]])
    values = {
        name: report["measures"][name]["models"][report["newest"]]["value"]
        for name in names
        if report["newest"] in report["measures"].get(name, {"models": {}})["models"]
    }
    return {
        "verdict": f"{decision.outcome}: {decision.reason}",
        "recipe": f"{recipe.name} {recipe_hash(recipe)}",
        "base_model": recipe.model.name_or_path,
        **{name: float(f"{value:.4g}") for name, value in list(values.items())[:MEASURES_SHOWN]},
    }


def _unfit(run: PipelineRunResponse) -> dict[str, str]:
    """Why the data of a stage is not fit to train on, by the name of the stage; empty if all data is fit.

    A run formats the rows of every stage of its chain, also of those that an earlier run has trained.
    """
    reports = {
        name.removeprefix("format_"): step.outputs["data_report"][0]
        for name, step in run.steps.items()
        if name.startswith("format_")
    }
    return {stage: str(report.run_metadata[UNFIT]) for stage, report in reports.items() if UNFIT in report.run_metadata}
