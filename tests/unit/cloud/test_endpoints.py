"""Endpoints that change while a command looks at them, and machines with cards."""

import logging
from types import SimpleNamespace

import botocore.session
import pytest
import torch
from botocore.exceptions import ClientError

from llm_engineering.cloud.sagemaker import endpoints
from llm_engineering.errors import RequestError, WorkError
from llm_engineering.recipe.compute_blocks import SageMakerConfig
from tools.servers import hosted

MISSING = ClientError({"Error": {"Code": "ValidationException", "Message": "Could not find endpoint"}}, "Describe")
OLD = {"EndpointConfigName": "tiny-old", "EndpointStatus": "InService"}


class Client:
    """An account with these answers to DescribeEndpoint, of which the last one remains. It notes all that is asked."""

    def __init__(self, *endpoint):
        self.endpoint, self.calls = list(endpoint), []

    def __getattr__(self, name):
        return lambda **asked: self.calls.append((name, asked))

    def describe_endpoint(self, **_):
        found = self.endpoint.pop(0) if len(self.endpoint) > 1 else self.endpoint[0]
        if found is None:
            raise MISSING
        return found

    def get_waiter(self, _):
        return SimpleNamespace(wait=lambda **_: None)

    def get_paginator(self, _):
        return SimpleNamespace(paginate=lambda **_: [])

    def called(self, name):
        return [asked for each, asked in self.calls if each == name]


@pytest.fixture
def deploy(monkeypatch):
    """A function that deploys a version without files with a client."""
    monkeypatch.setattr(endpoints, "_DELAY_S", 0)
    monkeypatch.setattr(endpoints, "code_archive", lambda _: b"")
    monkeypatch.setattr(endpoints, "upload_folder", lambda *_: None)
    monkeypatch.setattr(endpoints, "_package", lambda *_: "package")
    served = endpoints.Served("tiny", 1, {}, {}, False)

    def deploy(client, instance_type="ml.m5.xlarge"):
        account = SimpleNamespace(client=lambda _: client, image="i", role="r", uri=lambda *parts: "/".join(parts))
        endpoints.deploy(served, "tiny", SageMakerConfig(instance_type=instance_type), account, update=True)

    return deploy


@pytest.fixture
def name(deploy):
    """The name of the configuration that `deploy` makes, of the hash of the container and the machines."""
    client = Client(OLD)
    with pytest.raises(WorkError):
        deploy(client)
    return client.called("update_endpoint")[0]["EndpointConfigName"]


def test_an_update_that_sagemaker_took_back_is_a_failure(deploy):
    updating, after = OLD | {"EndpointStatus": "Updating"}, OLD | {"FailureReason": "No ping."}
    with pytest.raises(WorkError, match="The endpoint tiny still serves tiny-old, because .* failed: No ping. Its log"):
        deploy(Client(OLD, OLD, updating, after))


def test_an_update_that_has_begun_is_awaited(deploy, name):
    updating = OLD | {"EndpointStatus": "Updating", "PendingDeploymentSummary": {"EndpointConfigName": name}}
    client = Client(updating, updating, OLD | {"EndpointConfigName": name})
    deploy(client)
    assert client.called("update_endpoint") == []


def test_an_update_waits_for_the_end_of_another_one(deploy, name, caplog):
    caplog.set_level(logging.INFO)
    updating = OLD | {"EndpointStatus": "Updating", "PendingDeploymentSummary": {"EndpointConfigName": "tiny-other"}}
    client = Client(updating, updating, OLD, OLD | {"EndpointConfigName": name})
    deploy(client)
    assert len(client.called("update_endpoint")) == 1
    assert "tiny is in state Updating for some minutes. This goes on after Ctrl-C, and is paid" in caplog.text
    with pytest.raises(RequestError, match="exists and has failed: No disk. Remove it first"):
        deploy(Client(updating, updating, OLD | {"EndpointStatus": "Failed", "FailureReason": "No disk."}))


def test_an_endpoint_is_removed_when_its_start_has_ended(monkeypatch):
    monkeypatch.setattr(endpoints, "_DELAY_S", 0)
    starting, gone = OLD | {"EndpointStatus": "Creating"}, []
    client = Client(starting, starting, OLD)
    client.delete_endpoint = lambda **_: gone.append(len(client.endpoint))
    account = SimpleNamespace(client=lambda _: client)
    assert list(endpoints.undeploy("tiny", account, False)) == ["endpoint tiny"]
    assert gone == [1]
    monkeypatch.setattr(endpoints, "_LOOKS", 2)
    with pytest.raises(WorkError, match="still in state Creating after 0 s, and may be paid"):
        list(endpoints.undeploy("tiny", SimpleNamespace(client=lambda _: Client(starting)), False))


def test_a_machine_with_cards_gets_a_driver_for_them(deploy, name):
    client = Client(OLD)
    with pytest.raises(WorkError):
        deploy(client, "ml.g5.xlarge")
    (made,) = client.called("create_endpoint_config")
    (variant,) = made["ProductionVariants"]
    known = (
        botocore.session.get_session().get_service_model("sagemaker").shape_for("ProductionVariantInferenceAmiVersion")
    )
    assert variant["InferenceAmiVersion"] == "al2023-ami-sagemaker-inference-gpu-4-1"
    assert variant["InferenceAmiVersion"] in known.enum


def test_a_card_that_torch_does_not_find_ends_the_server(monkeypatch, capsys):
    monkeypatch.setenv(endpoints.NEEDS_CARD, "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert hosted.main() == 1
    assert "this machine has a card, but torch" in capsys.readouterr().err
