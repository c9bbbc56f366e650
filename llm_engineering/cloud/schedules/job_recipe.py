"""Rewrites a recipe for a scheduled job, which cannot see this machine's files.

Data must be in S3. SageMaker copies it to the job's machine at every start, so that each run gets the newest data. Files of
the recipe itself, such as the checks of the evaluation, are uploaded once, when the schedule is created or changed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, get_args

from llm_engineering.cloud.sagemaker.request import INPUTS
from llm_engineering.data.reading.sources import dataset_files
from llm_engineering.errors import RequestError
from llm_engineering.evaluation.measures.exam import exam_hash
from llm_engineering.evaluation.requirements import files_hash
from llm_engineering.models.chat_template import pin_chat_template
from llm_engineering.recipe.data_blocks import EMBEDDED_DOCUMENTS, EMBEDDED_GENERAL, EMBEDDED_HANDBOOK, rows_key
from llm_engineering.recipe.evaluation_blocks import GENERATED_EXAM, HUMAN_MEASURE, EvaluationConfig, ExamConfig
from llm_engineering.recipe.model_blocks import EMBEDDED_MODEL
from llm_engineering.recipe.recipe import Recipe
from llm_engineering.recipe.settings import is_loopback
from llm_engineering.recipe.stages import Kind

# The channel with the recipe and its files, and the name of the recipe in it.
RECIPE_CHANNEL = "recipe"
RECIPE_FILE = "recipe.json"
_S3 = "s3://"


@dataclass(frozen=True)
class JobRecipe:
    """A recipe for a scheduled job.

    Attributes:
        recipe: the rewritten recipe. Its paths are those of the job's machine, and the compute target is `local`.
        channels: addresses in S3, by channel.
        files: the local files that the recipe reads, by their path in the recipe's channel.
    """

    recipe: Recipe
    channels: dict[str, str]
    files: dict[str, Path]


def job_recipe(recipe: Recipe, bucket: str, s3: Any) -> JobRecipe:
    """Rewrite a recipe for the jobs of a schedule.

    Args:
        bucket: the account's bucket, which the remedies in error messages name.

    Raises:
        RequestError: the recipe reads something that a job cannot reach; the message lists each with its remedy.
    """
    channels: dict[str, str] = {}
    problems: list[str] = []

    def placed(key: str, value: str) -> str:
        """Replace an address in S3 by its path on the job's machine; other values stay unchanged."""
        if not value.startswith(_S3):
            return value
        address, mark, split = value.partition("#")
        channel = key.replace(".", "-").replace("_", "-")
        try:
            uri, name = _objects(address, s3)
        except RequestError as error:
            problems.append(f"{key}: {error}")
            return value
        channels[channel] = uri
        return str(PurePosixPath(INPUTS, channel, name)) + mark + split

    def dataset(key: str, value: str | None) -> str | None:
        if value is None:
            return None
        if value.startswith(_S3):
            return placed(key, value)
        try:
            local = dataset_files(value)
        except RequestError as error:
            problems.append(f"{key}: {error}")
            return value
        if local is not None:
            problems.append(_local_problem(key, value, bucket))
        return value

    data, documents, model = recipe.data, recipe.documents, recipe.model
    if recipe.reads_documents:
        if documents.path.startswith(_S3):
            documents = documents.model_copy(update={"path": placed("documents.path", documents.path)})
        elif documents.path not in (EMBEDDED_DOCUMENTS, EMBEDDED_HANDBOOK):
            problems.append(_local_problem("documents.path", documents.path, bucket))
    for kind in get_args(Kind):
        problems += [
            f"data.{rows_key(kind)} names {source}, and what people said is on this machine, which a job cannot see: remove "
            f"{source}, or run `make retrain` here"
            for source in data.people(kind)
        ]
    problems += [
        f"promotion.{rule.path} names {HUMAN_MEASURE}, and the comparisons are on this machine, which a job cannot see: remove "
        "the rule, or run `make retrain` here"
        for rule in recipe.promotion.all_rules()
        if rule.measure == HUMAN_MEASURE
    ]
    kinds = ("instruction", "preference", "labelled", "prompt")
    named = {rows_key(kind): dataset(f"data.{rows_key(kind)}", data.file(kind)) for kind in kinds}
    tests = [f"test_{rows_key(kind)}" for kind in kinds]
    named |= {key: dataset(f"data.{key}", getattr(data, key)) for key in tests}
    if data.replay_instructions != EMBEDDED_GENERAL:
        named["replay_instructions"] = dataset("data.replay_instructions", data.replay_instructions)
    if data.replay is not None:
        replay = data.replay.model_copy(update={"path": dataset("data.replay.path", data.replay.path)})
        data = data.model_copy(update={"replay": replay})
    others = [dataset(f"data.decontaminate_against.{i}", value) for i, value in enumerate(data.decontaminate_against)]
    data = data.model_copy(update={**named, "decontaminate_against": others})
    if model.name_or_path.startswith(_S3):
        model = model.model_copy(update={"name_or_path": placed("model.name_or_path", model.name_or_path)})
    elif model.name_or_path != EMBEDDED_MODEL and Path(model.name_or_path).expanduser().exists():
        problems.append(_local_problem("model.name_or_path", model.name_or_path, bucket))
    evaluation, exam, files = with_job_files(recipe.evaluation, recipe.exam)
    for key, client in (("generation", recipe.generation), ("evaluation.judge", evaluation.judge)):
        if client is not None and client.base_url is not None and is_loopback(client.base_url):
            problems.append(
                f"{key}.base_url {client.base_url} is on this machine: set it to an address that a job can reach"
            )
    if problems:
        lines = "\n".join(f"- {problem}" for problem in problems)
        raise RequestError(f"A SageMaker job cannot read everything that this recipe names:\n{lines}")
    update = {
        "data": data,
        "documents": documents,
        "model": model,
        "evaluation": evaluation,
        "exam": exam,
        "formatting": pin_chat_template(recipe.formatting),
        "compute": recipe.compute.in_job,
    }
    return JobRecipe(recipe.model_copy(update=update), channels, files)


