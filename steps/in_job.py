"""Runs a step that uses a model as a SageMaker job: python -m steps.in_job MODULE STEP [MODEL], in the job.

The step's inputs travel to the job, and its output and facts come back into the same run, where the step ends as if it had
computed them here. The cache key does not depend on the place.
"""

import inspect
import json
import logging
import shutil
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from datasets import DatasetDict, disable_caching, load_from_disk
from pydantic import BaseModel, TypeAdapter
from zenml import log_metadata
from zenml.utils.source_utils import set_custom_source_root

from llm_engineering.cloud.package import PROJECT_ROOT, folder_hash
from llm_engineering.cloud.sagemaker.dispatch import run_job
from llm_engineering.cloud.sagemaker.request import INPUTS, MODEL, RESULTS
from llm_engineering.cloud.sagemaker.step_dispatch import ARGUMENTS, FACTS, FILES, OUTPUT, StepWork
from llm_engineering.cloud.sagemaker.weights import is_copied
from llm_engineering.cloud.schedules.job_recipe import with_job_files
from llm_engineering.data.storage import work_folder
from llm_engineering.errors import INTERRUPTED, RequestError, WorkError
from llm_engineering.feedback.people import snapshots
from llm_engineering.recipe.compute_blocks import ComputeConfig
from llm_engineering.recipe.evaluation_blocks import EvaluationConfig, ExamConfig
from llm_engineering.recipe.recipe import Recipe
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.training_blocks import TrainingSetup
from steps import logging as step_logging
from steps.materializers import Directory, save_dataset


def dispatched(function: Callable[..., Any], recipe: Recipe, arguments: dict[str, Any]) -> Any:
    """Run a step's function in a job; returns its output, and logs its facts."""
    config, settings = recipe.compute.sagemaker, Settings()
    assert config is not None
    compute = recipe.compute.in_job.one_process
    evaluation = next((value for value in arguments.values() if isinstance(value, EvaluationConfig)), None)
    exam = next((value for value in arguments.values() if isinstance(value, ExamConfig)), None)
    files: dict[str, Path] = {}
    if evaluation is not None:
        evaluation, exam, files = with_job_files(evaluation, exam)
    if arguments.get("judged") is not None:
        said = snapshots(settings) / f"{arguments['judged']}.json"
        files[str(said.relative_to(settings.llm_output_dir))] = said
    # The folders by channel. Datasets and files share a channel each, because a job has at most 20.
    folders: dict[str, Path] = {}
    data, own = work_folder(), work_folder()
    for place, file in files.items():
        (own / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, own / place)
    values: dict[str, Any] = {}

    model = recipe.model.name_or_path
    if Path(model).expanduser().is_dir():
        folders[MODEL] = Path(model).expanduser()
    for name, value in arguments.items():
        match value:
            case DatasetDict():
                save_dataset(value, str(data / name))
            case Directory():
                folders[name] = value.path
            case ComputeConfig():
                values[name] = compute
            case TrainingSetup():
                values[name] = value.model_copy(update={"compute": compute})
            case EvaluationConfig():
                values[name] = evaluation
            case ExamConfig() if evaluation is not None:
                values[name] = exam
            case _:
                values[name] = value
    linked = [model] if MODEL in folders or is_copied(config, recipe.model) else []
    plain = {
        name: value.model_dump(mode="json") if isinstance(value, BaseModel) else value for name, value in values.items()
    }
    folders |= {channel: folder for channel, folder in (("data", data), (FILES, own)) if any(folder.iterdir())}
    work = StepWork(
        function.__name__.replace("_", "-"),
        [
            "python",
            "-m",
            "steps.in_job",
            function.__module__,
            function.__name__,
            *linked,
        ],
        plain,
        {channel: (folder, folder_hash(folder)) for channel, folder in folders.items()},
        recipe.model,
        config,
        settings,
        recipe.name,
    )
    folder = run_job(work, lambda facts: log_metadata(metadata=facts))
    for artifact, facts in json.loads((folder / FACTS).read_text(encoding="utf-8")).items():
        step_logging.log_artifact(artifact, **facts)
    output = folder / OUTPUT
    return load_from_disk(str(output)) if (output / "dataset_dict.json").is_file() else Directory(path=output)


def main() -> int:
    """Run a step in a job; returns the exit code."""
    module, name, *models = sys.argv[1:]
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    set_custom_source_root(str(PROJECT_ROOT))
    # The folder of the inputs may be read-only.
    disable_caching()
    step_logging.collected = {}
    for model in models:
        link_model(Path(model).expanduser(), Path(INPUTS, MODEL))
    try:
        function = inspect.unwrap(getattr(import_module(module), name).entrypoint)
        output = function(**_arguments(function, Path(INPUTS)))
    except (RequestError, WorkError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    results = Path(RESULTS)
    if isinstance(output, DatasetDict):
        save_dataset(output, str(results / OUTPUT))
    else:
        shutil.copytree(output.path, results / OUTPUT)
    (results / FACTS).write_text(json.dumps(step_logging.collected), encoding="utf-8")
    return 0


def link_model(place: Path, folder: Path) -> None:
    """Let the folder of the base model have the path or the name on the hub that the recipe gives it.

    Adapters, and what is stored about models, name the base model so.
    """
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(folder, target_is_directory=True)


def _arguments(function: Callable[..., Any], inputs: Path) -> dict[str, Any]:
    """The arguments of a step, from the folders of the job's channels."""
    annotations = {name: p.annotation for name, p in inspect.signature(function).parameters.items()}
    given = json.loads((inputs / "job" / ARGUMENTS).read_text(encoding="utf-8"))
    arguments: dict[str, Any] = dict.fromkeys(name for name, value in given.items() if value is None)
    for name in given.keys() - arguments.keys():
        arguments[name] = TypeAdapter(annotations[name]).validate_json(json.dumps(given[name]))
    for name in annotations.keys() - given.keys():
        if (inputs / "data" / name).is_dir():
            arguments[name] = load_from_disk(str(inputs / "data" / name))
        elif (inputs / name).is_dir():
            arguments[name] = Directory(path=inputs / name)
    return arguments


if __name__ == "__main__":
    sys.exit(main())
