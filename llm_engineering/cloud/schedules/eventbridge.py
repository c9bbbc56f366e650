"""Schedules of EventBridge Scheduler. Each starts one training job that runs the whole retraining.

A schedule has its own group, because CloudWatch counts failed starts by group. With a topic for notifications it also has
a rule and an alarm. All of these have the same name. Its files in S3 are in one folder. Its target is the API call
`aws-sdk:sagemaker:createTrainingJob`, so nothing else runs between schedule and job.
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
# EventBridge Scheduler replaces this placeholder with the id of each start.
EXECUTION = "<aws.scheduler.execution-id>"
# A job's name has 63 characters: the schedule's name, two hyphens, and an id that may be as long as a UUID.
MAX_NAME = 63 - 2 - 36
# A refused start, for example because another job uses the quota, is retried for an hour.
_RETRY = {"MaximumEventAgeInSeconds": 3600, "MaximumRetryAttempts": 10}
_REMOVAL_S = 300.0
_STOP_S = 600.0
_POLL_S = 0.5
_RUNNING = ("InProgress", "Stopping")


class CloudSchedule(BaseModel):
    """A schedule of the account.

    Attributes:
        created: when it was created; for a rate, the time from which its starts are counted.
        modified: when it was last created, changed, paused or resumed.
        role: the ARN of the role that EventBridge Scheduler assumes.
        request: the parameters of CreateTrainingJob, with EXECUTION in the job's name.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    timing: Timing
    paused: bool
    created: datetime
    modified: datetime
    role: str
    request: dict[str, Any]

    @property
    def place(self) -> Place:
        """The folder in S3 with the records of its runs."""
        arguments = self.request["AlgorithmSpecification"]["ContainerArguments"]
        return Place(arguments[arguments.index("--scheduled") + 1])


def check_free(session: boto3.Session, name: str) -> None:
    """Check that no schedule has this name.

    Raises:
        RequestError: a schedule has this name.
    """
    scheduler = session.client("scheduler")
    try:
        scheduler.get_schedule_group(Name=PREFIX + name)
    except scheduler.exceptions.ResourceNotFoundException:
        return
    raise RequestError(
        f"There is a schedule {name} already. `make schedule-change NAME={name}` changes it, `make unschedule NAME={name}` "
        "removes it. If you have just removed it, wait a minute until AWS frees the name."
    )


def create(
    session: boto3.Session, name: str, timing: Timing, request: Mapping[str, Any], role: str, topic: str | None
) -> None:
    """Create a schedule and, with a topic, its notifications. If one part cannot be created, the others are removed.

    Args:
        request, role: as in `CloudSchedule`.
        topic: the ARN of an SNS topic; None for no notifications.

    Raises:
        WorkError: AWS refuses a request.
    """
    scheduler, now = session.client("scheduler"), datetime.now(UTC)
    schedule = CloudSchedule(
        name=name, timing=timing, paused=False, created=now, modified=now, role=role, request=dict(request)
    )
    scheduler.create_schedule_group(Name=PREFIX + name)
    try:
        if topic is not None:
            add_alerts(session, name, topic)
        scheduler.create_schedule(**_parameters(schedule))
    except (ClientError, BotoCoreError) as error:
        _remove(session, name, schedule.place)
        raise WorkError(f"The schedule {name} could not be created, and nothing of it is left: {error}") from error


def get(session: boto3.Session, name: str) -> CloudSchedule:
    """A schedule by its name.

    Raises:
        RequestError: there is no schedule of this name.
    """
    scheduler = session.client("scheduler")
    try:
        return _read(scheduler.get_schedule(GroupName=PREFIX + name, Name=PREFIX + name))
    except scheduler.exceptions.ResourceNotFoundException as error:
        raise RequestError(f"There is no schedule {name}. `make schedules` lists all schedules.") from error


def list_all(session: boto3.Session) -> list[CloudSchedule]:
    """All schedules of this project in the account and region."""
    scheduler = session.client("scheduler")
    groups = scheduler.get_paginator("list_schedule_groups").paginate(NamePrefix=PREFIX)
    names = [group["Name"] for page in groups for group in page["ScheduleGroups"] if group["State"] == "ACTIVE"]
    schedules = []
    for name in sorted(names):
        try:
            schedules.append(_read(scheduler.get_schedule(GroupName=name, Name=name)))
        except scheduler.exceptions.ResourceNotFoundException:
            short = name.removeprefix(PREFIX)
            logger.info("The group %s has no schedule: `make unschedule NAME=%s` removes the rest", name, short)
    return schedules


def change(
    session: boto3.Session, name: str, timing: Timing, request: Mapping[str, Any], role: str, topic: str | None
) -> CloudSchedule:
    """Replace time, job, role and notifications of a schedule. A paused schedule stays paused."""
    former = get(session, name)
    if topic is None:
        remove_alerts(session, name)
    else:
        add_alerts(session, name, topic)
    created = former.created if timing == former.timing else datetime.now(UTC)
    update = {"timing": timing, "request": dict(request), "role": role, "created": created}
    changed = former.model_copy(update=update)
    session.client("scheduler").update_schedule(**_parameters(changed))
    return changed


def set_paused(session: boto3.Session, name: str, paused: bool) -> None:
    """Disable or enable a schedule."""
    changed = get(session, name).model_copy(update={"paused": paused})
    # An update replaces all parameters.
    session.client("scheduler").update_schedule(**_parameters(changed))


def run_now(session: boto3.Session, name: str) -> str:
    """Start the job of a schedule now; returns the job's name."""
    text = json.dumps(get(session, name).request).replace(EXECUTION, uuid.uuid4().hex[:16])
    request = json.loads(text)
    try:
        session.client("sagemaker").create_training_job(**request)
    except ClientError as error:
        raise WorkError(f"SageMaker refuses to start the job: {error}") from error
    return str(request["TrainingJobName"])