def with_job_files(
    evaluation: EvaluationConfig, exam: ExamConfig | None
) -> tuple[EvaluationConfig, ExamConfig | None, dict[str, Path]]:
    """Replace the paths of the files of evaluation and exam by their paths on a job's machine.

    Returns:
        The blocks, and the files on this machine by their path in the recipe's channel.
    """
    files: dict[str, Path] = {}
    # This call raises an error if a file is missing or a line is invalid.
    files_hash(evaluation)
    for key, value in (("checks", evaluation.checks), ("canaries", evaluation.canaries)):
        if value is not None:
            file = Path(value).expanduser()
            files[f"{key}/{file.name}"] = file
            evaluation = evaluation.model_copy(update={key: f"{INPUTS}/{RECIPE_CHANNEL}/{key}/{file.name}"})
    if evaluation.lm_eval is not None and evaluation.lm_eval.include_path is not None:
        folder = Path(evaluation.lm_eval.include_path).expanduser()
        inside = {file.relative_to(folder): file for file in sorted(folder.rglob("*")) if file.is_file()}
        files |= {f"tasks/{p}": file for p, file in inside.items() if not any(part.startswith(".") for part in p.parts)}
        tasks = evaluation.lm_eval.model_copy(update={"include_path": f"{INPUTS}/{RECIPE_CHANNEL}/tasks"})
        evaluation = evaluation.model_copy(update={"lm_eval": tasks})
    if exam is not None:
        exam_hash(exam)
        for key, value in (("path", exam.path), ("control", exam.control)):
            if value is not None and value != GENERATED_EXAM and not value.startswith("embedded:"):
                file = Path(value).expanduser()
                files[f"exam/{key}/{file.name}"] = file
                exam = exam.model_copy(update={key: f"{INPUTS}/{RECIPE_CHANNEL}/exam/{key}/{file.name}"})
    return evaluation, exam, files


def _objects(address: str, s3: Any) -> tuple[str, str]:
    """Look up an S3 address. Returns the channel's address and the object's name, which is empty for a folder.

    Raises:
        RequestError: S3 has nothing at this address.
    """
    bucket, _, key = address.removeprefix(_S3).partition("/")
    if key and not key.endswith("/"):
        first = s3.list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1).get("Contents", [])
        if first and first[0]["Key"] == key:
            return address, PurePosixPath(key).name
        key += "/"
    if not s3.list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1).get("Contents"):
        raise RequestError(f"{address} holds no object. Upload the files: aws s3 sync my_files/ {_S3}{bucket}/{key}")
    return f"{_S3}{bucket}/{key}", ""


def _local_problem(key: str, value: str, bucket: str) -> str:
    name = Path(value.partition("#")[0]).name
    target = f"{_S3}{bucket}/{key.split('.')[0]}/{name}"
    command = "sync" if Path(value).expanduser().is_dir() else "cp"
    return (
        f"{key} {value} is on this machine, which a job cannot see. Upload it and use its address: "
        f"aws s3 {command} {value} {target}, then {'DOCUMENTS=' if key == 'documents.path' else f'--set {key}='}{target}"
    )
