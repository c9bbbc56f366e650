"""Training stages as SageMaker jobs, over HTTP, on a fake account whose jobs run their command."""

import importlib.metadata
import io
import json
import os
import re
import secrets
import signal
import tarfile
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from safetensors.torch import load_file
from torch.testing import assert_close

from llm_engineering.cloud.sagemaker import jobs, weights
from llm_engineering.cloud.sagemaker.dispatch import ATTACH, dispatch_training
from llm_engineering.cloud.sagemaker.jobs import FETCHED, JobNames
from llm_engineering.cloud.sagemaker.request import METRICS
from llm_engineering.errors import RequestError, WorkError
from llm_engineering.models.revision import pin_revision
from llm_engineering.models.reward_model import RewardModel
from llm_engineering.models.tokenizer import load_tokenizer
from llm_engineering.recipe.compute_blocks import ComputeConfig
from llm_engineering.recipe.loading import load_recipe
from llm_engineering.recipe.model_blocks import ModelConfig
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.stage_blocks import CPTConfig, KTOConfig, RewardConfig
from llm_engineering.recipe.stages import STAGES
from llm_engineering.training.processes.job import Job
from llm_engineering.training.processes.launch import launch_training
from llm_engineering.training.sft import train_sft
from tests.conftest import ROOT
from tests.fakes.hub import Repo, running_hub
from tests.fakes.iam import actions, assert_allowed, policy
from tests.fakes.sagemaker import BUCKET, IMAGE, LOG_GROUP, running_sagemaker, why_no_jobs
from tests.tiny_models import formatted, write_model

pytestmark = pytest.mark.skipif(why_no_jobs() is not None, reason=str(why_no_jobs()))

# Random, because this file is among the uploaded files of the project.
PLANTED = f"planted-{secrets.token_hex(12)}"
MACHINES = {"instance_type": "ml.g5.xlarge", "max_run_s": 600, "volume_size_gb": 30}
# The job never gets its machines in the time of the test.
NEVER_S = 600.0


@pytest.fixture
def fake(tmp_path, job_python):
    """An account whose image has the versions that are installed here."""
    lock = tmp_path / "image.lock"
    lock.write_text("\n".join(f"{name}=={importlib.metadata.version(name)}" for name in ("boto3", "torch", "trl")))
    with running_sagemaker() as fake:
        fake.environment |= {"LLM_IMAGE_LOCK": str(lock), "HF_HUB_OFFLINE": "1", "PATH": job_python}
        yield fake


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    """Ask more often for a job's state than SageMaker would allow. A job of these tests ends after seconds."""
    monkeypatch.setattr(jobs, "_FIRST_WAIT_S", 0.2)
    monkeypatch.setattr(jobs, "_LONGEST_WAIT_S", 0.5)
    monkeypatch.setattr(jobs, "_LAST_LINES_S", 0.2)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"), "llama")


class Stage:
    """An SFT stage of a tiny model as the step runs it, and the facts that it records about its jobs."""

    def __init__(self, model: Path, output: Path, **compute):
        recipe = load_recipe(
            ROOT / "configs" / "python_reference.yaml", ["sft.num_train_epochs=4", "tracking.comet=offline"]
        )
        config = recipe.sft.model_copy(update={"eval_steps": 1000, "save_steps": 20, "learning_rate": 1e-3})
        base = pin_revision(ModelConfig(name_or_path=str(model)))
        tokenizer = load_tokenizer(base, Settings(), "chatml")
        self.data = formatted("instruction", 40, tokenizer, output)
        self.settings = Settings(llm_output_dir=output / "outputs")
        machines = {"target": "sagemaker", "sagemaker": MACHINES, "device": "cpu", "dtype": "float32", **compute}
        update = {"model": base, "max_length": 256, "chat_template": "chatml"}
        setup = recipe.setup.model_copy(update={**update, "compute": ComputeConfig.model_validate(machines)})
        config = config.model_copy(update={"packing": False})
        self.job = Job(stage="sft", config=config.model_dump(), setup=setup)
        self.recorded: list[dict] = []

    def dispatch(self, **changes):
        return dispatch_training(
            self.job.model_copy(update=changes), self.data, self.settings, "tiny", self.recorded.append
        )


