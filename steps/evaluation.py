"""The step that evaluates models on held-out rows."""

import inspect
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args

from datasets import Dataset, DatasetDict

from llm_engineering.data.rows import REPLAY
from llm_engineering.data.storage import stream_records
from llm_engineering.documents.document import Document
from llm_engineering.documents.passages import chunks
from llm_engineering.evaluation.measures.exam import open_exam
from llm_engineering.evaluation.measures.judge import PROMPT_FILE
from llm_engineering.evaluation.statistics import Bootstrap
from llm_engineering.feedback.agreement import JudgedQuestion
from llm_engineering.feedback.human_rows import noted
from llm_engineering.feedback.people import snapshots
from llm_engineering.recipe.data_blocks import DocumentsConfig
from llm_engineering.recipe.evaluation_blocks import HUMAN_MEASURE, INCUMBENT, EvaluationConfig, ExamConfig
from llm_engineering.recipe.reward_blocks import RewardSet
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.stages import STAGES, Kind
from llm_engineering.recipe.training_blocks import TrainingSetup
from llm_engineering.reports.page import write_json
from steps.caching import project_step
from steps.logging import log_artifact
from steps.materializers import Directory, DirectoryMaterializer
from steps.written_exam import with_written_questions

# The kinds of rows that models are measured on. Nothing is measured on labelled answers.
_MEASURED = tuple(kind for kind in get_args(Kind) if kind != "labelled")


def _with_inputs(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a step an input for each stage's adapter and for the rows of each kind, because ZenML takes no `**inputs`."""
    inputs: dict[str, Any] = {f"{stage}_adapter": Directory | None for stage in STAGES}
    inputs |= {f"formatted_{kind}": DatasetDict | None for kind in _MEASURED}
    inputs |= {f"{kind}_dataset": DatasetDict | None for kind in get_args(Kind)}
    signature = inspect.signature(function)
    fixed = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in inputs.items()
    ]
    function.__signature__ = signature.replace(parameters=[*fixed, *more])  # type: ignore[attr-defined]
    return function