def remove(session: boto3.Session, name: str, stop: bool) -> None:
    """Remove a schedule with its rule, alarm, folder in S3 and group.

    The schedule and its group are removed last, so that after an error the same command removes the rest.

    Args:
        stop: whether to stop a running job of the schedule.

    Raises:
        RequestError: there is no schedule of this name, or its job runs and `stop` is false; the schedule
            is then paused.
        WorkError: AWS takes longer than usual.
    """
    try:
        place = get(session, name).place
    except RequestError:
        groups = session.client("scheduler").list_schedule_groups(NamePrefix=PREFIX + name)["ScheduleGroups"]
        if not any(group["Name"] == PREFIX + name and group["State"] == "ACTIVE" for group in groups):
            raise
        # An earlier removal deleted the schedule, but was interrupted before it deleted the group.
        _remove(session, name, None)
        return
    set_paused(session, name, True)
    running = [job["TrainingJobName"] for job in _jobs(session, name, 100) if job["TrainingJobStatus"] in _RUNNING]
    if running and not stop:
        raise RequestError(
            f"{name} is paused, but its job {', '.join(running)} still runs: wait until it ends, or stop it and remove "
            f"everything with `make unschedule NAME={name} ARGS=--stop`."
        )
    if running:
        # The rule would report the stopped jobs.
        remove_alerts(session, name)
        _stop(session, running)
    _remove(session, name, place)


def runs(session: boto3.Session, schedule: CloudSchedule, limit: int) -> list[RunRecord]:
    """The newest runs, at most `limit`, newest first. Each is the run's own record, corrected by the status of its job."""
    s3, latest = session.client("s3"), []
    for job in _jobs(session, schedule.name, limit):
        name, status = job["TrainingJobName"], job["TrainingJobStatus"]
        record = schedule.place.record(name, s3) or RunRecord(run=name, began=job["CreationTime"])
        if status in _RUNNING:
            record = record.model_copy(update={"outcome": "running", "reason": "", "ended": None})
        elif record.ended is None or (status == "Failed" and record.outcome != "failed"):
            answer = session.client("sagemaker").describe_training_job(TrainingJobName=name)
            secondary = answer.get("SecondaryStatus", status)
            update = {
                "outcome": "interrupted" if status == "Stopped" else "failed",
                "reason": answer.get("FailureReason") or f"the job is {secondary} and left no verdict",
                "ended": answer.get("TrainingEndTime", job["LastModifiedTime"]),
            }
            record = record.model_copy(update=update)
        latest.append(record)
    return latest


def missed(schedule: CloudSchedule, last: RunRecord | None, now: datetime) -> datetime | None:
    """The first time since the last run or change at which the schedule should have fired but no job was created, or None.

    A time counts as missed after an hour, because EventBridge retries a start for an hour. Times before the last change
    of the schedule do not count: it may have been paused, or had another expression.
    """
    since = max(last.began, schedule.modified) if last is not None else schedule.modified
    due = schedule.timing.next_times(since, 1, schedule.created)
    late = timedelta(seconds=_RETRY["MaximumEventAgeInSeconds"])
    return due[0] if due and not schedule.paused and due[0] + late < now else None


def _parameters(schedule: CloudSchedule) -> dict[str, Any]:
    """The parameters of CreateSchedule and UpdateSchedule."""
    timing = schedule.timing
    # Without a StartDate, a rate fires at once. A StartDate in the past is refused.
    start = timing.next_times(datetime.now(UTC), 1, schedule.created)[0] if timing.step is not None else None
    target = {"Arn": TARGET, "RoleArn": schedule.role, "Input": json.dumps(schedule.request), "RetryPolicy": _RETRY}
    return {
        **({"StartDate": start} if start else {}),
        "Name": PREFIX + schedule.name,
        "GroupName": PREFIX + schedule.name,
        "ScheduleExpression": timing.expression,
        "ScheduleExpressionTimezone": timing.timezone,
        "State": "DISABLED" if schedule.paused else "ENABLED",
        "FlexibleTimeWindow": {"Mode": "OFF"},
        "Target": target,
    }


def _read(described: Mapping[str, Any]) -> CloudSchedule:
    """A schedule from GetSchedule's answer."""
    timing = Timing(
        expression=described["ScheduleExpression"], timezone=described.get("ScheduleExpressionTimezone", "UTC")
    )
    created = described["StartDate"] - timing.step if timing.step is not None else described["CreationDate"]
    return CloudSchedule(
        name=described["Name"].removeprefix(PREFIX),
        timing=timing,
        paused=described["State"] == "DISABLED",
        created=created,
        modified=described["LastModificationDate"],
        role=described["Target"]["RoleArn"],
        request=json.loads(described["Target"]["Input"]),
    )


def _jobs(session: boto3.Session, name: str, limit: int) -> list[dict[str, Any]]:
    """The newest jobs of a schedule, at most `limit`, newest first."""
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
            # The job has ended, or is stopping already.
            if error.response["Error"]["Code"] != "ValidationException":
                raise
    for name in names:
        while sagemaker.describe_training_job(TrainingJobName=name)["TrainingJobStatus"] in _RUNNING:
            if time.monotonic() > deadline:
                raise WorkError(f"The job {name} is still stopping. Run the same command again in a few minutes.")
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
        # AWS removes a group in the background. Until it is gone, no other group can have its name.
        while time.monotonic() < deadline:
            scheduler.get_schedule_group(Name=full)
            time.sleep(_POLL_S)
    except scheduler.exceptions.ResourceNotFoundException:
        return
    raise WorkError(f"AWS is still removing the group {full}. Wait some minutes before you use the name again.")
