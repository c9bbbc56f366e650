"""A model version at an endpoint of the fake SageMaker, whose container is a real process that serves the model."""

import importlib.metadata
import re

import httpx
import pytest

from tests.fakes.hosting import hosting
from tests.fakes.iam import actions, assert_allowed, policy
from tests.fakes.sagemaker import IMAGE, ROLE, running_sagemaker, why_no_jobs

pytestmark = pytest.mark.skipif(why_no_jobs() is not None, reason=str(why_no_jobs()))

MACHINE = ("--instance-type", "ml.m5.xlarge")
# The same machine, from the recipe.
BLOCK = "compute={target: sagemaker, sagemaker: {instance_type: ml.m5.xlarge, tags: {team: tests}}}"
QUESTION = "Where does the number 7 stand?"
# Actions of docs/aws/endpoint.json that no request of this test needs.
UNTESTED = {"sagemaker:InvokeEndpoint", "sagemaker:InvokeEndpointWithResponseStream"}


@pytest.fixture
def fake(tmp_path):
    """An account whose image has the versions that are installed here."""
    lock = tmp_path / "image.lock"
    lock.write_text("\n".join(f"{name}=={importlib.metadata.version(name)}" for name in ("fastapi", "torch")))
    with running_sagemaker() as fake:
        fake.environment["LLM_IMAGE_LOCK"] = str(lock)
        yield fake


@pytest.fixture
def hosted(fake):
    with hosting(fake) as hosted:
        yield hosted


def parts(fake):
    """The names of the models and configurations in the account, and the versions in its registry."""
    sagemaker = fake.client("sagemaker")
    packages = sagemaker.list_model_packages(ModelPackageGroupName="tiny")["ModelPackageSummaryList"]
    return (
        [found["ModelName"] for found in sagemaker.list_models()["Models"]],
        [found["EndpointConfigName"] for found in sagemaker.list_endpoint_configs()["EndpointConfigs"]],
        [found["ModelPackageVersion"] for found in packages],
    )


