"""Describes a training run as a file for other processes and machines, and reads the files with their results.

No file contains a secret. This module imports neither torch nor transformers, because unsloth must be imported first.
"""

from __future__ import annotations

import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field, ValidationError

from llm_engineering.errors import RequestError
from llm_engineering.recipe.block import Block
from llm_engineering.recipe.training_blocks import TrainingSetup

# Name of the summary's file in the folder `report`.
SUMMARY_FILE = "report.json"
# The name of the pipeline's run among the parameters. A training outside of a pipeline has none.
RUN_ID = "run_id"


class TrainingResult(NamedTuple):
    """The folders of the trained model and of its report, and the summary. The report folder has it as JSON too."""

    adapter: Path
    report: Path
    summary: dict[str, Any]


# Files in the job's folder: the result, and `failure-<rank>.json` for each process that failed.
RESULT_FILE = "result.json"
_FAILURE = "failure-"


class Job(Block):
    """Everything that the training of one stage needs.

    Attributes:
        stage: the stage's name in the table of stages.
        config: the stage's block of the recipe. It is a plain dict, so that this class does not depend on the config
            classes of all stages: a change of DPO's code must not cause SFT to train again.
        data: folder of a formatted DatasetDict with the splits `train` and `validation`; None until it is written.
        start: the folder of the adapter or full model that the stage starts from; None for the base model.
        parameters: logged by the trackers beside the hyperparameters.
        resume_from: checkpoint folder to resume from instead of the newest one.
        reward_model: the folder of the model of the reward `reward_model`; None if the stage has no such reward.
    """

    stage: str
    config: dict[str, Any]
    setup: TrainingSetup
    data: Path | None = None
    start: Path | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)
    resume_from: Path | None = None
    reward_model: Path | None = None


class Result(Block):
    """The folders of the trained model and of its report."""

    adapter: Path
    report: Path


class Failure(Block):
    """The error that ended a process: its class, message and traceback."""

    rank: int
    time: float
    kind: str
    message: str
    traceback: str


def read_job(path: Path) -> Job:
    """Read a job from its file.

    Raises:
        RequestError: the file cannot be read, or is not a job.
    """
    try:
        return Job.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"The job {path} cannot be read ({error.strerror}). Check --job.") from error
    except ValidationError as error:
        message = error.errors()[0]["msg"]
        raise RequestError(f"{path} is not a training job: {message}. Check --job.") from error


def write_failure(folder: Path, rank: int, error: Exception) -> None:
    """Write an error to the job's folder, for the process that started this one."""
    failure = Failure(
        rank=rank,
        time=time.time(),
        kind=type(error).__name__,
        message=str(error),
        traceback="".join(traceback.format_exception(error)),
    )
    (folder / f"{_FAILURE}{rank}.json").write_text(failure.model_dump_json(), encoding="utf-8")


def read_failures(folder: Path) -> list[Failure]:
    """Failures of the worker processes, earliest first."""
    files = folder.glob(f"{_FAILURE}*.json")
    failures = [Failure.model_validate_json(file.read_text(encoding="utf-8")) for file in files]
    return sorted(failures, key=lambda failure: failure.time)
