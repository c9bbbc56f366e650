"""Serves a model version at a SageMaker endpoint: a package in the model registry, a model, a configuration, and the endpoint.

Each step looks for what an earlier call has made, so that a call that was interrupted can be repeated.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from botocore.exceptions import ClientError

from llm_engineering.cloud.package import PROJECT_ROOT, code_archive, folder_hash
from llm_engineering.cloud.sagemaker.account import Account
from llm_engineering.cloud.sagemaker.cost import price_of
from llm_engineering.cloud.sagemaker.problems import error_code
from llm_engineering.cloud.sagemaker.s3 import upload_folder
from llm_engineering.errors import RequestError, WorkError
from llm_engineering.recipe.compute_blocks import SageMakerConfig

logger = logging.getLogger(__name__)

# The variables of the container, which tools/servers/hosted.py reads.
MODEL_NAME = "LLM_MODEL_NAME"
TRUST_REMOTE_CODE = "LLM_TRUST_REMOTE_CODE"
NEEDS_CARD = "LLM_NEEDS_CARD"
# The machine image with NVIDIA's driver 580. The default has driver 470, which the image's CUDA 13 does not support.
_GPU_AMI = "al2023-ami-sagemaker-inference-gpu-4-1"
# Seconds that the download of the model, and then its start, may take: SageMaker's bound.
_START_S = 3600
# Seconds between two looks at an endpoint, and the number of looks: more than both bounds together.
_DELAY_S = 5
_LOOKS = 1500
# The states in which SageMaker refuses to update or delete an endpoint.
_CHANGING = ("Creating", "Updating", "SystemUpdating", "RollingBack", "Deleting")
# SageMaker's limits of an endpoint's name, less the digest that the names of its model and configuration end with.
_NAME = re.compile(r"[a-zA-Z0-9](-?[a-zA-Z0-9]){0,49}")
_DIGEST = "[0-9a-f]{12}"


@dataclass(frozen=True)
class Served:
    """A model version to serve.

    Attributes:
        model, version: the name of the model and the number of its version.
        files: the files of the merged model, and of its signature, by name.
        facts: measures and lineage of the version, for the registry.
    """

    model: str
    version: int
    files: Mapping[str, Path]
    facts: Mapping[str, str]
    trust_remote_code: bool


def default_name(model: str) -> str:
    """The name of a model's packages in the registry, and of its endpoint, of characters that SageMaker accepts."""
    return re.sub(r"[^A-Za-z0-9]+", "-", model).strip("-")[:50].rstrip("-")


def check_name(endpoint: str) -> None:
    """Raise a RequestError if SageMaker does not accept the name of an endpoint."""
    if _NAME.fullmatch(endpoint) is None:
        raise RequestError(
            f'An endpoint cannot be named "{endpoint}". Choose at most 50 letters, digits and single hyphens: NAME=handbook.'
        )


def hourly(config: SageMakerConfig, account: Account) -> str:
    """What an endpoint costs, as a sentence."""
    price = price_of(config.instance_type, account, use="Host")
    machines = f"{config.instance_count} x {config.instance_type}"
    if price is None:
        return f"The cost of an endpoint on {machines} is not known. It is paid until `make undeploy`"
    return (
        f"An endpoint on {machines} costs about {price.usd_per_hour * config.instance_count:.2f} USD an hour in {account.region} "
        f"(price list of {price.date}), until `make undeploy`"
    )


