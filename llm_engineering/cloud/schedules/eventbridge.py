"""Schedules of EventBridge Scheduler, each of which starts one training job that retrains.

A schedule has a group of its own, for CloudWatch counts the starts that failed by group, and with a topic for
notifications a rule and an alarm, all of one name. What belongs to it in S3 is in one folder. The target is the API call
itself (`aws-sdk:sagemaker:createTrainingJob`): nothing else runs between schedule and job.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import boto3
from botocore.exceptions import BotoCoreError, ClientError
from pydantic import BaseModel, ConfigDict

from llm_engineering.cloud.schedules.alerts import PREFIX, add_alerts, remove_alerts
from llm_engineering.cloud.schedules.cron import Timing
from llm_engineering.cloud.schedules.run_records import Place, RunRecord, job_prefix
from llm_engineering.errors import RequestError, WorkError

logger = logging.getLogger("llm_engineering.schedules")

TARGET = "arn:aws:scheduler:::aws-sdk:sagemaker:createTrainingJob"
# EventBridge Scheduler puts the id of the start in its place.
EXECUTION = "<aws.scheduler.execution-id>"
# A name of 63 characters holds two hyphens and an id that may be as long as a UUID.
MAX_NAME = 63 - 2 - 36
# A start that is refused, e.g. because another job has the quota, is tried again for an hour.
_RETRY = {"MaximumEventAgeInSeconds": 3600, "MaximumRetryAttempts": 10}
_REMOVAL_S = 300.0
_STOP_S = 600.0
_POLL_S = 0.5
_RUNNING = ("InProgress", "Stopping")


class CloudSchedule(BaseModel):
    """A schedule as it is in the account.

    Attributes:
        created: when it was made; of a rate, what it counts from.
        modified: when it was last made, changed, paused or resumed.
        request: what it starts: the parameters of CreateTrainingJob, with EXECUTION in the job's name.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    timing: Timing
    paused: bool
    created: datetime
    modified: datetime
    request: dict[str, Any]

    @property
    def place(self) -> Place:
        """Where its runs are kept, in S3."""
        return _place(self.request)


def check_free(session: boto3.Session, name: str) -> None:
    """See that no schedule has this name.

    Raises:
        RequestError: one has.
    """
    scheduler = session.client("scheduler")
    try:
        scheduler.get_schedule_group(Name=PREFIX + name)
    except scheduler.exceptions.ResourceNotFoundException:
        return
    raise RequestError(
        f"There is a schedule {name} already. `make schedule-change NAME={name}` changes it, `make unschedule NAME={name}` "
        "removes it; right after its removal the name is free again in a minute."
    )


def create(
    session: boto3.Session, name: str, timing: Timing, request: Mapping[str, Any], role: str, topic: str | None
) -> None:
    """Make a schedule, and with a topic what tells of runs that fail; all of it or nothing.

    Raises:
        WorkError: AWS refuses.
    """
    scheduler = session.client("scheduler")
    scheduler.create_schedule_group(Name=PREFIX + name)
    try:
        if topic is not None:
            add_alerts(session, name, topic)
        now = datetime.now(UTC)
        scheduler.create_schedule(**_parameters(name, timing, request, role, paused=False, origin=now))
    except (ClientError, BotoCoreError) as error:
        _remove(session, name, _place(request))
        raise WorkError(f"The schedule {name} could not be made, and nothing of it is left: {error}") from error


def get(session: boto3.Session, name: str) -> CloudSchedule:
    """A schedule by its name.

    Raises:
        RequestError: there is none.
    """
    return _read(_described(session, name), name)


def list_all(session: boto3.Session) -> list[CloudSchedule]:
    """All schedules of this project in the account and region."""
    scheduler = session.client("scheduler")
    groups = scheduler.get_paginator("list_schedule_groups").paginate(NamePrefix=PREFIX)
    names = [group["Name"] for page in groups for group in page["ScheduleGroups"] if group["State"] == "ACTIVE"]
    found = []
    for name in sorted(names):
        try:
            found.append(_read(scheduler.get_schedule(GroupName=name, Name=name), name.removeprefix(PREFIX)))
        except scheduler.exceptions.ResourceNotFoundException:
            logger.info("%s has lost its schedule: make unschedule NAME=%s removes the rest", name, name[len(PREFIX) :])
    return found


