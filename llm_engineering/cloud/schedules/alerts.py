"""Tells an SNS topic of runs of a schedule that failed, whether or not any code of this project ran."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import boto3

from llm_engineering.cloud.sagemaker.preflight import Problem, listed
from llm_engineering.cloud.schedules.run_records import job_prefix
from llm_engineering.errors import WorkError

logger = logging.getLogger("llm_engineering.schedules")

# Everything that a schedule has in the account begins with it.
PREFIX = "llm-engineering-"
_EVENTS = "events.amazonaws.com"


def add_alerts(session: boto3.Session, name: str, topic: str) -> None:
    """Tell the topic of jobs that fail or are stopped, and of starts that were given up.

    `name` is that of the schedule. A job may fail before any code of this project runs: no capacity, no image. A start
    may be refused: no job is there.
    """
    full = PREFIX + name
    pattern = {
        "source": ["aws.sagemaker"],
        "detail-type": ["SageMaker Training Job State Change"],
        "detail": {"TrainingJobName": [{"prefix": job_prefix(name)}], "TrainingJobStatus": ["Failed", "Stopped"]},
    }
    message = {
        # Without the reason: EventBridge puts it in as it is, and one with a quotation mark or a new line is never sent.
        "InputPathsMap": {"job": "$.detail.TrainingJobName", "status": "$.detail.TrainingJobStatus"},
        "InputTemplate": f'"Retraining {name}: job <job> is <status>. `make schedules` says why."',
    }
    events = session.client("events")
    events.put_rule(Name=full, EventPattern=json.dumps(pattern), Description=f"Failed runs of the schedule {name}")
    failed = events.put_targets(Rule=full, Targets=[{"Id": "topic", "Arn": topic, "InputTransformer": message}])
    if failed["FailedEntryCount"]:
        raise WorkError(f"EventBridge does not take the topic {topic}: {failed['FailedEntries'][0]['ErrorMessage']}")
    session.client("cloudwatch").put_metric_alarm(
        AlarmName=full,
        AlarmDescription=f"EventBridge Scheduler gave up starting the retraining {name}: see CloudTrail, CreateTrainingJob",
        Namespace="AWS/Scheduler",
        MetricName="InvocationDroppedCount",
        Dimensions=[{"Name": "ScheduleGroup", "Value": full}],
        Statistic="Sum",
        Period=300,
        EvaluationPeriods=1,
        Threshold=1.0,
        ComparisonOperator="GreaterThanOrEqualToThreshold",
        TreatMissingData="notBreaching",
        AlarmActions=[topic],
    )


def remove_alerts(session: boto3.Session, name: str) -> None:
    """Remove what `add_alerts` made, if anything."""
    full, events, cloudwatch = PREFIX + name, session.client("events"), session.client("cloudwatch")
    try:
        events.remove_targets(Rule=full, Ids=["topic"])
        events.delete_rule(Name=full)
    except events.exceptions.ResourceNotFoundException:
        logger.debug("%s has no rule", full)
    if cloudwatch.describe_alarms(AlarmNames=[full])["MetricAlarms"]:
        cloudwatch.delete_alarms(AlarmNames=[full])


def topic_problems(session: boto3.Session, topic: str) -> Iterator[Problem]:
    """Whether a topic is there, and lets EventBridge publish to it: without a condition, for it meets none."""
    sns = session.client("sns")
    try:
        policy = json.loads(sns.get_topic_attributes(TopicArn=topic)["Attributes"].get("Policy", "{}"))
    except (sns.exceptions.NotFoundException, sns.exceptions.InvalidParameterException):
        yield Problem(
            f"There is no topic {topic}", "Make it (`aws sns create-topic`), or correct NOTIFY_SNS_TOPIC in .env"
        )
        return
    for statement in policy.get("Statement", []):
        principal = statement.get("Principal", {})
        services = listed(principal.get("Service", [])) if isinstance(principal, dict) else []
        actions = {action.lower() for action in listed(statement.get("Action", []))}
        allows = statement["Effect"] == "Allow" and "Condition" not in statement
        if allows and _EVENTS in services and actions & {"sns:publish", "sns:*"}:
            return
    set_policy = f"aws sns set-topic-attributes --topic-arn {topic} --attribute-name Policy"
    yield Problem(
        f"The topic {topic} does not let EventBridge publish to it",
        f"Add the statement of docs/aws/topic.json to its policy: `{set_policy} --attribute-value file://topic.json`",
    )