def deploy(served: Served, endpoint: str, config: SageMakerConfig, account: Account, update: bool) -> None:
    """Register a version, serve it at an endpoint, and wait until the endpoint answers.

    Args:
        config: the machines in `instance_type` and `instance_count`, and the network and tags of the recipe.
        update: replace what an existing endpoint of this name serves.

    Raises:
        RequestError: the endpoint exists and serves something else, or has failed.
        WorkError: the endpoint does not start, or SageMaker took an update back.
    """
    client = account.client("sagemaker")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, file in served.files.items():
            (folder / name).symlink_to(file.resolve())
        (folder / "code.tar.gz").write_bytes(code_archive(PROJECT_ROOT))
        place = ("endpoints", folder_hash(folder))
        container = {
            "Image": account.image,
            "ModelDataSource": {
                "S3DataSource": {
                    "S3Uri": f"{account.uri(*place)}/",
                    "S3DataType": "S3Prefix",
                    "CompressionType": "None",
                }
            },
            "Environment": {MODEL_NAME: served.model}
            | ({TRUST_REMOTE_CODE: "1"} if served.trust_remote_code else {})
            | ({NEEDS_CARD: "1"} if config.has_cards else {}),
        }
        model: dict[str, Any] = {"ExecutionRoleArn": account.role, "EnableNetworkIsolation": True}
        if config.vpc is not None:
            model["VpcConfig"] = {
                "Subnets": config.vpc.subnets,
                "SecurityGroupIds": config.vpc.security_group_ids,
            }
        variant = {"InstanceType": config.instance_type, "InitialInstanceCount": config.instance_count}
        if config.has_cards:
            variant["InferenceAmiVersion"] = _GPU_AMI
        content = json.dumps([container, model, variant], sort_keys=True)
        name = f"{endpoint}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"
        current = _check_endpoint(client, endpoint, name, update)
        upload_folder(account, folder, *place)
    if _found(client.describe_model, ModelName=name) is None:
        package = _package(client, served, container)
        client.create_model(ModelName=name, PrimaryContainer={"ModelPackageName": package}, **model)
    if _found(client.describe_endpoint_config, EndpointConfigName=name) is None:
        variant |= {"VariantName": "model", "ModelName": name, "InitialVariantWeight": 1}
        variant |= {
            "ModelDataDownloadTimeoutInSeconds": _START_S,
            "ContainerStartupHealthCheckTimeoutInSeconds": _START_S,
        }
        client.create_endpoint_config(EndpointConfigName=name, ProductionVariants=[variant])
    if current is None:
        tags = [{"Key": key, "Value": value} for key, value in sorted(config.tags.items())]
        client.create_endpoint(EndpointName=endpoint, EndpointConfigName=name, Tags=tags)
    elif _wanted(current) != name:
        client.update_endpoint(EndpointName=endpoint, EndpointConfigName=name)
    found = _settled(client, endpoint) or {"EndpointStatus": "deleted"}
    status, log = found["EndpointStatus"], f"Its log is /aws/sagemaker/Endpoints/{endpoint} in CloudWatch"
    why = found.get("FailureReason", f"its state is {status}").rstrip(".")
    if status != "InService":
        raise WorkError(
            f"The endpoint {endpoint} does not answer: {why}. {log}. Remove it: make undeploy NAME={endpoint}"
        )
    if found["EndpointConfigName"] != name:
        raise WorkError(
            f"The endpoint {endpoint} still serves {found['EndpointConfigName']}, because the update to {name} failed: {why}. {log}"
        )


def _wanted(endpoint: Mapping[str, Any]) -> str:
    """The configuration that an endpoint serves, or will serve when its update is done."""
    return str(endpoint.get("PendingDeploymentSummary", endpoint)["EndpointConfigName"])


def _settled(client: Any, endpoint: str) -> dict[str, Any] | None:
    """Wait until an endpoint no longer changes; returns None if there is no endpoint of this name.

    Raises:
        WorkError: the endpoint changes for longer than SageMaker's bounds allow.
    """
    for look in range(_LOOKS):
        found = _found(client.describe_endpoint, EndpointName=endpoint)
        if found is None or found["EndpointStatus"] not in _CHANGING:
            return found
        state = found["EndpointStatus"]
        if look == 0:
            logger.info(
                "Endpoint:    %s is in state %s for some minutes. This goes on after Ctrl-C, and is paid",
                endpoint,
                state,
            )
        time.sleep(_DELAY_S)
    raise WorkError(
        f"The endpoint {endpoint} is still in state {state} after {_LOOKS * _DELAY_S} s, and may be paid. "
        f"Run the command again, or remove it: make undeploy NAME={endpoint}"
    )


