"""An account in which schedules run, and a function that fires a schedule."""

import importlib.metadata
import json
from pathlib import Path

import pytest

from llm_engineering.cloud.schedules.eventbridge import EXECUTION
from tests.fakes.sagemaker import ACCOUNT, IMAGE, REGION, running_sagemaker

TOPIC = f"arn:aws:sns:{REGION}:{ACCOUNT}:retraining"
SCHEDULER_ROLE = f"arn:aws:iam::{ACCOUNT}:role/scheduler"
FOLDER = "llm-engineering/schedules/weekly/"
RECIPE = """
extends: {local}
name: weekly
data:
  instructions: s3://{bucket}/data/rows.jsonl
  split: {{validation_fraction: 0.2, test_fraction: 0.2}}
  train_unfit: true
model: {{name_or_path: "s3://{bucket}/model/"}}
formatting: {{max_length: 192}}
generation: {{rejected_max_new_tokens: 4, rejected_cut: keep, max_preferences: 16}}
sft: {{max_steps: 6, learning_rate: 1e-2, eval_steps: 100, save_steps: 100}}
dpo: {{max_steps: 2, learning_rate: 1e-4, eval_steps: 100, save_steps: 100}}
evaluation: {{max_new_tokens: 4, generated_rows: 2, sample_answers: 1, bootstrap_samples: 100}}
promotion:
  dpo:
    better_than: {{base: {{heldout_loss: 0.0, preference_accuracy: null}}, sft: {{preference_accuracy: null}}}}
    not_worse_than: {{sft: {{heldout_loss: 5.0}}}}
tracking: {{comet: "off"}}
compute:
  target: sagemaker
  device: cpu
  dtype: float32
  sagemaker: {{instance_type: ml.g5.xlarge, max_run_s: 600, volume_size_gb: 30, use_spot: {spot}}}
"""


@pytest.fixture(scope="module")
def account(tmp_path_factory, job_python):
    """An account with a bucket, a topic that EventBridge may publish to, and a secret."""
    lock = tmp_path_factory.mktemp("image") / "image.lock"
    lock.write_text(f"trl=={importlib.metadata.version('trl')}\n")
    with running_sagemaker() as fake:
        fake.environment |= {"LLM_IMAGE_LOCK": str(lock), "HF_HUB_OFFLINE": "1", "PATH": job_python}
        fake.client("sns").create_topic(Name="retraining")
        statement = {"Effect": "Allow", "Principal": {"Service": "scheduler.amazonaws.com"}, "Action": "sts:AssumeRole"}
        trust = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
        fake.client("iam").create_role(RoleName="scheduler", AssumeRolePolicyDocument=trust)
        allow(fake, "events.amazonaws.com")
        yield fake


def settings_of(folder: Path) -> dict[str, str]:
    return {
        "SCHEDULER_ROLE": SCHEDULER_ROLE,
        "SAGEMAKER_RETRAIN_IMAGE": IMAGE,
        "NOTIFY_SNS_TOPIC": TOPIC,
        "SAGEMAKER_SECRET": "job",
        "LLM_OUTPUT_DIR": str(folder / "outputs"),
        "COMET_API_KEY": "",
        "NOTIFY_WEBHOOK": "",
    }


def allow(fake, service: str) -> None:
    statement = {"Effect": "Allow", "Principal": {"Service": service}, "Action": "sns:Publish", "Resource": TOPIC}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
    fake.client("sns").set_topic_attributes(TopicArn=TOPIC, AttributeName="Policy", AttributeValue=policy)


def put_secret(fake, values: dict[str, str]) -> None:
    secrets = fake.client("secretsmanager")
    try:
        secrets.create_secret(Name="job", SecretString=json.dumps(values))
    except secrets.exceptions.ResourceExistsException:
        secrets.put_secret_value(SecretId="job", SecretString=json.dumps(values))


def list_names(fake) -> list[str]:
    groups = fake.client("scheduler").list_schedule_groups()["ScheduleGroups"]
    return [group["Name"] for group in groups if group["Name"] != "default"]


def fire(fake, name: str = "weekly") -> str:
    """Send the request that EventBridge Scheduler sends at the time of a schedule; returns the job's name."""
    full = f"llm-engineering-{name}"
    target = fake.client("scheduler").get_schedule(GroupName=full, Name=full)["Target"]
    assert target["Arn"] == "arn:aws:scheduler:::aws-sdk:sagemaker:createTrainingJob"
    request = json.loads(target["Input"].replace(EXECUTION, f"d32c5kddcf5bb8c{len(fake.jobs)}"))
    fake.client("sagemaker", "scheduler").create_training_job(**request)
    return request["TrainingJobName"]
