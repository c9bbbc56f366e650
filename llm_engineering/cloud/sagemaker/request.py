"""What SageMaker is asked for: one training job as the parameters of CreateTrainingJob. Nothing is sent here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llm_engineering.cloud.container import SECRET
from llm_engineering.cloud.sagemaker.account import Account
from llm_engineering.recipe.compute_blocks import SageMakerConfig

# Where SageMaker puts channels and takes checkpoints and results, in the container.
INPUTS = "/opt/ml/input/data"
CHECKPOINTS = "/opt/ml/checkpoints"
RESULTS = "/opt/ml/model"

# Unpacks the channel `code` and starts the arguments behind it there. Each argument may have 256 characters.
_START = (
    "mkdir -p /opt/ml/project && cd /opt/ml/project && tar -xzf /opt/ml/input/data/code/*.tar.gz && "
    'exec python -m llm_engineering.cloud.container "$@"'
)


def training_job_request(
    name: str,
    command: Sequence[str],
    channels: Mapping[str, str],
    environment: Mapping[str, str],
    checkpoint_uri: str,
    output_uri: str,
    config: SageMakerConfig,
    account: Account,
    tags: Mapping[str, str],
) -> dict[str, Any]:
    """The parameters of `create_training_job`.

    Args:
        name: at most 63 letters, digits and hyphens, unique in account and region.
        command: what a person would run in the project's folder; runs there in the container.
        channels: what is put below `/opt/ml/input/data`, by name: a prefix or an object in S3. `code` is among them.
        environment: no secrets: everyone who can describe the job reads it.
        checkpoint_uri: where `/opt/ml/checkpoints` is kept, and restored from when the job starts.
        output_uri: where `<name>/output/model.tar.gz` goes.
        tags: beside those of the recipe.
    """
    request: dict[str, Any] = {
        "TrainingJobName": name,
        "AlgorithmSpecification": {
            "TrainingImage": account.image,
            "TrainingInputMode": "File",
            # `sh` behind the script is its $0.
            "ContainerEntrypoint": ["sh", "-c", _START, "sh"],
            "ContainerArguments": list(command),
        },
        "RoleArn": account.role,
        "InputDataConfig": [_channel(channel, uri) for channel, uri in sorted(channels.items())],
        "OutputDataConfig": {"S3OutputPath": output_uri} | ({"KmsKeyId": account.kms_key} if account.kms_key else {}),
        # No VolumeKmsKeyId: SageMaker refuses it for types with disks of their own, which most GPU types are; those
        # disks are encrypted by the hardware.
        "ResourceConfig": {
            "InstanceType": config.instance_type,
            "InstanceCount": config.instance_count,
            "VolumeSizeInGB": config.volume_size_gb,
        },
        "StoppingCondition": {"MaxRuntimeInSeconds": config.max_run_s},
        "EnableManagedSpotTraining": config.use_spot,
        "CheckpointConfig": {"S3Uri": checkpoint_uri, "LocalPath": CHECKPOINTS},
        "Environment": {
            "AWS_DEFAULT_REGION": account.region,
            "LLM_OUTPUT_DIR": CHECKPOINTS,
            # On the job's volume; the image's own disk has no room for a large model.
            "LLM_CACHE_DIR": "/tmp/llm-engineering",  # noqa: S108
            "HF_HOME": "/tmp/huggingface",  # noqa: S108
            "PYTHONUNBUFFERED": "1",
            **({SECRET: account.secret} if account.secret else {}),
            **environment,
        },
        "Tags": [{"Key": key, "Value": value} for key, value in sorted({**config.tags, **tags}.items())],
    }
    if config.wait_s is not None:
        request["StoppingCondition"]["MaxWaitTimeInSeconds"] = config.wait_s
    if config.vpc is not None:
        request["VpcConfig"] = {"Subnets": config.vpc.subnets, "SecurityGroupIds": config.vpc.security_group_ids}
    return request


def _channel(name: str, uri: str) -> dict[str, Any]:
    source = {"S3DataType": "S3Prefix", "S3Uri": uri, "S3DataDistributionType": "FullyReplicated"}
    return {"ChannelName": name, "InputMode": "File", "CompressionType": "None", "DataSource": {"S3DataSource": source}}
