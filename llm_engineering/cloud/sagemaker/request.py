"""Builds the parameters of CreateTrainingJob for one training job. This module does not send requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

from llm_engineering.cloud.container import SECRET
from llm_engineering.cloud.old_checkpoints import CHECKPOINTS_URI
from llm_engineering.cloud.sagemaker.account import Account
from llm_engineering.recipe.compute_blocks import SageMakerConfig

# Folders in the container: SageMaker fills the first, and uploads the other two.
INPUTS = "/opt/ml/input/data"
CHECKPOINTS = "/opt/ml/checkpoints"
RESULTS = "/opt/ml/model"
# The channel of a base model that the job does not download from the hub.
MODEL = "model"

# What CloudWatch reads from the lines `sft steps: 12 of 96, … left — loss 1.2, eval_loss 1.3` of the job's log. Before a
# name stands a space, so that `loss` does not match `eval_loss`.
METRICS = [
    {"Name": name, "Regex": rf" steps: .* {name} ([-+.0-9e]+)"}
    for name in ("loss", "eval_loss", "learning_rate", "grad_norm", "rewards/accuracies", "reward", "tokens_per_second")
]

# Unpacks the channel `code` and runs the arguments in its folder. An argument has at most 256 characters.
_START = (
    "mkdir -p /opt/ml/project && cd /opt/ml/project && tar -xzf /opt/ml/input/data/code/*.tar.gz && "
    'exec python -m llm_engineering.cloud.container "$@"'
)


class Machine(NamedTuple):
    """A kind of machine that a job may get."""

    instance_type: str
    spot: bool

    @classmethod
    def of(cls, description: Mapping[str, Any]) -> Self:
        """The machine of a job, from DescribeTrainingJob's answer."""
        return cls(description["ResourceConfig"]["InstanceType"], bool(description.get("EnableManagedSpotTraining")))

    def __str__(self) -> str:
        return self.instance_type if self.spot else f"{self.instance_type} on demand"


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
        command: the command that the container runs in the project's folder.
        channels: the S3 address of a prefix or an object, by channel. SageMaker copies each channel to the folder of its
            name below `/opt/ml/input/data`; the channel `model` is read from S3 when it is loaded. The channel `code` is required.
        environment: variables for the command. They must not be secret, because everyone who may describe the job can
            read them.
        checkpoint_uri: SageMaker copies `/opt/ml/checkpoints` to this address, and back when the job starts again.
        output_uri: SageMaker writes `<name>/output/model.tar.gz` below this address.
        tags: added to the recipe's tags.
    """
    request: dict[str, Any] = {
        "TrainingJobName": name,
        "AlgorithmSpecification": {
            "TrainingImage": account.image,
            "TrainingInputMode": "File",
            # The second `sh` is the $0 of the script.
            "ContainerEntrypoint": ["sh", "-c", _START, "sh"],
            "ContainerArguments": list(command),
            "MetricDefinitions": METRICS,
        },
        "RoleArn": account.role,
        "InputDataConfig": [_channel(channel, uri) for channel, uri in sorted(channels.items())],
        "OutputDataConfig": {"S3OutputPath": output_uri} | ({"KmsKeyId": account.kms_key} if account.kms_key else {}),
        # No VolumeKmsKeyId: SageMaker refuses it for types with local disks, which most GPU types have. The hardware
        # encrypts those disks.
        "ResourceConfig": {
            "InstanceType": config.instance_type,
            "InstanceCount": config.instance_count,
            "VolumeSizeInGB": config.volume_size_gb,
        },
        "StoppingCondition": {"MaxRuntimeInSeconds": config.max_run_s},
        "EnableManagedSpotTraining": config.use_spot,
        "EnableNetworkIsolation": config.network_isolation,
        "EnableInterContainerTrafficEncryption": config.encrypt_traffic,
        "CheckpointConfig": {"S3Uri": checkpoint_uri, "LocalPath": CHECKPOINTS},
        "Environment": {
            "AWS_DEFAULT_REGION": account.region,
            "LLM_OUTPUT_DIR": CHECKPOINTS,
            # The job's volume: the image's own disk is too small for a large model.
            "LLM_CACHE_DIR": "/tmp/llm-engineering",  # noqa: S108
            "HF_HOME": "/tmp/huggingface",  # noqa: S108
            "PYTHONUNBUFFERED": "1",
            **(
                {"HF_HUB_OFFLINE": "1"}
                if config.network_isolation
                # The process would reach neither S3 nor Secrets Manager.
                else {CHECKPOINTS_URI: checkpoint_uri, **({SECRET: account.secret} if account.secret else {})}
            ),
            **environment,
        },
        "Tags": [{"Key": key, "Value": value} for key, value in sorted({**config.tags, **tags}.items())],
    }
    if config.keep_alive_s is not None:
        request["ResourceConfig"]["KeepAlivePeriodInSeconds"] = config.keep_alive_s
    if config.training_plan_arn is not None:
        request["ResourceConfig"]["TrainingPlanArn"] = config.training_plan_arn
    if config.wait_s is not None:
        request["StoppingCondition"]["MaxWaitTimeInSeconds"] = config.wait_s
    if config.vpc is not None:
        request["VpcConfig"] = {"Subnets": config.vpc.subnets, "SecurityGroupIds": config.vpc.security_group_ids}
    return request


def machines(config: SageMakerConfig) -> list[Machine]:
    """The recipe's machines, in the order in which they are tried."""
    types = list(dict.fromkeys([config.instance_type, *config.fallback_instance_types]))
    return [
        Machine(kind, spot)
        for spot in ((True, False) if config.fallback_on_demand else (config.use_spot,))
        for kind in types
    ]


def machines_after(config: SageMakerConfig, tried: Machine) -> list[Machine]:
    """The machines that remain after one had no capacity."""
    found = machines(config)
    return found[found.index(tried) + 1 :] if tried in found else []


def _channel(name: str, uri: str) -> dict[str, Any]:
    source = {"S3DataType": "S3Prefix", "S3Uri": uri, "S3DataDistributionType": "FullyReplicated"}
    # Weights are read while they are loaded, and not copied to the disk before the job starts.
    mode = "FastFile" if name == MODEL else "File"
    return {"ChannelName": name, "InputMode": mode, "CompressionType": "None", "DataSource": {"S3DataSource": source}}