def _check_endpoint(client: Any, endpoint: str, name: str, update: bool) -> dict[str, Any] | None:
    """The endpoint, if it exists and may serve the configuration `name`."""
    current = _found(client.describe_endpoint, EndpointName=endpoint)
    if current is not None and update and _wanted(current) != name:
        current = _settled(client, endpoint)
    if current is None:
        return None
    if current["EndpointStatus"] == "Failed":
        raise RequestError(
            f"The endpoint {endpoint} exists and has failed: {current.get('FailureReason', 'without a reason').rstrip('.')}. "
            f"Remove it first: make undeploy NAME={endpoint}"
        )
    if _wanted(current) != name and not update:
        raise RequestError(
            f"The endpoint {endpoint} exists and serves {_wanted(current)}, not {name}. Replace what it serves, "
            "without a pause: make deploy ARGS=--update. Or choose another name: NAME=…"
        )
    return current


def _package(client: Any, served: Served, container: Mapping[str, Any]) -> str:
    """Find or create the package of the version in the model registry; returns its ARN."""
    group = default_name(served.model)
    groups = client.get_paginator("list_model_package_groups").paginate(NameContains=group)
    if group not in (
        found["ModelPackageGroupName"] for page in groups for found in page["ModelPackageGroupSummaryList"]
    ):
        client.create_model_package_group(ModelPackageGroupName=group, ModelPackageGroupDescription=served.model)
    content = hashlib.sha256(json.dumps(container, sort_keys=True).encode()).hexdigest()
    description = f"{served.model} version {served.version}, {content}"
    packages = client.get_paginator("list_model_packages").paginate(ModelPackageGroupName=group)
    for found in (found for page in packages for found in page["ModelPackageSummaryList"]):
        if found.get("ModelPackageDescription") == description:
            return str(found["ModelPackageArn"])
    types = ["application/json"]
    inference = {"Containers": [container], "SupportedContentTypes": types, "SupportedResponseMIMETypes": types}
    created = client.create_model_package(
        ModelPackageGroupName=group,
        ModelPackageDescription=description,
        InferenceSpecification=inference,
        ModelApprovalStatus="Approved",
        CustomerMetadataProperties=served.facts,
    )
    logger.info("Registered:  %s version %s as %s", served.model, served.version, created["ModelPackageArn"])
    return str(created["ModelPackageArn"])


def undeploy(endpoint: str, account: Account, packages: bool) -> Iterator[str]:
    """Remove what exists of an endpoint; yields the name of each removed part.

    Args:
        packages: remove the packages of its models from the registry, too.
    """
    client = account.client("sagemaker")
    if _settled(client, endpoint) is not None:
        client.delete_endpoint(EndpointName=endpoint)
        client.get_waiter("endpoint_deleted").wait(
            EndpointName=endpoint, WaiterConfig={"Delay": _DELAY_S, "MaxAttempts": _LOOKS}
        )
        yield f"endpoint {endpoint}"
    for name in _names(client, "list_endpoint_configs", "EndpointConfigs", "EndpointConfigName", endpoint):
        client.delete_endpoint_config(EndpointConfigName=name)
        yield f"endpoint configuration {name}"
    for name in _names(client, "list_models", "Models", "ModelName", endpoint):
        package = client.describe_model(ModelName=name)["PrimaryContainer"]["ModelPackageName"]
        # Before the model, which names it, so that a call that was interrupted can be repeated.
        if packages and _found(client.describe_model_package, ModelPackageName=package) is not None:
            client.delete_model_package(ModelPackageName=package)
            yield f"model package {package}"
        client.delete_model(ModelName=name)
        yield f"model {name}"


def _names(client: Any, operation: str, listed: str, key: str, endpoint: str) -> list[str]:
    pages = client.get_paginator(operation).paginate(NameContains=f"{endpoint}-")
    names = [str(found[key]) for page in pages for found in page[listed]]
    return [name for name in names if re.fullmatch(f"{endpoint}-{_DIGEST}", name)]


def _found(describe: Callable[..., dict[str, Any]], **name: str) -> dict[str, Any] | None:
    """The answer of an operation Describe…; None if there is nothing of this name."""
    try:
        return describe(**name)
    except ClientError as error:
        # SageMaker has no error code of its own for this.
        message = error.response["Error"].get("Message", "")
        if error_code(error) != "ValidationException" or not re.search("not found|not find|does not exist", message):
            raise
    return None