@pytest.fixture
def stage(fake, model, tmp_path, monkeypatch):
    for name, value in fake.env().items():
        monkeypatch.setenv(name, value)
    return Stage(model, tmp_path)


def when(condition, action):
    """Run an action in another thread as soon as a condition holds."""

    def wait():
        deadline = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        action()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def interrupt_here():
    os.kill(os.getpid(), signal.SIGINT)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_detached_attached_interrupted_and_resumed(fake, stage, monkeypatch, caplog):
    """A job is detached, attached again and interrupted, and its result equals that of an uninterrupted local run.

    Afterwards the same work downloads results that were not fetched, or starts a new job.
    """
    fake.starting_s = 4.0
    when(lambda: fake.jobs and fake.asked("logs", "DescribeLogStreams"), interrupt_here)
    with monkeypatch.context() as terminal:
        terminal.setattr("sys.stdin", Terminal("d\n"))
        terminal.setattr("sys.stderr", Terminal())
        with pytest.raises(KeyboardInterrupt, match="detached"):
            stage.dispatch()
    (job,) = fake.jobs.values()
    assert job.status == "InProgress"
    assert f"--attach {job.name}" in caplog.text

    monkeypatch.setenv(ATTACH, job.name)
    with pytest.raises(RequestError, match=r"does other work: it differs in sft.learning_rate"):
        stage.dispatch(config={**stage.job.config, "learning_rate": 0.5})
    monkeypatch.setenv(ATTACH, job.name)
    fake.starting_s = 0.0
    when(lambda: any("checkpoint-20/identity.json" in key for key in fake.objects()), lambda: fake.interrupt(job.name))
    result = stage.dispatch()
    assert [state["Status"] for state in job.transitions].count("Training") == 2
    assert result.summary["resumed_from"] is not None
    assert "resuming from /opt/ml/checkpoints" in caplog.text

    local = stage.job.setup.model_copy(update={"compute": stage.job.setup.compute.in_job})
    here = launch_training(train_sft, stage.job.model_copy(update={"setup": local}), stage.data, stage.settings)
    # The job has one thread. More threads add numbers in another order.
    assert_close(
        load_file(result.adapter / "adapter_model.safetensors"),
        load_file(here.adapter / "adapter_model.safetensors"),
        rtol=1e-4,
        atol=1e-5,
    )
    names = [json.loads((r.adapter / "adapter_config.json").read_text()) for r in (result, here)]
    assert names[0]["base_model_name_or_path"] == names[1]["base_model_name_or_path"]
    archive = Path(result.summary["comet"]["archive"])
    assert archive.parent == stage.settings.llm_output_dir / "comet"
    assert archive.is_file()
    facts = stage.recorded[-1]
    assert facts["sagemaker_name"] == job.name
    assert facts["sagemaker_arn"] == job.arn
    assert facts["sagemaker_billable_seconds"] < facts["sagemaker_training_seconds"]
    assert facts["sagemaker_cost_usd_estimate"] == pytest.approx(
        fake.prices["ml.g5.xlarge"] * facts["sagemaker_billable_seconds"] / 3600, abs=1e-4
    )

    assert any(tag["Key"] == FETCHED for tag in job.request["Tags"])
    job.request["Tags"] = [tag for tag in job.request["Tags"] if tag["Key"] != FETCHED]
    again = stage.dispatch()
    assert again.summary["sagemaker"]["sagemaker_name"] == job.name
    assert "downloading its results" in caplog.text

    fake.starting_s = NEVER_S
    when(lambda: len(fake.jobs) == 2, interrupt_here)
    with pytest.raises(KeyboardInterrupt, match="was stopped"):
        stage.dispatch()
    former, new = fake.jobs.values()
    assert new.name == former.name.replace("-0001", "-0002")
    assert new.request["CheckpointConfig"] != former.request["CheckpointConfig"]


