"""A run that a schedule started: one at a time, only where there is something new, and its verdict is kept.

New is what differs from the last run that this schedule brought to a judgement: documents, datasets, files of the
evaluation, the recipe but for where it runs and what is published, the base model's revision, the code of a step.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import boto3
from llm_engineering.cloud.schedules.notify import notify, without_secrets
from llm_engineering.cloud.schedules.run_records import JOB_VARIABLE, Place, RunRecord, job_prefix
from llm_engineering.recipe.loading import recipe_hash
from llm_engineering.recipe.recipe import Recipe
from llm_engineering.recipe.settings import Settings

from llm_engineering.generation.store import STORE_FILE
from pipelines.inputs import Inputs

logger = logging.getLogger("llm_engineering.run")

# What a record keeps of an error; the log has all of it.
_REASON_CHARACTERS = 1000
_SIGNAL_IN_JOB = (
    "its job was stopped, reached max_run_s, or lost its spot machine, after which SageMaker starts it again by itself"
)


class Scheduled:
    """The run of a schedule that this process is."""

    def __init__(self, place: str) -> None:
        self.place = Place(place)
        now = datetime.now(UTC)
        self.record = RunRecord(run=os.environ.get(JOB_VARIABLE) or f"{now:%Y%m%dT%H%M%S}-{os.getpid()}", began=now)

    def run(self, work: Callable[[Scheduled], int]) -> int:
        """Do the work if no other run of this schedule is at it; returns its exit code, 0 if it is skipped.

        What it raises is kept as the verdict, told to people, and raised again.
        """
        try:
            with self._lock() as is_first:
                if not is_first:
                    return self.skip("running")
                self.place.write(self.record)
                # Else every run would pay for all answers anew.
                with self.place.kept(Settings().llm_output_dir / STORE_FILE):
                    return work(self)
        except KeyboardInterrupt:
            self._fail("interrupted", _SIGNAL_IN_JOB if self.place.in_s3 else "a signal ended it")
            raise
        except Exception as error:  # Whatever it is, it is kept and raised again.
            self._fail("failed", str(error) or type(error).__name__)
            raise

    def is_new(self, recipe: Recipe, inputs: Inputs) -> bool:
        """Whether anything differs from the last run that was judged; remembers what this one reads and does."""
        self.record = self.record.model_copy(update={"fingerprint": fingerprint(recipe, inputs)})
        former = next((record for record in self.place.records() if record.is_complete), None)
        return former is None or former.fingerprint != self.record.fingerprint

    def skip(self, why: str) -> int:
        """End without work, which is no failure."""
        self._end("skipped", why)
        logger.info("skipped: %s", why)
        return 0

    def judged(self, run_id: str, version: int | None, decision: dict[str, Any]) -> None:
        """Keep what the gate said: the dump of a PromotionDecision."""
        outcome = {"failed": "gate failed", "stale": "stale"}.get(decision["outcome"])
        if outcome is None:
            outcome = "promoted" if decision["stage"] == "production" else "staged"
        if outcome == "gate failed":
            reason = "; ".join(rule["name"] for rule in decision["rules"] if rule["verdict"] == "failed")
        else:
            reason = decision["reason"] if outcome == "stale" else f"version {version}"
        self.record = self.record.model_copy(update={"run_id": run_id, "version": version})
        self._end(outcome, reason)

    def _end(self, outcome: str, reason: str) -> None:
        self._ended(outcome, reason)
        self.place.write(self.record)

    def _fail(self, outcome: str, reason: str) -> None:
        self._ended(outcome, reason)
        # First: what went wrong may be that nothing can be written.
        notify(
            f"Retraining {self.place.schedule} {outcome}",
            f"{self.record.reason}\nRun {self.record.run}, began {self.record.began:%Y-%m-%d %H:%M} UTC. "
            "`make schedules` lists the last runs.",
            Settings(),
        )
        self.place.write(self.record)

    def _ended(self, outcome: str, reason: str) -> None:
        reason = without_secrets(reason, Settings())
        if len(reason) > _REASON_CHARACTERS:
            reason = f"{reason[:_REASON_CHARACTERS]} …"
        update = {"outcome": outcome, "reason": reason, "ended": datetime.now(UTC)}
        self.record = self.record.model_copy(update=update)

    @contextmanager
    def _lock(self) -> Iterator[bool]:
        """Whether this is the only run of the schedule, or the first of several."""
        if self.place.in_s3:
            yield self._is_oldest_job()
        else:
            with self.place.lock() as is_first:
                yield is_first

    def _is_oldest_job(self) -> bool:
        """Of the jobs of this schedule that run, the one that was created first goes on."""
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
    """Twelve hex digits that change with what a run reads, makes of it, and does."""
    from pipelines import chain
    from tools.plan import planned_steps

    steps = {name: getattr(chain, name) for name in planned_steps("retrain", recipe)}
    return recipe_hash(
        {
            "recipe": recipe.model_dump(mode="json", exclude={"compute", "tracking", "hub"}),
            "inputs": inputs.model_dump(mode="json", exclude={"code", "incumbent"}),
            "code": {name: step.configuration.environment["CODE_VERSION"] for name, step in steps.items()},
        }
    )
