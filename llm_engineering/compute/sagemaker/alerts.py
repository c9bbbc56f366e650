"""Tells an SNS topic of runs of a schedule that failed, whether or not any code of this project ran."""

from __future__ import annotations

import json
import logging

import boto3
from botocore.exceptions import ClientError

from llm_engineering.compute.runs import job_prefix
from llm_engineering.errors import WorkError

logger = logging.getLogger("llm_engineering.schedules")

# Everything that a schedule has in the account begins with it.
PREFIX = "llm-engineering-"


def add_alerts(session: boto3.Session, name: str, topic: str) -> None:
    """Tell the topic of jobs that fail or are stopped, and of starts that were given up.

    `name` is that of the schedule. A job may fail before any code of this project runs: no capacity, no image. A start may be refused: no job is there.
    """
    full = PREFIX + name
    pattern = {
        "source": ["aws.sagemaker"],
        "detail-type": ["SageMaker Training Job State Change"],
        "detail": {"TrainingJobName": [{"prefix": job_prefix(name)}], "TrainingJobStatus": ["Failed", "Stopped"]},
    }
    message = {
        "InputPathsMap": {
            "job": "$.detail.TrainingJobName",
            "status": "$.detail.TrainingJobStatus",
            "reason": "$.detail.FailureReason",
        },
        "InputTemplate": f'"Retraining {name}: job <job> is <status>. <reason> `make schedules` lists the last runs."',
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


def topic_problem(session: boto3.Session, topic: str) -> str | None:
    """Why EventBridge could not tell a topic of a failed run, with the remedy; None if it can, or if nobody may look."""
    try:
        policy = json.loads(
            session.client("sns").get_topic_attributes(TopicArn=topic)["Attributes"].get("Policy", "{}")
        )
    except ClientError as error:
        code = error.response["Error"]["Code"]
        if code in ("AuthorizationError", "AccessDenied", "AccessDeniedException"):
            logger.warning("Nobody here may look whether EventBridge may publish to %s: %s", topic, error)
            return None
        return f"the topic {topic} of NOTIFY_SNS_TOPIC cannot be used ({code}): create it, or correct its ARN"
    for statement in policy.get("Statement", []):
        principal = statement.get("Principal", {})
        services = principal.get("Service", []) if isinstance(principal, dict) else []
        actions = statement.get("Action", [])
        if (
            statement.get("Effect") == "Allow"
            and "events.amazonaws.com" in ([services] if isinstance(services, str) else services)
            and {"sns:publish", "sns:*", "*"}
            & {a.lower() for a in ([actions] if isinstance(actions, str) else actions)}
        ):
            return None
    return (
        f"EventBridge may not publish to {topic}: put the statement of docs/aws/topic-policy.json into its policy "
        f"(aws sns set-topic-attributes --topic-arn {topic} --attribute-name Policy --attribute-value file://policy.json)"
    )
