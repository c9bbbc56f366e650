"""Runs work as a SageMaker job: starts or resumes it, follows it, downloads its results, logs its cost.

The work is a training stage here, or another step of the chain (`step_dispatch`).
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from botocore.exceptions import ClientError
from datasets import DatasetDict

from llm_engineering.cloud.package import folder_hash, job_on_machine, rename_base, training_command
from llm_engineering.cloud.sagemaker import jobs
from llm_engineering.cloud.sagemaker.account import Account
from llm_engineering.cloud.sagemaker.cost import Price, cost_facts, cost_line, price_of
from llm_engineering.cloud.sagemaker.failures import explain, is_capacity, translated
from llm_engineering.cloud.sagemaker.jobs import JobLog, Signals, follow
from llm_engineering.cloud.sagemaker.request import (
    INPUTS,
    MODEL,
    RESULTS,
    Machine,
    machines,
    machines_after,
    training_job_request,
)
from llm_engineering.cloud.sagemaker.s3 import fetch_results, is_there, upload_code, upload_folder
from llm_engineering.cloud.sagemaker.weights import hub_weights, is_copied
from llm_engineering.errors import RequestError
from llm_engineering.recipe.compute_blocks import SageMakerConfig
from llm_engineering.recipe.loading import differences
from llm_engineering.recipe.settings import Settings
from llm_engineering.training.processes.job import Job, TrainingResult

logger = logging.getLogger(__name__)

# Environment variable that holds the job name given with --attach. The stage to which this job belongs unsets it.
ATTACH = "LLM_ATTACH_JOB"


Result = TypeVar("Result")


def dispatch_training(
    job: Job, data: DatasetDict, settings: Settings, recipe: str, record: Callable[[dict[str, Any]], None]
) -> TrainingResult:
    """Train a stage as a SageMaker job; `launch_training` does the same on this machine.

    Args:
        job: the work of the stage. Its own `data` is not used. The machines are in `setup.compute.sagemaker`.
        recipe: the recipe's name; the job's name begins with it.
        record: see `run_job`, which also says what is raised.
    """
    return run_job(_Stage(job, data, settings, recipe), record)


def run_job(work: Work[Result], record: Callable[[dict[str, Any]], None]) -> Result:
    """Do a work as a job; returns its result.

    If there is an earlier job with the same identity, its state decides what happens:
    - The job still runs: this function follows it.
    - The job completed, but its results were not downloaded yet: this function downloads them.
    - The job failed or was stopped: a new job resumes from its checkpoints.

    Args:
        record: called with the job's facts (see `Work.facts`) when this function begins to follow the job, and again
            when the job has ended.

    Raises:
        RequestError: role, bucket or image are not set, or the job to attach to does other work.
        WorkError: AWS refuses a request, or the job did not complete. The message has the reason, a remedy and the
            end of the log.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the job was stopped, or keeps running.
    """
    with translated("SageMaker's jobs cannot be looked up"):
        current = work.attached() or work.unfinished()
    is_found = current is not None
    if current is None:
        with translated(f"The inputs of {work.name} cannot be uploaded"):
            work.upload()
    with Signals() as signals:
        if current is None:
            with translated(f"A job for {work.name} cannot be started"):
                current = work.start(machines(work.config))
        while True:
            record(work.facts(current))
            name, tried = current["TrainingJobName"], Machine.of(current)
            remaining, has_waited = machines_after(work.config, tried), False
            log = JobLog(work.account.client("logs"), name, from_end=is_found)
            try:
                with translated(f"Job {name} keeps running, but cannot be followed"):
                    current = follow(work.client, log, name, signals, work.config.max_pending_s if remaining else None)
                    if jobs.is_running(current):
                        logger.warning(
                            "Job %s has waited for %s for more than %d s (compute.sagemaker.max_pending_s): stopping it",
                            name,
                            tried,
                            work.config.max_pending_s,
                        )
                        jobs.stop(work.client, name)
                        current = follow(work.client, log, name, signals)
                        has_waited = current["TrainingJobStatus"] == "Stopped"
            except KeyboardInterrupt:
                current = jobs.describe(work.client, name)
                raise
            finally:
                if not jobs.is_running(current):
                    record(work.facts(current))
                    logger.info("Job %s: %s", name, cost_line(current, work.price(current)))
            if current["TrainingJobStatus"] == "Completed":
                break
            if not remaining or not (has_waited or is_capacity(current)):
                raise explain(current, list(log.last))
            if signals.received is not None:
                raise KeyboardInterrupt("no job was started on the next instance type")
            logger.warning("No capacity of %s: trying %s", tried, remaining[0])
            with translated(f"A job for {work.name} cannot be started"):
                work.former, is_found = current, False
                current = work.start(remaining)
    with translated(f"The results of job {current['TrainingJobName']} cannot be downloaded"):
        return work.fetch(current)


class Work(ABC, Generic[Result]):
    """A part of the chain and its jobs.

    Attributes:
        name: letters, digits and hyphens.
        identity: everything that decides the result, see `jobs.job_identity`.
        former: DescribeTrainingJob's answer for the newest job of the same identity; None if there is no such job.
    """

    environment: ClassVar[dict[str, str]] = {}

    def __init__(
        self, name: str, identity: dict[str, Any], config: SageMakerConfig, settings: Settings, recipe: str
    ) -> None:
        self.name, self.identity, self.config, self.settings, self.recipe = name, identity, config, settings, recipe
        self.account = Account.resolve(self.config, settings)
        self.client = self.account.client("sagemaker")
        self.names = jobs.JobNames.of(recipe, name, self.identity)
        self.former: dict[str, Any] | None = None
        self._channels: dict[str, str] = {}
        self._prices: dict[str, Price | None] = {}
        self._costs: dict[str, float | None] = {}

    def attached(self) -> dict[str, Any] | None:
        """The job that --attach names, if it belongs to this work.

        Raises:
            RequestError: the job has another identity, or ended without a result.
        """
        name = os.environ.get(ATTACH)
        if name is None:
            return None
        description = jobs.describe(self.client, name)
        if jobs.tags_of(self.client, description).get(jobs.STAGE) != self.name:
            return None
        del os.environ[ATTACH]
        different = differences(self._identity_of(description), json.loads(json.dumps(self.identity)))
        if different:
            raise RequestError(
                f"Job {name} does other work: it differs in {', '.join(different)}. Use the recipe, the data and "
                "the code that it was started with, or leave --attach out."
            )
        if description["TrainingJobStatus"] in ("Failed", "Stopped"):
            raise RequestError(
                f"Job {name} is {description['TrainingJobStatus'].lower()}: there is nothing to attach to. Leave --attach "
                "out: a new job then resumes from its newest checkpoint."
            )
        return description

    def _identity_of(self, description: dict[str, Any]) -> dict[str, Any]:
        (uri,) = [
            channel["DataSource"]["S3DataSource"]["S3Uri"]
            for channel in description["InputDataConfig"]
            if channel["ChannelName"] == "job"
        ]
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        answer = self.account.client("s3").get_object(Bucket=bucket, Key=f"{key.rstrip('/')}/identity.json")
        identity: dict[str, Any] = json.loads(answer["Body"].read())
        return identity

    def unfinished(self) -> dict[str, Any] | None:
        """The newest job of this identity, if it runs or its results were not downloaded yet."""
        self.former = self.names.newest(self.client)
        if self.former is None:
            return None
        name, status = self.former["TrainingJobName"], self.former["TrainingJobStatus"]
        if status == "InProgress":
            logger.info("Job %s already does this work: following it", name)
            return self.former
        if status == "Stopping":
            logger.info("Job %s is being stopped: waiting for its last checkpoint", name)
            with Signals() as signals:
                self.former = follow(self.client, JobLog(self.account.client("logs"), name, True), name, signals)
        if self.former["TrainingJobStatus"] != "Completed":
            logger.info("Job %s did not complete: a new job resumes from its newest checkpoint", name)
            return None
        if jobs.FETCHED in jobs.tags_of(self.client, self.former):
            return None
        if not is_there(self.account, self.former["ModelArtifacts"]["S3ModelArtifacts"]):
            logger.warning("Job %s did this work, but its results are no longer in S3: starting a new job", name)
            return None
        when = self.former["CreationTime"].strftime("%Y-%m-%d %H:%M")
        logger.info("Job %s of %s did this work: downloading its results", name, when)
        return self.former

    def start(self, choices: Sequence[Machine]) -> dict[str, Any]:
        """Upload the inputs and create a job on the first of these machines that the quota allows."""
        for other in self.names.running_others(self.client):
            logger.warning(
                "Job %s of this recipe and stage still runs, and differs in data, settings or code. It is not followed, and "
                "it is paid until it ends. `aws sagemaker stop-training-job --training-job-name %s` stops it",
                other,
                other,
            )
        number = 1 if self.former is None else self.names.number(self.former["TrainingJobName"]) + 1
        name = self.names.name(number)
        channels = {**self.upload(), "job": self.upload_job(name)}
        tags = {jobs.STAGE: self.name, jobs.IDENTITY: self.names.digest, jobs.RECIPE: self.recipe}
        requests = {
            machine: training_job_request(
                name,
                self.command(),
                channels,
                self.environment,
                self._checkpoints(name),
                self.account.uri("results"),
                self.config.model_copy(update={"instance_type": machine.instance_type, "use_spot": machine.spot}),
                self.account,
                tags,
            )
            for machine in choices
        }
        description, is_new = jobs.create_first(self.client, requests)
        kind, spot = Machine.of(description)
        started = "started on" if is_new else "was started by another process; following it, on"
        logger.info("Job %s %s %d x %s%s", name, started, self.config.instance_count, kind, " (spot)" if spot else "")
        return description

    def _checkpoints(self, name: str) -> str:
        """The address of the job's checkpoints. If the former job did not complete, the new job shares its checkpoints."""
        former = self.former
        if former is not None and former["TrainingJobStatus"] != "Completed":
            uri: str = former["CheckpointConfig"]["S3Uri"]
            if uri.startswith(f"s3://{self.account.bucket}/"):
                return uri
            logger.warning(
                "The checkpoints of the former job are in another bucket, %s: training starts from the beginning", uri
            )
        return self.account.uri("checkpoints", name)

    def price(self, description: dict[str, Any]) -> Price | None:
        """The price of a job's machine; None if it is not known, or paid with a training plan."""
        kind = description["ResourceConfig"]["InstanceType"]
        if kind not in self._prices and self.config.training_plan_arn is None:
            self._prices[kind] = price_of(kind, self.account)
        return self._prices.get(kind)

    def facts(self, description: dict[str, Any]) -> dict[str, Any]:
        """Name, status and machines of a job, and its seconds when it has ended; keys begin with `sagemaker_`.

        `sagemaker_cost_usd_estimate` is the cost of all ended jobs of this work that were followed, if their prices are known.
        """
        resources = description["ResourceConfig"]
        facts = {
            "name": description["TrainingJobName"],
            "arn": description["TrainingJobArn"],
            "status": description["TrainingJobStatus"],
            "instance_type": resources["InstanceType"],
            "instance_count": resources["InstanceCount"],
            "spot": bool(description.get("EnableManagedSpotTraining")),
        }
        if not jobs.is_running(description):
            facts |= cost_facts(description, self.price(description))
            self._costs[facts["name"]] = facts.pop("cost_usd_estimate", None)
            known = [cost for cost in self._costs.values() if cost is not None]
            if len(known) == len(self._costs):
                facts["cost_usd_estimate"] = round(sum(known), 4)
        return {f"sagemaker_{name}": value for name, value in facts.items()}

    def downloaded(self, description: dict[str, Any]) -> None:
        """Mark a job whose results were downloaded."""
        when = {"Key": jobs.FETCHED, "Value": datetime.now(UTC).isoformat(timespec="seconds")}
        try:
            self.client.add_tags(ResourceArn=description["TrainingJobArn"], Tags=[when])
        except ClientError as error:
            # Without the mark, the same work downloads these results once more instead of starting a new job.
            logger.warning("Job %s cannot be marked as fetched: %s", description["TrainingJobName"], error)

    @abstractmethod
    def command(self) -> list[str]:
        """The command that the job runs."""

    @abstractmethod
    def upload(self) -> dict[str, str]:
        """Upload code and inputs once for all jobs of the work; returns the addresses by channel."""

    @abstractmethod
    def upload_job(self, name: str) -> str:
        """Upload what belongs to the job of this name, with `identity.json`; returns the address."""

    @abstractmethod
    def fetch(self, description: dict[str, Any]) -> Result:
        """Download the results of a completed job, and mark the job."""