def test_a_version_is_served_replaced_and_removed(fake, hosted, fresh_project):
    run = fresh_project.run("sft")
    assert run.code == 0, run.stderr
    fresh_project.env |= fake.env()
    recipe = ("--config", str(fresh_project.recipe))

    def command(name, *arguments):
        return fresh_project.command("models", name, *recipe, *arguments)

    # Nothing is created by a call that is refused.
    fresh_project.env["SAGEMAKER_ROLE"] = fresh_project.env["SAGEMAKER_IMAGE"] = ""
    unset = command("deploy", "--version", "1", *MACHINE)
    fresh_project.env |= fake.env()
    quota, fake.quotas["ml.m5.xlarge for endpoint usage"] = fake.quotas["ml.m5.xlarge for endpoint usage"], 0.0
    small = command("deploy", "--version", "1", *MACHINE)
    fake.quotas["ml.m5.xlarge for endpoint usage"] = quota
    for refused, words in (
        (unset, ("the job's role is missing", "the image is missing")),
        (
            small,
            ("`ml.m5.xlarge for endpoint usage` is 0, but the recipe asks for 1", "request-service-quota-increase"),
        ),
        (command("deploy", "--version", "1"), ("The recipe names no machine for the endpoint",)),
        (command("deploy", "--version", "7", *MACHINE), ("There is no version 7 of tiny",)),
        (command("deploy", "--name", "no_name", *MACHINE), ('An endpoint cannot be named "no_name"',)),
    ):
        assert refused.code == 2, refused.stderr
        for word in words:
            assert word in refused.stderr
    assert not [request for request in fake.requests if request.operation.startswith("Create")]

    # The first call ends between the registry and the endpoint, and the second one continues.
    fake.fail("sagemaker", "CreateEndpointConfig", "InternalFailure", status=400)
    broken = command("deploy", "--version", "1", *MACHINE)
    assert broken.code == 1
    assert "The endpoint tiny cannot be deployed: InternalFailure" in broken.stderr
    fake.errors.clear()
    done = command("deploy", "--version", "1", "--set", BLOCK)
    assert done.code == 0, done.stderr
    assert done.stdout == "tiny\n"
    cost = "An endpoint on 1 x ml.m5.xlarge costs about 99.00 USD an hour in eu-west-1 (price list of "
    assert done.stderr.index(cost) < done.stderr.index("Endpoint:    tiny is in state Creating")
    assert "Signature:   " in done.stderr
    (model,), (config,), (package,) = parts(fake)
    assert re.fullmatch("tiny-[0-9a-f]{12}", model)
    assert (config, package) == (model, 1)
    sagemaker = fake.client("sagemaker")
    described = sagemaker.describe_model(ModelName=model)
    assert described["ExecutionRoleArn"] == ROLE
    registered = sagemaker.describe_model_package(ModelPackageName=described["PrimaryContainer"]["ModelPackageName"])
    assert registered["InferenceSpecification"]["Containers"][0]["Image"] == IMAGE
    assert registered["ModelApprovalStatus"] == "Approved"
    metrics, facts = run.json["metrics"], registered["CustomerMetadataProperties"]
    assert float(facts["heldout_loss"].split()[0]) == pytest.approx(metrics["heldout_loss_sft"], rel=1e-3)
    assert facts["run"].startswith("sft-")

    # The container serves the model on SageMaker's addresses.
    url = hosted.containers["tiny"].url
    assert httpx.get(f"{url}/ping", trust_env=False).status_code == 200
    asked = {"model": "tiny", "temperature": 0, "max_tokens": 12, "messages": [{"role": "user", "content": QUESTION}]}
    answer = httpx.post(f"{url}/invocations", json=asked, timeout=120, trust_env=False).json()
    chat = fresh_project.command("chat", *recipe, "--version", "1", "--prompt", QUESTION, "--max-new-tokens", "12")
    assert answer["choices"][0]["message"]["content"].strip() == chat.stdout.strip() != ""

    # The same command again changes nothing. Another machine is another configuration.
    again = command("deploy", "--version", "1", *MACHINE)
    assert again.code == 0, again.stderr
    assert parts(fake) == ([model], [config], [1])
    other = command("deploy", "--version", "1", *MACHINE, "--instances", "2")
    assert other.code == 2
    assert f"The endpoint tiny exists and serves {config}, not tiny-" in other.stderr
    assert "make deploy ARGS=--update" in other.stderr
    # A machine with a card that torch does not find: SageMaker takes the update back.
    no_card = command("deploy", "--version", "1", "--instance-type", "ml.g4dn.xlarge", "--update")
    assert no_card.code == 1
    assert f"The endpoint tiny still serves {config}, because the update to tiny-" in no_card.stderr
    assert "failed: The primary container for production variant model" in no_card.stderr
    replaced = command("deploy", "--version", "1", *MACHINE, "--instances", "2", "--update")
    assert replaced.code == 0, replaced.stderr
    assert len(fake.asked("sagemaker", "UpdateEndpoint")) == 2
    models, configs, packages = parts(fake)
    assert len(models) == len(configs) == 3
    # The version is registered once for machines with cards, and once for others.
    assert sorted(packages) == [1, 2]

    # Removal ends after the endpoint, and the second call removes the rest.
    fake.fail("sagemaker", "DeleteEndpointConfig", "InternalFailure", status=400)
    assert command("undeploy", "--packages").code == 1
    assert not hosted.containers
    fake.errors.clear()
    removed = command("undeploy", "--packages")
    assert removed.code == 0, removed.stderr
    assert removed.stdout.count("Removed: ") == 8
    assert parts(fake) == ([], [], [])
    assert command("undeploy").stdout == "There is nothing to remove of an endpoint tiny.\n"
    rights = [*policy("launcher"), *policy("endpoint")]
    used = assert_allowed(fake.requests, "launcher", rights)
    assert actions(policy("endpoint")) - used == UNTESTED


def test_a_container_that_cannot_serve_is_reported_with_its_remedy(fake, hosted, fresh_project):
    run = fresh_project.run("sft")
    assert run.code == 0, run.stderr
    fresh_project.env |= fake.env()
    # The image was built from another lock.
    fake.environment["LLM_IMAGE_LOCK"] = "docker/none.lock"
    options = ("--config", str(fresh_project.recipe), "--version", "1", *MACHINE)
    failed = fresh_project.command("models", "deploy", *options)
    assert failed.code == 1
    assert "The endpoint tiny does not answer: The primary container for production variant model" in failed.stderr
    assert "docker/none.lock is not in the project" in hosted.containers["tiny"].log.read_text()
    again = fresh_project.command("models", "deploy", *options)
    assert again.code == 2
    assert "exists and has failed" in again.stderr
    assert "make undeploy NAME=tiny" in again.stderr
