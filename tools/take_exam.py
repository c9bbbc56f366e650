"""The command `exam`, which asks the base model and the trained models the recipe's exam, without training."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_engineering.errors import RequestError
from llm_engineering.recipe.loading import load_recipe
from tools.cli import DEFAULT_RECIPE, Config, Json, Overrides, Version, prepare_zenml

if TYPE_CHECKING:
    from rich.table import Table

    from llm_engineering.recipe.recipe import Recipe
    from tools.model_versions.versions import Found

logger = logging.getLogger("llm_engineering.exam")


def exam(
    config: Config = DEFAULT_RECIPE, overrides: Overrides = None, version: Version = None, as_json: Json = False
) -> int:
    """Ask the base model and the trained models the recipe's exam, without training.

    The base model and the newest model also answer with passages of the documents. If no version is promoted, only the
    base model is asked. The page with every answer is written to `outputs/exam`.

    Example: `llm-engineering exam --set exam.path=embedded:handbook --set documents.path=embedded:handbook`
    """
    recipe = load_recipe(config, overrides or ())
    if recipe.exam is None:
        raise RequestError(
            "The recipe has no exam. Add the block exam to it, or name a file of questions: --set exam.path=my_exam.jsonl"
        )

    from llm_engineering.documents.passages import chunks
    from llm_engineering.documents.read import read_documents
    from llm_engineering.evaluation.evaluate import exam_measures, newest_of
    from llm_engineering.evaluation.measures.exam import exam_report, open_exam, take_exam, with_written
    from llm_engineering.evaluation.models import BASE, Models, Sample
    from llm_engineering.evaluation.statistics import Bootstrap
    from llm_engineering.models.chat_template import pin_chat_template
    from llm_engineering.models.revision import check_unchanged, pin_revision
    from llm_engineering.models.tokenizer import load_tokenizer
    from llm_engineering.recipe.settings import Settings
    from llm_engineering.reports.exam_report import exam_page
    from llm_engineering.reports.page import write_report

    settings = Settings()
    settings.check_writable()

    # Find the models
    prepare_zenml()
    found = _found(recipe, version)

    # Read the questions, and find their passages
    passages = []
    if recipe.exam.retrieval_passages:
        documents, _ = read_documents(recipe.documents)
        passages = chunks(documents, recipe.documents)
    asked = with_written(recipe.exam, _written(found)) if recipe.exam.is_generated else recipe.exam
    questions = open_exam(asked, passages)

    # Load the models. All get the chat template of training.
    folders = found.folders if found is not None else {}
    if found is not None:
        base, template = found.base, None
        check_unchanged(base)
        source = base.saved_in(folders[found.name])
    else:
        base = pin_revision(recipe.model)
        template = pin_chat_template(recipe.formatting, base, settings).chat_template
        source = base
    tokenizer = load_tokenizer(source, settings, template)
    models = Models.load(base, folders, tokenizer, recipe.evaluation, recipe.compute.here, settings)

    # Take the exam
    newest = newest_of(folders)
    taken: dict[str, dict[int, Sample]] = {}
    for name in models.names:
        taken |= take_exam(models, name, name, questions, with_retrieval=name in (BASE, newest))
    bootstrap = Bootstrap(recipe.evaluation.bootstrap_samples, recipe.evaluation.confidence, recipe.seed)
    measures = exam_measures(questions, taken, newest, bootstrap)
    report = exam_report(questions, taken, newest, recipe.seed)

    # Show the results
    folder = settings.llm_output_dir / "exam"
    described = found.described if found is not None else f"{base.name_or_path}, without training"
    data = {"model": described, "newest": newest, "measures": measures, "exam": report}
    facts = {
        "Model": described,
        "Date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "Recipe": recipe.name,
        "Base model": base.name_or_path,
    }
    write_report(folder, data, exam_page(report, measures, newest, facts))
    _print(data, recipe.seed, sys.stderr if as_json else sys.stdout)
    logger.info("Every answer: %s", folder / "report.html")
    if as_json:
        print(json.dumps({"model": described, "measures": measures}))
    return 0


def _found(recipe: Recipe, version: str | None) -> Found | None:
    """The version that was asked for, or the promoted one; None if no version is promoted."""
    from pipelines.registry import stages
    from tools.model_versions.versions import find_model

    if version is None:
        held = stages(recipe.name)
        if not (held.production or held.staging):
            logger.info("No version of %s is promoted, so only the base model is asked", recipe.name)
            return None
    found = find_model(recipe, version)
    logger.info("%s", found.described)
    return found


def _written(found: Found | None) -> Path:
    """The folder of the exam that the run of a version has written.

    Raises:
        RequestError: there is no version, its run has written no exam, or the documents gave too few questions for one.
    """
    from llm_engineering.evaluation.measures.exam import EXAM_FILE
    from tools.model_versions.versions import newest_artifacts

    artifact = newest_artifacts(found.version).get("exam") if found is not None else None
    if artifact is None:
        raise RequestError(
            "The recipe's exam is written by a run, and "
            + (f"that of {found.described} has written none." if found is not None else "no version is promoted.")
            + " Name a version whose run has written one, e.g. VERSION=1 (`make models` lists them), or a file of questions: "
            "--set exam.path=my_exam.jsonl"
        )
    folder: Path = artifact.load().path
    if not (folder / EXAM_FILE).stat().st_size:
        raise RequestError(
            f"The documents of {found.described if found else 'the version'} gave too few questions for an exam. Name a file of "
            "your own questions: --set exam.path=my_exam.jsonl"
        )
    return folder


def _print(data: dict[str, Any], seed: int, file: Any) -> None:
    """Print the share of right answers by the kind of questions, and the drawn questions."""
    from tools.results import exam_table
    from tools.terminal import console

    shown = console(file)
    shown.print(_accuracy(data))
    shown.print(exam_table(data["exam"], data["newest"], seed))


def _accuracy(data: dict[str, Any]) -> Table:
    from rich.table import Table

    from llm_engineering.recipe.evaluation_blocks import EXAM_MEASURES
    from llm_engineering.reports.exam_report import KINDS
    from llm_engineering.reports.page import estimated

    exam, measures = data["exam"], data["measures"]
    shown = Table("Questions", "Number", *exam["models"], title="Exam: share of right answers", title_justify="left")
    for kind, measure in EXAM_MEASURES.items():
        if measure in measures:
            estimates = [measures[measure]["models"].get(name) for name in exam["models"]]
            values = [estimated(e) if e else "" for e in estimates]
            shown.add_row(KINDS[kind], str(exam["kinds"][kind]), *values)
    return shown
