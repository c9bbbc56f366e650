"""Notifies an SNS topic about failed runs of a schedule, even if no code of this project ran in them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import boto3

from llm_engineering.cloud.sagemaker.problems import POLICIES, Problem
from llm_engineering.cloud.sagemaker.trust import listed
from llm_engineering.cloud.schedules.run_records import job_prefix
from llm_engineering.errors import WorkError

logger = logging.getLogger("llm_engineering.schedules")

# The names of all resources of a schedule in the account begin with this prefix.
PREFIX = "llm-engineering-"
_EVENTS = "events.amazonaws.com"


def add_alerts(session: boto3.Session, name: str, topic: str) -> None:
    """Create a rule for jobs that fail or are stopped, and an alarm for starts that EventBridge stopped retrying.

    Both are needed: a job may fail before code of this project runs (no capacity, no image), and a start may be refused,
    so that there is no job.

    Args:
        topic: the ARN of the topic.

    Raises:
        WorkError: EventBridge does not accept the topic.
    """
    full = PREFIX + name
    pattern = {
        "source": ["aws.sagemaker"],
        "detail-type": ["SageMaker Training Job State Change"],
        "detail": {"TrainingJobName": [{"prefix": job_prefix(name)}], "TrainingJobStatus": ["Failed", "Stopped"]},
    }
    message = {
        # The message leaves out the failure's reason: EventBridge would insert it unescaped, and does not send a message
        # with a quotation mark or a line break in it.
        "InputPathsMap": {"job": "$.detail.TrainingJobName", "status": "$.detail.TrainingJobStatus"},
        "InputTemplate": f'"Retraining {name}: job <job> is <status>. `make schedules` shows why."',
    }
    events = session.client("events")
    events.put_rule(Name=full, EventPattern=json.dumps(pattern), Description=f"Failed runs of the schedule {name}")
    failed = events.put_targets(Rule=full, Targets=[{"Id": "topic", "Arn": topic, "InputTransformer": message}])
    if failed["FailedEntryCount"]:
        raise WorkError(f"EventBridge does not accept the topic {topic}: {failed['FailedEntries'][0]['ErrorMessage']}")
    session.client("cloudwatch").put_metric_alarm(
        AlarmName=full,
        AlarmDescription=f"EventBridge Scheduler could not start the retraining {name}: see CloudTrail, CreateTrainingJob",
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
    """Remove the rule and the alarm of `add_alerts`, if they exist."""
    full, events, cloudwatch = PREFIX + name, session.client("events"), session.client("cloudwatch")
    try:
        events.remove_targets(Rule=full, Ids=["topic"])
        events.delete_rule(Name=full)
    except events.exceptions.ResourceNotFoundException:
        logger.debug("%s has no rule", full)
    if cloudwatch.describe_alarms(AlarmNames=[full])["MetricAlarms"]:
        cloudwatch.delete_alarms(AlarmNames=[full])


def topic_problems(session: boto3.Session, topic: str) -> Iterator[Problem]:
    """Check that a topic exists, and that a statement without a condition lets EventBridge publish to it.

    A statement with a condition does not count, because EventBridge cannot publish by such a statement.
    """
    sns = session.client("sns")
    try:
        policy = json.loads(sns.get_topic_attributes(TopicArn=topic)["Attributes"].get("Policy", "{}"))
    except (sns.exceptions.NotFoundException, sns.exceptions.InvalidParameterException):
        yield Problem(
            f"There is no topic {topic}", "Create it (`aws sns create-topic`), or correct NOTIFY_SNS_TOPIC in .env"
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
        f"Add the statements of {POLICIES}/topic.json to its policy. If it has no other policy, "
        f"`{set_policy} --attribute-value file://{POLICIES}/topic.json` does this",
    )
