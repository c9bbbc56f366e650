"""Steps that measure and promote."""

import json
import tempfile
from pathlib import Path
from typing import Annotated

from datasets import DatasetDict
from zenml import get_step_context, link_artifact_to_model, log_metadata
from zenml.client import Client

from llm_engineering.config import EvaluationConfig, Recipe, TrainingSetup
from llm_engineering.data.rows import instruction_row, preference_row
from llm_engineering.evaluation.evaluate import evaluate
from llm_engineering.evaluation.heldout import HeldOut, held_out
from llm_engineering.evaluation.incumbent import INCUMBENT
from llm_engineering.evaluation.judge import PROMPT_FILE
from llm_engineering.evaluation.promotion import PromotionDecision, decide
from llm_engineering.recipes import recipe_hash
from llm_engineering.settings import Settings
from steps.caching import project_step
from steps.logging import log_artifact
from steps.materializers import Directory, DirectoryMaterializer, HashedPydanticMaterializer
from steps.registry import StaleError, move


@project_step(output_materializers=DirectoryMaterializer, files=[PROMPT_FILE])
def evaluate_sft(
    formatted_sft: DatasetDict,
    instruction_dataset: DatasetDict,
    sft_adapter: Directory,
    training_report: Directory,
    config: EvaluationConfig,
    setup: TrainingSetup,
    files_hash: str | None,
    incumbent: Directory | None = None,
) -> Annotated[Directory, "evaluation_report"]:
    """Measure the base model, the SFT model and the one in production on held-out rows.

    `files_hash` stands for the content of the files that the evaluation reads.
    """
    rows = held_out(formatted_sft["test"], [instruction_row(record) for record in instruction_dataset["test"]])
    return _evaluate({"sft": sft_adapter}, rows, config, setup, training_report, files_hash, incumbent)


@project_step(output_materializers=DirectoryMaterializer, files=[PROMPT_FILE])
def evaluate_dpo(
    formatted_sft: DatasetDict,
    formatted_dpo: DatasetDict,
    instruction_dataset: DatasetDict,
    preference_dataset: DatasetDict,
    sft_adapter: Directory,
    dpo_adapter: Directory,
    training_report: Directory,
    config: EvaluationConfig,
    setup: TrainingSetup,
    files_hash: str | None,
    incumbent: Directory | None = None,
) -> Annotated[Directory, "evaluation_report"]:
    """Measure the base, SFT and DPO model and the one in production on held-out rows and pairs."""
    rows = held_out(
        formatted_sft["test"],
        [instruction_row(record) for record in instruction_dataset["test"]],
        formatted_dpo["test"],
        [preference_row(record) for record in preference_dataset["test"]],
    )
    adapters = {"sft": sft_adapter, "dpo": dpo_adapter}
    return _evaluate(adapters, rows, config, setup, training_report, files_hash, incumbent)


def _evaluate(
    adapters: dict[str, Directory],
    rows: HeldOut,
    config: EvaluationConfig,
    setup: TrainingSetup,
    training_report: Directory,
    files_hash: str | None,
    incumbent: Directory | None,
) -> Directory:
    folder = Path(tempfile.mkdtemp())
    folders = {name: adapter.path for name, adapter in adapters.items()}
    if incumbent is not None:
        folders[INCUMBENT] = incumbent.path
    training = json.loads((training_report.path / "report.json").read_text(encoding="utf-8"))
    data = evaluate(folder, folders, rows, config, setup, Settings(), training)
    files = {"files_hash": files_hash} if files_hash is not None else {}
    log_artifact("evaluation_report", **data["metrics"], heldout_rows=data["heldout_rows"], **files)
    return Directory(path=folder)


# Never cached: it acts on the model version of this run, which ties together what the steps made or took from the cache.
@project_step(output_materializers=HashedPydanticMaterializer, enable_cache=False)
def promote(
    evaluation_report: Directory,
    recipe: Recipe,
    code_version: str,
    incumbent: int | None,
    sft_adapter: Directory | None = None,
) -> Annotated[PromotionDecision, "promotion_decision"]:
    """Judge this run's model by its measures; a pass moves its model version to a stage.

    `incumbent` is the version that was in production when the run began; if another one is by now, nothing is moved.
    `sft_adapter` is what DPO started from, perhaps in an earlier run: it belongs to this run's model version too.
    """
    report = json.loads((evaluation_report.path / "report.json").read_text(encoding="utf-8"))
    decision = decide(report, recipe.promotion, incumbent)
    facts = {
        **report["metrics"],
        "recipe": recipe.model_dump(mode="json"),
        "recipe_hash": recipe_hash(recipe),
        "code_version": code_version,
    }
    log_metadata(metadata=facts, infer_model=True)
    context = get_step_context()
    if sft_adapter is not None:
        for version in context.step_run.inputs["sft_adapter"]:
            link_artifact_to_model(version, context.model)
    if decision.stage is not None:
        own = Client().get_model_version(None, context.model.id)
        try:
            move(own, decision.stage, incumbent, f"gate of run {context.pipeline_run.name}", decision.reason)
        except StaleError as error:
            reason = f"Every rule passed, but {error}: run again to be judged against it."
            decision = decision.model_copy(update={"outcome": "stale", "stage": None, "reason": reason})
    log_artifact("promotion_decision", outcome=decision.outcome, stage=str(decision.stage), reason=decision.reason)
    return decision