@project_step(output_materializers=DirectoryMaterializer, files=[PROMPT_FILE], in_job=True)
@_with_inputs
def evaluate(
    chain: list[str],
    config: EvaluationConfig,
    setup: TrainingSetup,
    files_hash: str | None,
    exam: ExamConfig | None,
    exam_hash: str | None,
    cut: DocumentsConfig | None,
    written: Directory | None = None,
    documents: DatasetDict | None = None,
    judged: str | None = None,
    rewards: RewardSet | None = None,
    max_completion_length: int | None = None,
    reward_code: dict[str, str] | None = None,
    reward_model: Directory | None = None,
    reward_judge: Directory | None = None,
    incumbent: Directory | None = None,
    epochs: dict[str, float] | None = None,
    **inputs: Any,
) -> Annotated[Directory, "evaluation_report"]:
    """Measure the base model, the model of each stage and the model in production on held-out rows.

    If the last stage makes a reward model, only this is measured.

    Args:
        files_hash: hash of the files that the evaluation reads, so that a changed file runs this step again.
        exam_hash: the same for the files of the exam.
        written: the exam that the run has written from the documents; None if the recipe names a file.
        cut: how the documents are cut into the passages that the exam's retrieval finds.
        documents: the documents. Both are None if nothing is retrieved.
        judged: hash of what people preferred in blind comparisons when the run began; None if there were none.
        epochs: the epochs of the stages on texts and instructions.
        rewards: those of the last stage on prompts, whose answers have at most `max_completion_length` tokens.
        reward_code: hashes of the files of own rewards, so that a changed file runs this step again.
        reward_model: the model of the reward `reward_model`; None without this reward.
        reward_judge: the reward model of `evaluation.reward_model`, which judges answers; None without this key.
        inputs: `<stage>_adapter`, `formatted_<kind>` and `<kind>_dataset`. The questions of labelled answers do not count in
            blind comparisons.
    """
    # torch and transformers take seconds to import, and a run that takes this step from the cache does without.
    from llm_engineering.evaluation.evaluate import Rewarding
    from llm_engineering.evaluation.evaluate import evaluate as evaluate_models
    from llm_engineering.evaluation.heldout import held_out
    from llm_engineering.evaluation.measures.human_preference import human_win_rate, identities, trained_questions
    from llm_engineering.evaluation.measures.reward_accuracy import evaluate_reward

    # Join the held-out rows of each kind
    formatted = {kind: inputs.get(f"formatted_{kind}") for kind in _MEASURED}
    rows = {kind: inputs.get(f"{kind}_dataset") for kind in _MEASURED}
    heldout = held_out(
        {kind: data["test"] for kind, data in formatted.items() if data is not None},
        {kind: data["test"] for kind, data in rows.items() if data is not None},
    )

    # Measure a reward model on pairs only: it answers nothing
    last = chain[-1]
    folder = Path(tempfile.mkdtemp())
    if not STAGES[last].policy:
        scorer = inputs[f"{last}_adapter"]
        assert scorer is not None
        data = evaluate_reward(last, scorer.path, heldout.pairs, config, setup, Settings())
        write_json(folder, data)
        log_artifact("evaluation_report", **data["metrics"], heldout_rows=data["heldout_pairs"])
        return Directory(path=folder)

    # Read the exam, and find the passages for its questions
    passages = []
    if documents is not None and cut is not None:
        passages = chunks([Document.model_validate(document) for document in documents["documents"]], cut)
    exam, exam_hash = with_written_questions(exam, exam_hash, written)
    questions = open_exam(exam, passages) if exam is not None else None
    # The documents gave too few questions, and there are no general ones.
    if questions is not None and not questions.rows:
        questions = None

    # Evaluate the models
    trained = {stage: inputs[f"{stage}_adapter"] for stage in chain if STAGES[stage].policy}
    trained |= {INCUMBENT: incumbent}
    folders = {name: model.path for name, model in trained.items() if model is not None}
    rewarding = None
    if rewards is not None and max_completion_length:
        rewarding = Rewarding(rewards, max_completion_length, reward_model.path if reward_model else None)
    judging = reward_judge.path if reward_judge else None
    data = evaluate_models(folders, heldout, config, setup, Settings(), questions, rewarding, judging)

    # Add what people preferred
    if judged is not None:
        units = [JudgedQuestion(*unit) for unit in noted(judged, snapshots(Settings()))]
        models = identities(setup.model, folders)
        read = [*rows.values(), inputs.get("labelled_dataset")]
        trained_on = {q for splits in read if splits is not None for q in trained_questions(splits)}
        bootstrap = Bootstrap(config.bootstrap_samples, config.confidence, setup.seed)
        measure = human_win_rate(units, models, data["newest"], trained_on, bootstrap)
        if measure is not None:
            data["measures"][HUMAN_MEASURE] = measure
            data["metrics"] |= {f"{HUMAN_MEASURE}_{name}": e["value"] for name, e in measure["models"].items()}

    # Add what training read
    train = {
        kind: (splits["train"], own["train"])
        for kind, splits in formatted.items()
        if splits is not None and (own := rows[kind]) is not None
    }
    data["trained"] = {
        stage: tokens_read(*train[STAGES[stage].rows], number) for stage, number in (epochs or {}).items()
    }

    # Write the report. The gate's step writes its page.
    write_json(folder, data)
    hashes = {"files_hash": files_hash, "exam_hash": exam_hash}
    files: dict[str, Any] = {name: value for name, value in hashes.items() if value is not None}
    files |= {"reward_code": reward_code} if reward_code else {}
    log_artifact("evaluation_report", **data["metrics"], heldout_rows=data["heldout_rows"], **files)
    return Directory(path=folder)


def tokens_read(formatted: Dataset, rows: Dataset, epochs: float) -> int:
    """The tokens that a stage on texts or instructions read, without those of general datasets.

    Args:
        formatted: the training split as token ids, with the columns `id` and `input_ids`.
        rows: the same rows before formatting, with the columns `id` and `origin`.
    """
    general = {row["id"] for row in stream_records(rows.select_columns(["id", "origin"])) if row["origin"] == REPLAY}
    records = stream_records(formatted.select_columns(["id", "input_ids"]))
    return round(epochs * sum(len(record["input_ids"]) for record in records if record["id"] not in general))
