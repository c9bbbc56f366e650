"""Endpoints of the fake SageMaker. Each runs docker/serve with the files of its model, as a container of the image would.

Packages, models and configurations are moto's.
"""

import os
import signal
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from tests.conftest import ROOT, free_port
from tests.fakes.aws import ACCOUNT, REGION, Error
from tests.fakes.machine import _NAMESPACES, split_uri
from tests.fakes.sagemaker import FakeSageMaker


class Container:
    """The container of a model package, which serves on a free port of loopback."""

    def __init__(self, fake: FakeSageMaker, package: str) -> None:
        sagemaker, s3 = fake.client("sagemaker"), fake.client("s3")
        described = sagemaker.describe_model_package(ModelPackageName=package)
        (image,) = described["InferenceSpecification"]["Containers"]
        self.files = tempfile.TemporaryDirectory(prefix="hosted-")
        folder = Path(self.files.name)
        (folder / "ml" / "model").mkdir(parents=True)
        (folder / "hosts").write_text("127.0.0.1 localhost\n")
        source = image["ModelDataSource"]["S3DataSource"]
        assert (source["S3DataType"], source["CompressionType"]) == ("S3Prefix", "None")
        bucket, prefix = split_uri(source["S3Uri"])
        for page in s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            for found in page["Contents"]:
                s3.download_file(bucket, found["Key"], str(folder / "ml" / "model" / found["Key"][len(prefix) :]))
        self.url = f"http://127.0.0.1:{free_port()}"
        env = {
            "PATH": f"{Path(os.sys.executable).parent}:/usr/bin:/bin:/usr/sbin:/sbin", "HOME": str(folder),
            "OMP_NUM_THREADS": "1", "LLM_BIND": self.url.removeprefix("http://"),
            **fake.environment, **image["Environment"],
        }  # fmt: skip
        command = ["sh", str(ROOT / "docker" / "serve")]
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*_NAMESPACES, str(folder / "ml"), str(folder / "hosts"), *command],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=env, cwd="/", start_new_session=True,
            )  # fmt: skip

    @property
    def status(self) -> str:
        """Creating until /ping answers, then InService; Failed if the process has ended."""
        if self.process.poll() is not None:
            return "Failed"
        try:
            return "InService" if httpx.get(f"{self.url}/ping", timeout=2, trust_env=False).is_success else "Creating"
        except httpx.HTTPError:
            return "Creating"

    def end(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        # pytest shows it if the test fails.
        print(self.log.read_text())
        self.files.cleanup()


_REASON = "The primary container for production variant model did not pass the ping health check."


class Hosting:
    """The endpoints of an account, by name: each with its configuration and its container, and those of its update."""

    def __init__(self, fake: FakeSageMaker) -> None:
        self.fake = fake
        self.endpoints: dict[str, dict[str, Any]] = {}
        self.containers: dict[str, Container] = {}
        self.updates: dict[str, tuple[dict[str, Any], Container]] = {}
        # A container is killed when the thread that started it ends, as that of a request does.
        self.starter = ThreadPoolExecutor(1)

    def create(self, asked: dict[str, Any]) -> dict[str, Any]:
        name = asked["EndpointName"]
        if name in self.endpoints:
            raise Error("ValidationException", f'Cannot create already existing endpoint "{name}".')
        self.endpoints[name] = asked | {"CreationTime": time.time()}
        self.containers[name] = self._start(asked)
        return {"EndpointArn": self._arn(name)}

    def update(self, asked: dict[str, Any]) -> dict[str, Any]:
        self._refuse_while_it_changes(asked, "update")
        name = asked["EndpointName"]
        self.updates[name] = (self.endpoints[name] | asked, self._start(asked))
        return {"EndpointArn": self._arn(name)}

    @staticmethod
    def _arn(name: str) -> str:
        return f"arn:aws:sagemaker:{REGION}:{ACCOUNT}:endpoint/{name}"

    def _refuse_while_it_changes(self, asked: dict[str, Any], what: str) -> None:
        if self.describe(asked)["EndpointStatus"] in ("Creating", "Updating"):
            raise Error(
                "ValidationException", f'Cannot {what} in-progress endpoint "{self._arn(asked["EndpointName"])}".'
            )

    def _start(self, endpoint: dict[str, Any]) -> Container:
        sagemaker = self.fake.client("sagemaker")
        config = sagemaker.describe_endpoint_config(EndpointConfigName=endpoint["EndpointConfigName"])
        (variant,) = config["ProductionVariants"]
        model = sagemaker.describe_model(ModelName=variant["ModelName"])
        package = model["PrimaryContainer"]["ModelPackageName"]
        return self.starter.submit(Container, self.fake, package).result()

    def _go_on(self, name: str) -> None:
        """End an update whose container answers or has failed. Then the endpoint goes back to the former configuration."""
        endpoint, container = self.updates[name]
        status = container.status
        if status == "Creating":
            return
        del self.updates[name]
        if status == "InService":
            self.endpoints[name], container, self.containers[name] = endpoint, self.containers[name], container
        else:
            self.endpoints[name]["FailureReason"] = _REASON
        container.end()

    def describe(self, asked: dict[str, Any]) -> dict[str, Any]:
        name = asked["EndpointName"]
        if name not in self.endpoints:
            raise Error(
                "ValidationException",
                f'Could not find endpoint "{self._arn(name)}".',
            )
        if name in self.updates:
            self._go_on(name)
        found, status = self.endpoints[name], self.containers[name].status
        answer = {
            "EndpointName": name, "EndpointArn": self._arn(name),
            "EndpointConfigName": found["EndpointConfigName"], "EndpointStatus": status,
            "CreationTime": found["CreationTime"], "LastModifiedTime": time.time(),
        }  # fmt: skip
        if name in self.updates:
            pending = {"EndpointConfigName": self.updates[name][0]["EndpointConfigName"]}
            return answer | {"EndpointStatus": "Updating", "PendingDeploymentSummary": pending}
        reason = _REASON if status == "Failed" else found.get("FailureReason")
        return answer | ({"FailureReason": reason} if reason else {})

    def delete(self, asked: dict[str, Any]) -> dict[str, Any]:
        self._refuse_while_it_changes(asked, "delete")
        del self.endpoints[asked["EndpointName"]]
        self.containers.pop(asked["EndpointName"]).end()
        return {}

    def delete_package(self, asked: dict[str, Any]) -> dict[str, Any]:
        """moto has no such operation."""
        from moto.sagemaker.models import sagemaker_backends

        del sagemaker_backends[ACCOUNT][REGION].model_packages[asked["ModelPackageName"]]
        return {}


@contextmanager
def hosting(fake: FakeSageMaker):
    """Serve endpoints in an account until the block ends."""
    hosted = Hosting(fake)
    # moto knows no endpoint on newer types.
    for kind in ("ml.m5.xlarge", "ml.g4dn.xlarge"):
        fake.quotas[f"{kind} for endpoint usage"], fake.prices[kind] = 2.0, 1.0
    fake.answers |= {
        ("sagemaker", "CreateEndpoint"): hosted.create,
        ("sagemaker", "UpdateEndpoint"): hosted.update,
        ("sagemaker", "DescribeEndpoint"): hosted.describe,
        ("sagemaker", "DeleteEndpoint"): hosted.delete,
        ("sagemaker", "DeleteModelPackage"): hosted.delete_package,
    }
    with ExitStack() as stack:
        stack.callback(lambda: [container.end() for container in hosted.containers.values()])
        stack.callback(lambda: [container.end() for _, container in hosted.updates.values()])
        yield hosted
