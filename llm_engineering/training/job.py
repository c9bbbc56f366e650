"""A training run as a file that other processes and machines read, and the files with their results.

No file holds a secret. This module imports neither torch nor transformers: unsloth has to be imported before them.
"""

from __future__ import annotations

import time
import traceback
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, ValidationError

from llm_engineering.errors import RequestError
from llm_engineering.recipe.block import Block
from llm_engineering.recipe.training_blocks import TrainingSetup

# In the folder `report`.
SUMMARY_FILE = "report.json"


class TrainingResult(NamedTuple):
    """Two folders, `adapter` and `report`, and the summary that `report` holds as JSON."""

    adapter: Path
    report: Path
    summary: dict[str, Any]


# Both stand beside the job.
RESULT_FILE = "result.json"
_FAILURE = "failure-"

Stage = Literal["sft", "dpo"]


class Job(Block):
    """One stage with all that it needs.

    Attributes:
        config: the stage's block of the recipe, which the stage reads; one of another stage is none of its business,
            so that a change of DPO's code does not train SFT anew.
        data: a DatasetDict on disk, formatted, with the splits `train` and `validation`; None before it is written.
        start: for `dpo`, the folder of the SFT adapter or of the full SFT model.
        parameters: what Comet gets besides the hyperparameters.
    """

    stage: Stage
    config: dict[str, Any]
    setup: TrainingSetup
    data: Path | None = None
    start: Path | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)
    resume_from: Path | None = None


class Result(Block):
    """Where the trained model and its report are."""

    adapter: Path
    report: Path


class Failure(Block):
    """How a process failed: the error's class and sentence; of an unexpected one, the traceback too."""

    rank: int
    time: float
    kind: str
    message: str
    traceback: str


def read_job(path: Path) -> Job:
    """The job of a file.

    Raises:
        RequestError: it cannot be read, or holds no job.
    """
    try:
        return Job.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"The job {path} cannot be read ({error.strerror}).") from error
    except ValidationError as error:
        raise RequestError(f"{path} holds no training job: {error.errors()[0]['msg']}.") from error


def write_failure(folder: Path, rank: int, error: Exception) -> None:
    """Leave word of an error for the process that started this one."""
    failure = Failure(
        rank=rank,
        time=time.time(),
        kind=type(error).__name__,
        message=str(error),
        traceback="".join(traceback.format_exception(error)),
    )
    (folder / f"{_FAILURE}{rank}.json").write_text(failure.model_dump_json(), encoding="utf-8")


def read_failures(folder: Path) -> list[Failure]:
    """Failures of the worker processes, in the order of their time."""
    found = [Failure.model_validate_json(file.read_text(encoding="utf-8")) for file in folder.glob(f"{_FAILURE}*.json")]
    return sorted(found, key=lambda failure: failure.time)