@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_stages_with_rewards_train_in_jobs(fake, model, tmp_path, stage, name):
    """The job's completions and weights are those of a run on this machine."""
    (tmp_path / "prompts").mkdir()
    data = formatted("prompt", 8, load_tokenizer(stage.job.setup.model, Settings(), "chatml"), tmp_path / "prompts")
    block = STAGES[name].block.model_validate({
        "rewards": [{"use": "format", "pattern": "(?s).*[a-z].*"}, {"use": "stopped"}], "num_generations": 2,
        "max_completion_length": 4, "learning_rate": 1e-2, "num_train_epochs": 1, "max_steps": 2,
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "eval_steps": 2, "save_steps": 2, "beta": 0.1,
    })  # fmt: skip
    stage.data, stage.job = data, stage.job.model_copy(update={"stage": name, "config": block.model_dump()})
    result = stage.dispatch()
    assert [job.name.split("-")[1] for job in fake.jobs.values()] == [name]
    here = stage.job.setup.model_copy(update={"compute": stage.job.setup.compute.in_job})
    local = STAGES[name].train_function()(
        stage.job.model_copy(update={"setup": here}), data, Settings(llm_output_dir=tmp_path / "here")
    )
    # The job has one thread. More threads add numbers in another order.
    weights = [load_file(found.adapter / "adapter_model.safetensors") for found in (result, local)]
    assert_close(*weights, rtol=1e-4, atol=1e-5)
    assert result.summary["completions"] == local.summary["completions"]
    assert len(result.summary["completions"]["first"]) > 0


