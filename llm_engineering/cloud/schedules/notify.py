"""Notifies people of failed or interrupted scheduled runs, over an SNS topic, a webhook, or both."""

from __future__ import annotations

import logging
import os

import boto3
import httpx
from botocore.exceptions import BotoCoreError, ClientError
from pydantic import SecretStr

from llm_engineering.cloud.container import SHORTEST_SECRET
from llm_engineering.cloud.schedules.run_records import RunRecord
from llm_engineering.recipe.settings import Settings

logger = logging.getLogger("llm_engineering.cloud.schedules.notify")

# SNS accepts at most 100 ASCII characters without line breaks.
_SUBJECT_CHARACTERS = 100
_TIMEOUT_S = 20.0
# Secrets that other libraries read from the environment.
_OTHER_SECRETS = ("ZENML_STORE_API_KEY", "ZENML_STORE_PASSWORD", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


# The outcomes of a run that people are notified of.
NOTIFIED = ("failed", "interrupted")


def notify_of_run(record: RunRecord, schedule: str, settings: Settings) -> None:
    """Notify people of the end of a scheduled run, if its outcome is one of NOTIFIED."""
    if record.outcome not in NOTIFIED:
        return
    notify(
        f"Retraining {schedule} {record.outcome}",
        f"{record.reason}\nRun {record.run}, began {record.began:%Y-%m-%d %H:%M} UTC. "
        "`make schedules` lists the last runs.",
        settings,
    )


def notify(subject: str, text: str, settings: Settings) -> bool:
    """Send a message without secrets to every target that is set; failures are logged.

    The webhook gets `{"text": …}`, which Slack, Mattermost and Teams accept.

    Returns:
        True if no target failed.
    """
    subject, text = without_secrets(subject, settings), without_secrets(text, settings)
    sent = True
    if settings.notify_sns_topic is not None:
        # arn:aws:sns:<region>:…
        region = settings.notify_sns_topic.split(":")[3] if settings.notify_sns_topic.count(":") == 5 else None
        line = " ".join(subject.encode("ascii", "replace").decode().split())[:_SUBJECT_CHARACTERS]
        try:
            boto3.client("sns", region_name=region).publish(
                TopicArn=settings.notify_sns_topic, Subject=line, Message=text
            )
        except (BotoCoreError, ClientError) as error:
            logger.warning("The notification to %s failed: %s", settings.notify_sns_topic, error)
            sent = False
    if settings.notify_webhook is not None:
        url = settings.notify_webhook.get_secret_value()
        try:
            httpx.post(url, json={"text": f"{subject}\n{text}"}, timeout=_TIMEOUT_S).raise_for_status()
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            # The error's text contains the address, which is a secret.
            answer = f" {error.response.status_code}" if isinstance(error, httpx.HTTPStatusError) else ""
            logger.warning("The notification to NOTIFY_WEBHOOK failed: %s%s", type(error).__name__, answer)
            sent = False
    return sent


def without_secrets(text: str, settings: Settings) -> str:
    """Replace the values of all known secrets in a text by asterisks."""
    values = [value.get_secret_value() for value in dict(settings).values() if isinstance(value, SecretStr)]
    values += [os.environ.get(name, "") for name in _OTHER_SECRETS]
    for value in sorted(values, key=len, reverse=True):
        if len(value) >= SHORTEST_SECRET:
            text = text.replace(value, "***")
    return text