def change(session: boto3.Session, name: str, timing: Timing, request: Mapping[str, Any], topic: str | None) -> None:
    """Give a schedule another time, another job, and the notifications that are set now. A pause stays."""
    former = _described(session, name)
    if topic is None:
        remove_alerts(session, name)
    else:
        add_alerts(session, name, topic)
    known = _read(former, name)
    origin = known.created if timing == known.timing else datetime.now(UTC)
    session.client("scheduler").update_schedule(
        **_parameters(name, timing, request, former["Target"]["RoleArn"], known.paused, origin)
    )


def set_paused(session: boto3.Session, name: str, paused: bool) -> None:
    """Let it fire no more, or again."""
    former = _described(session, name)
    known = _read(former, name)
    # An update replaces all of it.
    session.client("scheduler").update_schedule(
        **_parameters(name, known.timing, known.request, former["Target"]["RoleArn"], paused, known.created)
    )


def run_now(session: boto3.Session, name: str) -> str:
    """Start what the schedule starts, now. Returns the job's name."""
    text = json.dumps(get(session, name).request).replace(EXECUTION, uuid.uuid4().hex[:16])
    request = json.loads(text)
    try:
        session.client("sagemaker").create_training_job(**request)
    except ClientError as error:
        raise WorkError(f"SageMaker does not start the job: {error}") from error
    return str(request["TrainingJobName"])


def remove(session: boto3.Session, name: str, stop: bool) -> None:
    """Remove a schedule with its group, rule, alarm and folder in S3; `stop` ends a job of it that runs.

    The schedule itself goes last but its group, so that after an error the same command removes what is left.

    Raises:
        RequestError: there is none of that name, or its job runs and is not to be stopped: it is paused then.
        WorkError: AWS takes longer than usual.
    """
    try:
        place = get(session, name).place
    except RequestError:
        groups = session.client("scheduler").list_schedule_groups(NamePrefix=PREFIX + name)["ScheduleGroups"]
        if not any(group["Name"] == PREFIX + name and group["State"] == "ACTIVE" for group in groups):
            raise
        # Its schedule went, and its group did not.
        _remove(session, name, None)
        return
    set_paused(session, name, True)
    running = [job["TrainingJobName"] for job in _jobs(session, name, 100) if job["TrainingJobStatus"] in _RUNNING]
    if running and not stop:
        raise RequestError(
            f"{name} is paused, and its job {', '.join(running)} still runs: wait for its end, or stop it and remove "
            f"everything with `make unschedule NAME={name} ARGS=--stop`."
        )
    if running:
        _stop(session, running)
    _remove(session, name, place)


def runs(session: boto3.Session, schedule: CloudSchedule, limit: int) -> list[RunRecord]:
    """The last runs, the newest first, at most `limit`: their own records, and for jobs that left none what AWS says."""
    records = {record.run: record for record in schedule.place.records(session.client("s3"))}
    found = []
    for job in _jobs(session, schedule.name, limit):
        name, status = job["TrainingJobName"], job["TrainingJobStatus"]
        record = records.get(name) or RunRecord(run=name, began=job["CreationTime"])
        if status in _RUNNING:
            record = record.model_copy(update={"outcome": "running", "reason": "", "ended": None})
        elif record.ended is None or (status == "Failed" and record.outcome != "failed"):
            said = session.client("sagemaker").describe_training_job(TrainingJobName=name)
            reason = (
                said.get("FailureReason") or f"the job is {said.get('SecondaryStatus', status)} and left no verdict"
            )
            outcome = "interrupted" if status == "Stopped" else "failed"
            record = record.model_copy(
                update={
                    "outcome": outcome,
                    "reason": reason,
                    "ended": said.get("TrainingEndTime", job["LastModifiedTime"]),
                }
            )
        found.append(record)
    return found


def missed(schedule: CloudSchedule, last: RunRecord | None, now: datetime) -> datetime | None:
    """The last time at which it should have fired and no job was created; None if there is none.

    EventBridge may take up to an hour, by the retries it is given. Of times before its last change, when it was paused
    or had others, nothing is known.
    """
    since = max(last.began, schedule.modified) if last is not None else schedule.modified
    due = schedule.timing.next_times(since, 1, schedule.created)
    late = timedelta(seconds=_RETRY["MaximumEventAgeInSeconds"])
    return due[0] if due and not schedule.paused and due[0] + late < now else None