def test_a_model_of_the_hub_is_copied_once_and_read_from_s3(fake, stage, model, monkeypatch, caplog):
    """An interrupted copy continues, other formats stay away, and the adapter names the model of the hub."""
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    with running_hub("") as hub:
        hub.repos["owner/tiny"] = Repo(False, files | {"pytorch_model.bin": b"1", "original/a.pth": b"1"})
        monkeypatch.setattr(weights, "HfApi", partial(HfApi, endpoint=hub.url))
        # The tests are offline; only the hub's client must reach this hub.
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        hub.failures["tokenizer.json"] = (403, "no")
        base = ModelConfig(name_or_path="owner/tiny", revision=hub.repos["owner/tiny"].sha)
        compute = stage.job.setup.compute
        copied = compute.model_copy(update={"sagemaker": compute.sagemaker.model_copy(update={"weights": "s3"})})
        setup = stage.job.setup.model_copy(update={"model": base, "compute": copied})
        with pytest.raises(WorkError, match="owner/tiny cannot be copied from the Hugging Face Hub"):
            stage.dispatch(setup=setup)
        hub.failures.clear()
        before = len([line for line in caplog.messages if line.startswith("Copying")])
        result = stage.dispatch(setup=setup, config={**stage.job.config, "num_train_epochs": 1.0})
        copies = [line for line in caplog.messages if line.startswith("Copying")]
        # The file that failed is named twice.
        assert len(copies) == len(files) + 1 > before > 1
        hub.requests.clear()
        stage.dispatch(setup=setup, config={**stage.job.config, "num_train_epochs": 0.5})
        assert hub.requests == []
    place = f"llm-engineering/models/hub/owner/tiny/{base.revision}"
    assert {key.removeprefix(f"{place}/") for key in fake.objects(f"{place}/")} == set(files)
    (channel,) = [
        c for c in fake.asked("sagemaker", "CreateTrainingJob")[0]["InputDataConfig"] if c["ChannelName"] == "model"
    ]
    assert (channel["InputMode"], channel["DataSource"]["S3DataSource"]["S3Uri"]) == (
        "FastFile",
        f"s3://{BUCKET}/{place}/",
    )
    adapter = json.loads((result.adapter / "adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == ("owner/tiny", base.revision)


def test_no_capacity_no_quota_and_a_failure(fake, stage, tmp_path, caplog):
    """Instance types are tried in order; a failed job's reason and log are shown, and the next job uses its checkpoints."""
    stage.job.setup.compute.sagemaker.fallback_instance_types.extend(["ml.g5.2xlarge", "ml.p4d.24xlarge"])
    fake.fails_to_start["ml.g5.xlarge"] = "CapacityError: Unable to provision requested ML compute capacity."
    fake.quotas["ml.g5.2xlarge for spot training job usage"] = 0.0
    (tmp_path / "image.lock").write_text("boto3==0.1")
    with pytest.raises(WorkError) as error:
        stage.dispatch()
    assert "The image was built from another" in str(error.value)
    assert "boto3==0.1" in str(error.value)
    assert "make image" in str(error.value)
    assert "lines of its log:\n  Error: The image was built" in str(error.value)
    asked = fake.asked("sagemaker", "CreateTrainingJob")
    assert [(a["TrainingJobName"][-4:], a["ResourceConfig"]["InstanceType"]) for a in asked] == [
        ("0001", "ml.g5.xlarge"),
        ("0002", "ml.g5.2xlarge"),
        ("0002", "ml.p4d.24xlarge"),
    ]
    assert "No capacity of ml.g5.xlarge: trying ml.g5.2xlarge" in caplog.text
    assert "The quota for ml.g5.2xlarge is too small" in caplog.text
    with pytest.raises(WorkError):
        stage.dispatch()
    assert len({a["CheckpointConfig"]["S3Uri"] for a in fake.asked("sagemaker", "CreateTrainingJob")}) == 1
    assert [name[-4:] for name in fake.jobs] == ["0001", "0002", "0003", "0004"]

    fake.quotas.clear()
    with pytest.raises(WorkError, match="ResourceLimitExceeded.*Ask for a higher quota"):
        stage.dispatch()


def test_a_job_that_waits_too_long_gives_way_to_the_next_type_and_then_to_on_demand(fake, stage, tmp_path, caplog):
    caplog.set_level("INFO")
    machines = {"fallback_instance_types": ["ml.g5.2xlarge"], "fallback_on_demand": True, "max_pending_s": 1}
    compute = stage.job.setup.compute
    allowed = compute.model_copy(update={"sagemaker": compute.sagemaker.model_copy(update=machines)})
    setup = stage.job.setup.model_copy(update={"compute": allowed})
    fake.no_capacity |= {f"{kind} for spot training job usage" for kind in ("ml.g5.xlarge", "ml.g5.2xlarge")}
    (tmp_path / "image.lock").write_text("boto3==0.1")
    with pytest.raises(WorkError, match="The image was built from another"):
        stage.dispatch(setup=setup)
    asked = fake.asked("sagemaker", "CreateTrainingJob")
    assert [(a["ResourceConfig"]["InstanceType"], a["EnableManagedSpotTraining"]) for a in asked] == [
        ("ml.g5.xlarge", True),
        ("ml.g5.2xlarge", True),
        ("ml.g5.xlarge", False),
    ]
    assert [job.status for job in fake.jobs.values()] == ["Stopped", "Stopped", "Failed"]
    assert len({a["CheckpointConfig"]["S3Uri"] for a in asked}) == 1
    assert "Starting. Insufficient capacity error from EC2 while launching, retrying!" in caplog.text
    assert "has waited for ml.g5.2xlarge for more than 1 s (compute.sagemaker.max_pending_s)" in caplog.text
    assert "trying ml.g5.xlarge on demand" in caplog.text


def test_a_corrected_setting_of_the_same_length_reaches_the_job_of_the_same_name(fake, stage):
    fake.quotas.clear()
    for run in ("a", "b"):
        with pytest.raises(WorkError, match="ResourceLimitExceeded"):
            stage.dispatch(parameters={"run_id": run})
        asked = fake.asked("sagemaker", "CreateTrainingJob")[-1]
        uris = {c["ChannelName"]: c["DataSource"]["S3DataSource"]["S3Uri"] for c in asked["InputDataConfig"]}
        bucket, _, key = uris["job"].removeprefix("s3://").partition("/")
        job = json.loads(fake.client("s3").get_object(Bucket=bucket, Key=f"{key}job.json")["Body"].read())
        assert job["parameters"] == {"run_id": run}
    assert len({asked["TrainingJobName"] for asked in fake.asked("sagemaker", "CreateTrainingJob")}) == 1


def test_two_clients_and_ctrl_c(fake, stage, monkeypatch, caplog):
    """A job that another process created under the same name is followed; Ctrl-C without a terminal stops it."""
    fake.starting_s = NEVER_S
    refused = []

    def dispatch_first():
        with pytest.raises(WorkError) as error:
            stage.dispatch()
        refused.append(str(error.value))

    first = threading.Thread(target=dispatch_first, daemon=True)
    first.start()
    when(lambda: fake.jobs, lambda: None).join()
    # Simulates a list that does not show the new job yet.
    monkeypatch.setattr(JobNames, "newest", lambda self, client: None)
    when(lambda: "was started by another process" in caplog.text, interrupt_here)
    with pytest.raises(KeyboardInterrupt, match="was stopped"):
        stage.dispatch()
    first.join(60)
    assert "was stopped, but not by this command" in refused[0]
    (job,) = fake.jobs.values()
    assert job.status == "Stopped"
    assert len(fake.asked("sagemaker", "StopTrainingJob")) == 1


def test_a_job_that_someone_else_stops(fake, stage):
    fake.starting_s = NEVER_S
    when(
        lambda: fake.jobs,
        lambda: fake.client("sagemaker").stop_training_job(TrainingJobName=next(iter(fake.jobs))),
    )
    with pytest.raises(WorkError, match="was stopped, but not by this command"):
        stage.dispatch()


def test_two_machines_train_together(fake, model, tmp_path, monkeypatch):
    """torchrun runs one process on each machine, and a checkpoint has the state of both."""
    for name, value in fake.env().items():
        monkeypatch.setenv(name, value)
    stage = Stage(model, tmp_path, num_processes=2, sagemaker={**MACHINES, "instance_count": 2})
    config = {**stage.job.config, "num_train_epochs": 1.0, "save_steps": 4}
    result = stage.dispatch(config=config)
    assert result.summary["num_processes"] == 2
    saved = [key for key in fake.objects() if "/checkpoints/checkpoint-" in key]
    assert {"rng_state_0.pth", "rng_state_1.pth", "identity.json"} <= {key.rpartition("/")[2] for key in saved}
    streams = fake.client("logs").describe_log_streams(logGroupName=LOG_GROUP)["logStreams"]
    assert {stream["logStreamName"].rpartition("/")[2][:6] for stream in streams} == {"algo-1", "algo-2"}


def test_cpt_trains_in_a_job_and_sft_starts_from_its_adapter(fake, stage, tmp_path):
    tokenizer = load_tokenizer(stage.job.setup.model, Settings(), "chatml")
    instructions, stage.data = stage.data, formatted("text", 8, tokenizer, tmp_path)
    config = CPTConfig.model_validate({**stage.job.config, "num_train_epochs": 1})
    cpt = stage.dispatch(stage="cpt", config=config.model_dump())
    assert cpt.summary["stage"] == "cpt"
    assert cpt.adapter.joinpath("adapter_model.safetensors").is_file()
    stage.data = instructions
    # With this learning rate, training changes nothing.
    config = {**stage.job.config, "num_train_epochs": 1.0, "learning_rate": 1e-12}
    sft = stage.dispatch(start=cpt.adapter, config=config)
    assert sft.summary["stage"] == "sft"
    weights = [load_file(result.adapter / "adapter_model.safetensors") for result in (cpt, sft)]
    assert_close(*weights)
    assert all(weight.any() for name, weight in weights[0].items() if "lora_B" in name)
    assert [name.split("-")[1] for name in fake.jobs] == ["cpt", "sft"]
    assert {job.status for job in fake.jobs.values()} == {"Completed"}


def test_kto_trains_in_a_job(fake, stage, tmp_path):
    tokenizer = load_tokenizer(stage.job.setup.model, Settings(), "chatml")
    stage.data = formatted("labelled", 8, tokenizer, tmp_path)
    config = {k: v for k, v in stage.job.config.items() if k not in ("packing", "train_sampling_strategy")}
    config = KTOConfig.model_validate({**config, "num_train_epochs": 1, "per_device_train_batch_size": 4})
    result = stage.dispatch(stage="kto", config=config.model_dump())
    assert (result.summary["stage"], result.summary["steps"]) == ("kto", 1)
    assert result.adapter.joinpath("adapter_model.safetensors").is_file()
    assert {job.status for job in fake.jobs.values()} == {"Completed"}


def test_a_reward_model_trains_in_a_job_from_an_sft_adapter(fake, stage, tmp_path):
    """The job gets the adapter, and returns a folder that holds a whole reward model."""
    setup = stage.job.setup
    sft = stage.dispatch(config={**stage.job.config, "num_train_epochs": 1.0})
    tokenizer = load_tokenizer(setup.model, Settings(), "chatml")
    stage.data = formatted("preference", 8, tokenizer, tmp_path)
    keys = {k: v for k, v in stage.job.config.items() if k in RewardConfig.model_fields and k not in ("method", "lora")}
    config = RewardConfig.model_validate(keys | {"num_train_epochs": 1.0})
    result = stage.dispatch(stage="reward", config=config.model_dump(), start=sft.adapter)
    assert result.summary["stage"] == "reward"
    here = ComputeConfig(device="cpu", dtype="float32")
    model = RewardModel.load(setup.model, result.adapter, tokenizer, here, Settings())
    pair = stage.data["validation"][0]
    assert len(set(model.scores([pair["prompt_ids"] + pair[name] for name in ("chosen_ids", "rejected_ids")]))) == 2


# Actions that the policies allow and the whole chain does not use, with the reason.
LAUNCHER_UNTESTED = {
    "ecr:GetAuthorizationToken": "docker's login, for make image",
    "ecr:BatchCheckLayerAvailability": "docker push",
    "ecr:BatchGetImage": "docker push",
    "ecr:CompleteLayerUpload": "docker push",
    "ecr:InitiateLayerUpload": "docker push",
    "ecr:PutImage": "docker push",
    "ecr:UploadLayerPart": "docker push",
    "ecr:CreateRepository": "make image",
    "ecr:DescribeRepositories": "make image",
    "s3:AbortMultipartUpload": "boto3, where a large upload fails",
    "s3:DeleteObject": "ZenML, where it replaces or deletes artifacts in its S3 store",
    "sagemaker:StopTrainingJob": "Ctrl-C",
    "servicequotas:ListAWSDefaultServiceQuotas": "a quota that was never changed, where only its default is listed",
}
JOB_UNTESTED = {
    "s3:DeleteObject": "old checkpoints, once a minute",
    "s3:AbortMultipartUpload": "SageMaker, where a large upload fails",
    "logs:DescribeLogStreams": "SageMaker, as its documentation lists for execution roles",
    "cloudwatch:PutMetricData": "SageMaker, load of processor and card",
    "ecr:BatchCheckLayerAvailability": "SageMaker pulls the image",
    "ecr:BatchGetImage": "SageMaker pulls the image",
    "ecr:GetDownloadUrlForLayer": "SageMaker pulls the image",
    "ecr:GetAuthorizationToken": "SageMaker pulls the image",
}

RECIPE = """
extends: {recipe}
compute:
  target: sagemaker
  sagemaker: {{instance_type: ml.g5.xlarge, max_run_s: 600, volume_size_gb: 30, tags: {{team: tests}}}}
tracking: {{comet: offline}}
"""


@pytest.fixture
def cloud_project(fake, fresh_project):
    recipe = fresh_project.folder / "cloud.yaml"
    recipe.write_text(RECIPE.format(recipe=fresh_project.recipe))
    fresh_project.recipe = recipe
    fresh_project.env |= {**fake.env(), "OMP_NUM_THREADS": "1"}
    return fresh_project


def everything_in(bucket_client):
    """Every object's bytes, unpacked where it is an archive."""
    for page in bucket_client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET):
        for found in page.get("Contents", []):
            body = bucket_client.get_object(Bucket=BUCKET, Key=found["Key"])["Body"].read()
            yield found["Key"], body
            if found["Key"].endswith(".tar.gz"):
                with tarfile.open(fileobj=io.BytesIO(body)) as archive:
                    for member in archive:
                        if member.isfile():
                            yield f"{found['Key']}:{member.name}", archive.extractfile(member).read()


def test_the_whole_chain_trains_in_jobs(fake, cloud_project):
    """SFT, then DPO on its adapter, run as jobs, and everything else runs locally, with the same artifacts as a local run.

    Only the job's process sees the secrets.
    """
    fake.client("secretsmanager").create_secret(
        Name="llm", SecretString=json.dumps({"COMET_API_KEY": PLANTED, "HF_TOKEN": PLANTED})
    )
    cloud_project.env["SAGEMAKER_SECRET"] = "llm"
    run = cloud_project.run("retrain")
    assert run.code == 0, run.stderr
    assert [name.split("-")[1] for name in fake.jobs] == ["sft", "dpo"]
    assert {job.status for job in fake.jobs.values()} == {"Completed"}
    metrics = run.json["metrics"]
    assert metrics["heldout_loss_sft"] < metrics["heldout_loss_base"]
    assert {"sft_adapter", "dpo_adapter", "training_report"} <= run.json["artifacts"].keys()
    assert Path(run.json["comet"]["archive"]).is_file()
    (adapter,) = Path(run.json["artifacts"]["dpo_adapter"]["uri"]).rglob("adapter_config.json")
    assert "/opt/ml" not in adapter.read_text()
    for job in fake.jobs.values():
        assert f"{job.name}: Training" in run.stderr
    assert "rows to train on" in run.stderr, "the job's log is not shown"
    assert "A job on 1 x ml.g5.xlarge costs about 1.00 USD an hour on demand in eu-west-1" in run.stderr
    assert run.stderr.count("USD by the price list of") == 2
    billed = [job.described()["BillableTimeInSeconds"] for job in fake.jobs.values()]
    assert metrics["sagemaker_cost_usd"] == pytest.approx(sum(billed) / 3600, abs=1e-4)

    again = cloud_project.run("retrain", "--attach", next(iter(fake.jobs)))
    assert again.code == 0, again.stderr
    assert "was not followed, because the result of its training step came from the cache" in again.stderr
    assert len(fake.jobs) == 2
    assert cloud_project.run("datasets", "--attach", next(iter(fake.jobs))).code == 2

    launcher, job = policy("launcher"), policy("job")
    assert actions(launcher) - assert_allowed(fake.requests, "launcher", launcher) == set(LAUNCHER_UNTESTED)
    assert actions(job) - assert_allowed(fake.requests, "job", job) == set(JOB_UNTESTED)

    planted = PLANTED.encode()
    assert fake.asked("secretsmanager", "GetSecretValue")
    sent = [r for r in fake.requests if PLANTED in json.dumps(r.parameters, default=str)]
    assert sent == []
    assert [key for key, body in everything_in(fake.client("s3")) if planted in body] == []
    logs = fake.client("logs")
    streams = logs.describe_log_streams(logGroupName=LOG_GROUP)["logStreams"]
    events = [
        event["message"]
        for stream in streams
        for event in logs.get_log_events(logGroupName=LOG_GROUP, logStreamName=stream["logStreamName"])["events"]
    ]
    # SageMaker reads the curves of CloudWatch from these lines.
    found = {metric["Name"] for line in events for metric in METRICS if re.search(metric["Regex"], line)}
    assert {metric["Name"] for metric in METRICS} - found == {"reward"}
    assert [line for line in events if PLANTED in line] == []
    written = [path for path in cloud_project.folder.rglob("*") if path.is_file()]
    # SQLite's log is a part of the database.
    database = b"".join(path.read_bytes() for path in written if path.name in ("zenml.db", "zenml.db-wal"))
    for job in fake.jobs.values():
        assert job.arn.encode() in database
    assert [path for path in written if planted in path.read_bytes()] == []
    assert PLANTED not in run.stderr + run.stdout


FACTS = """
import json
from tools.cli import prepare_zenml
prepare_zenml()
from zenml.client import Client
for name in ("preference_candidates", "evaluation_report"):
    print(json.dumps(dict(Client().get_artifact_version(name).run_metadata), default=str))
"""


def test_the_whole_chain_runs_in_jobs(fake, cloud_project):
    """Generation, SFT, DPO and the evaluation with the exam are jobs, and their artifacts are in the one run here.

    The job that generates loses its spot machine and starts again.
    """
    cloud_project.env["SAGEMAKER_RETRAIN_IMAGE"] = IMAGE
    folder = cloud_project.folder
    question = {
        "id": "n1",
        "question": "Which number follows 7?",
        "answers": ["8"],
        "facts": ["7"],
        "documents": ["n.md"],
    }
    (folder / "exam.jsonl").write_text(json.dumps(question))
    options = [
        "compute.sagemaker.scope=chain",
        f"exam={{path: {folder / 'exam.jsonl'}, control: null, max_new_tokens: 4, retrieval_passages: 0}}",
    ]
    chain = [word for option in options for word in ("--set", option)]

    def generates() -> bool:
        jobs = [job for name, job in fake.jobs.items() if "generate-preferences" in name]
        return any(state["Status"] == "Training" for job in jobs for state in job.transitions)

    taken = when(generates, lambda: fake.interrupt("generate-preferences", graceful=False))
    run = cloud_project.run("retrain", *chain)
    assert run.code == 0, run.stderr
    taken.join()
    jobs = {re.search(r"-([a-z-]+)-[0-9a-f]{12}-0001$", name)[1]: job for name, job in fake.jobs.items()}
    assert sorted(jobs) == ["dpo", "evaluate", "generate-preferences", "sft"]
    assert {job.status for job in jobs.values()} == {"Completed"}
    assert [state["Status"] for state in jobs["generate-preferences"].transitions].count("Training") == 2
    metrics = run.json["metrics"]
    assert metrics["heldout_loss_sft"] < metrics["heldout_loss_base"]
    assert {"exam_accuracy_base", "exam_accuracy_dpo", "preference_accuracy_dpo"} <= metrics.keys()
    billed = [job.described()["BillableTimeInSeconds"] for job in jobs.values()]
    assert metrics["sagemaker_cost_usd"] == pytest.approx(sum(billed) / 3600, abs=2e-4)
    kinds = {"preference_candidates", "sft_adapter", "dpo_adapter", "evaluation_report", "promotion_decision"}
    assert kinds <= run.json["artifacts"].keys()
    script = folder / "facts.py"
    script.write_text(FACTS)
    shown = cloud_project.script(str(script)).stdout.splitlines()
    preferences, evaluation = map(json.loads, shown[-2:])
    assert (preferences["read"], preferences["rows"]) == (60, 40)
    assert "/opt/ml" not in preferences["generated_by"]
    assert evaluation["exam_accuracy_dpo"] == metrics["exam_accuracy_dpo"]

    # Everything comes from the cache.
    again = cloud_project.run("retrain", *chain)
    assert again.code == 0, again.stderr
    assert len(fake.jobs) == 4
    launcher, role = policy("launcher"), policy("job")
    assert_allowed(fake.requests, "launcher", launcher)
    assert_allowed(fake.requests, "job", role)


def test_after_a_kill_the_same_command_follows_its_job_and_ctrl_c_stops_it(fake, cloud_project):
    fake.starting_s = NEVER_S
    command = ["run", "sft", "--config", str(cloud_project.recipe)]
    process = cloud_project.start(*command)
    when(lambda: fake.jobs or process.poll() is not None, process.kill).join()
    process.communicate(timeout=60)
    (job,) = fake.jobs.values()

    process = cloud_project.start(*command)
    asked = len(fake.asked("sagemaker", "DescribeTrainingJob"))
    following = lambda: len(fake.asked("sagemaker", "DescribeTrainingJob")) > asked + 1  # noqa: E731
    when(lambda: following() or process.poll() is not None, lambda: process.send_signal(signal.SIGINT)).join()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert f"Job {job.name} already does this work: following it" in stderr
    assert "run the same command again to continue" in stderr
    assert list(fake.jobs) == [job.name]
    assert job.status == "Stopped"
