"""Steps that evaluate models on held-out rows."""

import json
import tempfile
from pathlib import Path
from typing import Annotated

from datasets import DatasetDict

from llm_engineering.data.rows import instruction_row, preference_row
from llm_engineering.evaluation.evaluate import evaluate
from llm_engineering.evaluation.heldout import HeldOut, held_out
from llm_engineering.evaluation.incumbent import INCUMBENT
from llm_engineering.evaluation.judge import PROMPT_FILE
from llm_engineering.recipe.evaluation_blocks import EvaluationConfig
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.training_blocks import TrainingSetup
from llm_engineering.reports.evaluation_report import evaluation_page
from llm_engineering.reports.page import write_report
from steps.caching import project_step
from steps.logging import log_artifact
from steps.materializers import Directory, DirectoryMaterializer


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
    """Measure the base model, the SFT model and the model in production on held-out rows.

    `files_hash` is the hash of the files that the evaluation reads, so that a changed file runs this step again.
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
    """Measure the base, SFT and DPO models and the model in production on held-out rows and pairs.

    `files_hash` as in `evaluate_sft`.
    """
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
    data = evaluate(folders, rows, config, setup, Settings())
    write_report(folder, data, evaluation_page(data, training))
    files = {"files_hash": files_hash} if files_hash is not None else {}
    log_artifact("evaluation_report", **data["metrics"], heldout_rows=data["heldout_rows"], **files)
    return Directory(path=folder)