def _parameters(
    name: str, timing: Timing, request: Mapping[str, Any], role: str, paused: bool, origin: datetime
) -> dict[str, Any]:
    # Without it a rate fires at once; one in the past is refused.
    start = timing.next_times(datetime.now(UTC), 1, origin)[0] if timing.step is not None else None
    return {
        **({"StartDate": start} if start else {}),
        "Name": PREFIX + name,
        "GroupName": PREFIX + name,
        "ScheduleExpression": timing.expression,
        "ScheduleExpressionTimezone": timing.timezone,
        "State": "DISABLED" if paused else "ENABLED",
        "FlexibleTimeWindow": {"Mode": "OFF"},
        "Target": {"Arn": TARGET, "RoleArn": role, "Input": json.dumps(request), "RetryPolicy": _RETRY},
    }


def _described(session: boto3.Session, name: str) -> dict[str, Any]:
    scheduler = session.client("scheduler")
    try:
        found: dict[str, Any] = scheduler.get_schedule(GroupName=PREFIX + name, Name=PREFIX + name)
    except scheduler.exceptions.ResourceNotFoundException as error:
        raise RequestError(f"There is no schedule {name}. `make schedules` lists them.") from error
    return found


def _read(described: Mapping[str, Any], name: str) -> CloudSchedule:
    timing = Timing(
        expression=described["ScheduleExpression"], timezone=described.get("ScheduleExpressionTimezone", "UTC")
    )
    created = described["StartDate"] - timing.step if timing.step is not None else described["CreationDate"]
    return CloudSchedule(
        name=name,
        timing=timing,
        paused=described["State"] == "DISABLED",
        created=created,
        modified=described["LastModificationDate"],
        request=json.loads(described["Target"]["Input"]),
    )


def _place(request: Mapping[str, Any]) -> Place:
    arguments = request["AlgorithmSpecification"]["ContainerArguments"]
    return Place(arguments[arguments.index("--scheduled") + 1])


def _jobs(session: boto3.Session, name: str, limit: int) -> list[dict[str, Any]]:
    """The last jobs of a schedule, the newest first."""
    prefix, found = job_prefix(name), list[dict[str, Any]]()
    pages = session.client("sagemaker").get_paginator("list_training_jobs")
    for page in pages.paginate(NameContains=prefix, SortBy="CreationTime", SortOrder="Descending"):
        found += [job for job in page["TrainingJobSummaries"] if job["TrainingJobName"].startswith(prefix)]
        if len(found) >= limit:
            break
    return found[:limit]


def _stop(session: boto3.Session, names: list[str]) -> None:
    sagemaker, deadline = session.client("sagemaker"), time.monotonic() + _STOP_S
    for name in names:
        try:
            sagemaker.stop_training_job(TrainingJobName=name)
        except ClientError as error:
            # It ended by itself, or is stopping already.
            if error.response["Error"]["Code"] != "ValidationException":
                raise
    for name in names:
        while sagemaker.describe_training_job(TrainingJobName=name)["TrainingJobStatus"] in _RUNNING:
            if time.monotonic() > deadline:
                raise WorkError(f"The job {name} is still stopping. Say the same command again in a few minutes.")
            time.sleep(_POLL_S)


def _remove(session: boto3.Session, name: str, place: Place | None) -> None:
    scheduler, full = session.client("scheduler"), PREFIX + name
    remove_alerts(session, name)
    if place is not None:
        bucket, prefix = place.bucket_and_prefix
        session.resource("s3").Bucket(bucket).objects.filter(Prefix=f"{prefix}/").delete()
    try:
        scheduler.delete_schedule(GroupName=full, Name=full)
    except scheduler.exceptions.ResourceNotFoundException:
        logger.debug("%s has no schedule", full)
    deadline = time.monotonic() + _REMOVAL_S
    try:
        scheduler.delete_schedule_group(Name=full)
        # It is removed in the background, and its name is taken until then.
        while time.monotonic() < deadline:
            scheduler.get_schedule_group(Name=full)
            time.sleep(_POLL_S)
    except scheduler.exceptions.ResourceNotFoundException:
        return
    raise WorkError(f"AWS is still removing the group {full}. It goes by itself within minutes.")
