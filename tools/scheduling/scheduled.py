"""One run of a schedule. It is skipped if another run of the schedule is in progress, or if nothing has changed.

A run compares itself with the last run of the schedule that judged a model. It looks at the documents, the datasets,
what people said, the evaluation's files, the recipe (without `compute`, `tracking`, `serving` and `hub`), the base
model's revision, and the code of the steps. The outcome of every run is recorded.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import boto3

from llm_engineering.cloud.schedules.notify import notify_of_run, without_secrets
from llm_engineering.cloud.schedules.run_records import JOB_VARIABLE, Place, RunRecord, job_prefix
from llm_engineering.generation.store import STORE_FILE
from llm_engineering.recipe.loading import recipe_hash
from llm_engineering.recipe.recipe import Recipe
from llm_engineering.recipe.settings import Settings
from pipelines.inputs import Inputs

logger = logging.getLogger("llm_engineering.run")

# Maximum length of an error in a record. The log has the full error.
_REASON_CHARACTERS = 1000
_SIGNAL_IN_JOB = "the job was stopped, reached max_run_s, or lost its spot machine (SageMaker then restarts it)"


class Scheduled:
    """This process as a run of a schedule.

    Args:
        place: the schedule's folder, or its address in S3.
    """

    def __init__(self, place: str) -> None:
        self.place = Place(place)
        now = datetime.now(UTC)
        self.record = RunRecord(run=os.environ.get(JOB_VARIABLE) or f"{now:%Y%m%dT%H%M%S}-{os.getpid()}", began=now)

    def run(self, work: Callable[[Scheduled], int]) -> int:
        """Do the work if no other run of this schedule is in progress; returns its exit code, 0 if it is skipped.

        An error is recorded as the outcome, reported in a notification, and raised again.
        """
        try:
            with self._lock() as is_first:
                if not is_first:
                    return self.skip("running")
                self.place.write(self.record)
                # Stored answers of the endpoint are reused. Otherwise, every run would pay for all answers again.
                with self.place.kept(Settings().llm_output_dir / STORE_FILE):
                    return work(self)
        except KeyboardInterrupt:
            self._end("interrupted", _SIGNAL_IN_JOB if self.place.in_s3 else "a signal ended the run")
            raise
        except Exception as error:  # Every error is recorded and raised again.
            self._end("failed", str(error) or type(error).__name__)
            raise

    def is_new(self, recipe: Recipe, inputs: Inputs) -> bool:
        """Whether anything differs from the last run that judged a model. Adds the fingerprint to this run's record."""
        self.record = self.record.model_copy(update={"fingerprint": fingerprint(recipe, inputs)})
        former = next((record for record in self.place.records() if record.is_complete), None)
        return former is None or former.fingerprint != self.record.fingerprint

    def skip(self, why: str) -> int:
        """End the run without work; returns exit code 0."""
        self._end("skipped", why)
        logger.info("skipped: %s", why)
        return 0

    def judged(self, run_id: str, version: int | None, decision: dict[str, Any]) -> None:
        """Record the gate's decision; `decision` is a PromotionDecision dumped to a dict."""
        outcome = {"failed": "gate failed", "stale": "stale"}.get(decision["outcome"])
        if outcome is None:
            # A version that passed and was not moved is in production already.
            outcome = "staged" if decision["stage"] == "staging" else "promoted"
        if outcome == "gate failed":
            reason = "; ".join(rule["name"] for rule in decision["rules"] if rule["verdict"] == "failed")
        else:
            reason = decision["reason"] if outcome == "stale" else f"version {version}"
        self.record = self.record.model_copy(update={"run_id": run_id, "version": version})
        self._end(outcome, reason)

    def _end(self, outcome: str, reason: str) -> None:
        reason = without_secrets(reason, Settings())
        if len(reason) > _REASON_CHARACTERS:
            reason = f"{reason[:_REASON_CHARACTERS]} …"
        update = {"outcome": outcome, "reason": reason, "ended": datetime.now(UTC)}
        self.record = self.record.model_copy(update=update)
        # Notify before writing: if the run ended because nothing can be written, writing the record fails too.
        notify_of_run(self.record, self.place.schedule, Settings())
        self.place.write(self.record)

    @contextmanager
    def _lock(self) -> Iterator[bool]:
        """Lock the schedule during the block; yields False if an earlier run of it is in progress."""
        if self.place.in_s3:
            yield self._is_oldest_job()
        else:
            with self.place.lock() as is_first:
                yield is_first

    def _is_oldest_job(self) -> bool:
        """Whether this job is the oldest running job of the schedule. Only the oldest one does the work."""
        prefix = job_prefix(self.place.schedule)
        pages = boto3.client("sagemaker").get_paginator("list_training_jobs")
        jobs = [
            (job["CreationTime"], job["TrainingJobName"])
            for page in pages.paginate(NameContains=prefix, StatusEquals="InProgress")
            for job in page["TrainingJobSummaries"]
            if job["TrainingJobName"].startswith(prefix)
        ]
        return not jobs or min(jobs)[1] == self.record.run


def fingerprint(recipe: Recipe, inputs: Inputs) -> str:
    """A hash (12 hex digits) of everything that decides a run's result: recipe, inputs, and code of the steps."""
    from pipelines.chain import retrain

    pipeline = retrain.copy()
    pipeline.prepare(recipe=recipe, inputs=inputs)
    return recipe_hash(
        {
            "recipe": recipe.model_dump(mode="json", exclude={"compute", "tracking", "serving", "hub"}),
            "inputs": inputs.model_dump(mode="json", exclude={"code", "incumbent"}),
            "code": {
                name: made.step.configuration.environment["CODE_VERSION"] for name, made in pipeline.invocations.items()
            },
        }
    )