class _Stage(Work[TrainingResult]):
    """A training stage and its jobs."""

    def __init__(self, job: Job, data: DatasetDict, settings: Settings, recipe: str) -> None:
        config = job.setup.compute.sagemaker
        assert config is not None
        super().__init__(job.stage, jobs.job_identity(job, data), config, settings, recipe)
        self.job, self.data = job, data

    def command(self) -> list[str]:
        """The command of the training."""
        processes = self.job.setup.compute.num_processes
        return training_command(processes, self.config.instance_count, f"{INPUTS}/job/job.json", RESULTS)

    def upload(self) -> dict[str, str]:
        """Upload code, data and models once for all jobs of the stage; returns the addresses by channel."""
        if self._channels:
            return self._channels
        with tempfile.TemporaryDirectory() as folder:
            self.data.save_to_disk(folder)
            content = folder_hash(Path(folder))
            channels = {
                "code": upload_code(self.account),
                "data": upload_folder(self.account, Path(folder), "data", content),
            }
        models = {"start": self.job.start, "reward_model": self.job.reward_model, MODEL: self._model}
        for channel, model in models.items():
            if model is not None:
                channels[channel] = upload_folder(self.account, model, "models", folder_hash(model))
        if is_copied(self.config, self.job.setup.model):
            channels[MODEL] = hub_weights(self.account, self.job.setup.model, self.settings)
        self._channels = channels
        return channels

    @cached_property
    def _model(self) -> Path | None:
        """The base model's folder if it is on this machine. It must be uploaded, because the job cannot see it."""
        folder = Path(self.job.setup.model.name_or_path).expanduser()
        return folder if folder.is_dir() else None

    @property
    def _reads_channel(self) -> bool:
        """Whether the job reads the base model from S3."""
        return self._model is not None or is_copied(self.config, self.job.setup.model)

    def upload_job(self, name: str) -> str:
        """Upload the description of the stage's work."""
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            job = job_on_machine(self.job, INPUTS, f"{INPUTS}/{MODEL}" if self._reads_channel else None)
            (folder / "job.json").write_text(job.model_dump_json(indent=1), encoding="utf-8")
            (folder / "identity.json").write_text(json.dumps(self.identity, indent=1), encoding="utf-8")
            # Another start of this name may have other settings of the trackers, which the identity does not cover.
            return upload_folder(self.account, folder, "jobs", name, folder_hash(folder))

    def fetch(self, description: dict[str, Any]) -> TrainingResult:
        """Download adapter and report of a completed job, and mark the job as fetched."""
        name, uri = description["TrainingJobName"], description["ModelArtifacts"]["S3ModelArtifacts"]
        folder = fetch_results(self.account, uri, name, self.settings.llm_output_dir)
        adapter, report = folder / "adapter", folder / "report" / "report.json"
        if self._reads_channel:
            rename_base(adapter / "adapter_config.json", self.job.setup.model.name_or_path)
        summary = json.loads(report.read_text(encoding="utf-8")) | {"sagemaker": self.facts(description)}
        report.write_text(json.dumps(summary, indent=2), encoding="utf-8")
        self.downloaded(description)
        return TrainingResult(adapter, report.parent, summary)
