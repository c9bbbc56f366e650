"""SageMaker jobs: account, request, code archive, names and identity, failures and costs."""

import io
import json
import os
import subprocess
import tarfile
from datetime import UTC, datetime
from types import SimpleNamespace

import botocore.session
import pytest
import regex
from boto3.exceptions import S3UploadFailedError
from botocore.exceptions import (
    ClientError,
    CredentialRetrievalError,
    EndpointConnectionError,
    NoCredentialsError,
    ProfileNotFound,
    UnauthorizedSSOTokenError,
)
from botocore.validate import ParamValidator
from datasets import Dataset, DatasetDict
from pydantic import ValidationError

from llm_engineering.cloud.package import code_archive, folder_hash
from llm_engineering.cloud.sagemaker import cost, dispatch, failures, jobs
from llm_engineering.cloud.sagemaker.account import Account
from llm_engineering.cloud.sagemaker.request import INPUTS, Machine, machines, machines_after, training_job_request
from llm_engineering.errors import RequestError, WorkError
from llm_engineering.recipe.compute_blocks import ComputeConfig, SageMakerConfig
from llm_engineering.recipe.loading import load_recipe
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.training_blocks import TrainingSetup
from llm_engineering.training.processes.job import Job
from tests.conftest import ROOT
from tests.fakes.aws import complaints_about

ROLE = "arn:aws:iam::123456789012:role/training"


PLAN = "arn:aws:sagemaker:eu-west-1:123456789012:training-plan/spring"


def config(**values):
    return SageMakerConfig(instance_type="ml.g5.2xlarge", **values)


def settings(monkeypatch, **values):
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "SAGEMAKER_ROLE", "SAGEMAKER_BUCKET", "SAGEMAKER_IMAGE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    return Settings(_env_file=None, **values)


def account(**values):
    return Account("eu-west-1", ROLE, "bucket", "prefix", "image", **values)


def test_all_missing_values_are_named_at_once(monkeypatch):
    with pytest.raises(RequestError) as error:
        Account.resolve(config(), settings(monkeypatch))
    assert [name for name in ("AWS_REGION", "SAGEMAKER_ROLE", "SAGEMAKER_BUCKET", "make image") if name not in str(error.value)] == []  # fmt: skip


def test_malformed_values_are_named(monkeypatch):
    with pytest.raises(RequestError) as error:
        Account.resolve(config(role="training", bucket="s3://b/c", image="i"), settings(monkeypatch, aws_region="r"))
    assert "the role training is not an ARN" in str(error.value)
    assert 'the bucket "s3://b/c" is not a bucket name' in str(error.value)
    with pytest.raises(RequestError, match='the bucket " my-bucket" is not a bucket name'):
        Account.resolve(config(), settings(monkeypatch, sagemaker_bucket=" my-bucket"))
    with pytest.raises(RequestError, match='the region "eu-west-1 " is not the name of a region'):
        Account.resolve(config(), settings(monkeypatch, aws_region="eu-west-1 "))


@pytest.mark.parametrize(("prefix", "valid"), [("a", True), ("a/b/", True), ("a//b", False), ("a/b//", False)])
def test_a_prefix_has_no_empty_folder(prefix, valid):
    if valid:
        assert config(prefix=prefix).prefix == prefix
    else:
        with pytest.raises(ValidationError, match="prefix"):
            config(prefix=prefix)


def test_the_recipe_overrides_the_settings(monkeypatch):
    known = settings(
        monkeypatch, aws_region="eu-west-1", sagemaker_role=ROLE, sagemaker_bucket="b", sagemaker_image="i"
    )
    found = Account.resolve(config(bucket="own", prefix="a/b/"), known)
    assert (found.bucket, found.prefix, found.role, found.image) == ("own", "a/b", ROLE, "i")
    assert found.uri("code", "x") == "s3://own/a/b/code/x"


def request(kind, owner=None):
    return training_job_request(
        "a-job",
        ["python", "-m", "llm_engineering.training"],
        {"code": "s3://b/code.tar.gz", "data": "s3://b/data/"},
        {},
        "s3://b/checkpoints/a-job",
        "s3://b/results",
        kind,
        owner or account(),
        {"own": "tag"},
    )


@pytest.mark.parametrize(
    "kind",
    [
        config(),
        config(use_spot=False),
        config(vpc={"subnets": ["subnet-1"], "security_group_ids": ["sg-1"]}, tags={"team": "x"}, instance_count=2),
        config(use_spot=False, keep_alive_s=3600, training_plan_arn=PLAN, network_isolation=True, encrypt_traffic=True),
    ],
)
def test_botocore_accepts_the_requests(kind):
    made = request(kind, account(kms_key="arn:aws:kms:eu-west-1:123456789012:key/k", secret="the-name"))
    model = botocore.session.get_session().get_service_model("sagemaker").operation_model("CreateTrainingJob")
    assert ParamValidator().validate(made, model.input_shape).generate_report() == ""
    algorithm = made["AlgorithmSpecification"]
    assert max(map(len, algorithm["ContainerEntrypoint"] + algorithm["ContainerArguments"])) <= 256
    # botocore checks neither patterns nor upper limits.
    assert list(complaints_about(made, model.input_shape)) == []


def test_an_isolated_job_gets_neither_the_secret_nor_the_address_of_its_checkpoints():
    kind = config(
        use_spot=False, keep_alive_s=600, training_plan_arn=PLAN, network_isolation=True, encrypt_traffic=True
    )
    made = request(kind, account(secret="the-name"))
    assert {"LLM_SECRET", "LLM_CHECKPOINTS_URI"} & made["Environment"].keys() == set()
    assert made["EnableNetworkIsolation"]
    assert made["EnableInterContainerTrafficEncryption"]
    assert made["ResourceConfig"]["KeepAlivePeriodInSeconds"] == 600
    assert made["ResourceConfig"]["TrainingPlanArn"] == PLAN
    plain = request(config(), account(secret="the-name"))
    assert {"LLM_SECRET", "LLM_CHECKPOINTS_URI"} <= plain["Environment"].keys()
    assert {"KeepAlivePeriodInSeconds", "TrainingPlanArn"} & plain["ResourceConfig"].keys() == set()


@pytest.mark.parametrize("keys", [{"keep_alive_s": 600}, {"training_plan_arn": PLAN}])
def test_spot_machines_are_neither_kept_nor_reserved(keys):
    with pytest.raises(ValidationError, match="needs machines on demand.*set use_spot to false"):
        config(**keys)


def test_a_training_plan_has_no_other_types():
    with pytest.raises(ValidationError, match=r"set fallback_instance_types to \[\]"):
        config(use_spot=False, training_plan_arn=PLAN, fallback_instance_types=["ml.g6.2xlarge"])


def test_only_spot_jobs_have_a_waiting_time():
    spot = request(config(max_run_s=600))
    assert spot["StoppingCondition"] == {"MaxRuntimeInSeconds": 600, "MaxWaitTimeInSeconds": 1200}
    assert spot["CheckpointConfig"] == {"S3Uri": "s3://b/checkpoints/a-job", "LocalPath": "/opt/ml/checkpoints"}
    demand = request(config(max_run_s=600, use_spot=False))
    assert demand["StoppingCondition"] == {"MaxRuntimeInSeconds": 600}
    assert demand["EnableManagedSpotTraining"] is False


def test_the_start_unpacks_the_code_and_runs_the_command(tmp_path):
    """The script of the entry point, with another folder instead of /opt/ml and a `python` that prints its arguments."""
    (script,) = [part for part in request(config())["AlgorithmSpecification"]["ContainerEntrypoint"] if " " in part]
    channel = tmp_path / "ml" / "input" / "data" / "code"
    channel.mkdir(parents=True)
    (channel / "abc.tar.gz").write_bytes(code_archive(ROOT))
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\npwd; ls pyproject.toml; for a in "$@"; do echo "<$a>"; done')
    python.chmod(0o755)
    shown = subprocess.run(
        ["sh", "-c", script.replace("/opt/ml", str(tmp_path / "ml")), "sh", "python", "two words"],
        env={"PATH": f"{python.parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    place = str(tmp_path / "ml" / "project")
    started = ["<-m>", "<llm_engineering.cloud.container>", "<python>", "<two words>"]
    assert shown.stdout.split("\n")[:-1] == [place, "pyproject.toml", *started]


def git(folder, *arguments):
    subprocess.run(["git", "-C", str(folder), *arguments], check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path):
    folder = tmp_path / "checkout"
    folder.mkdir()
    git(folder, "init")
    (folder / ".gitignore").write_text(".env\n")
    (folder / ".env").write_text("COMET_API_KEY=planted-value")
    (folder / "kept.py").write_text("one")
    (folder / "gone.py").write_text("two")
    (folder / "run").write_text("#!/bin/sh")
    (folder / "run").chmod(0o755)
    git(folder, "add", "-A")
    (folder / "new.py").write_text("not tracked")
    (folder / "gone.py").unlink()
    return folder


def test_the_archive_has_the_tracked_files_as_they_are_on_disk(checkout):
    (checkout / "kept.py").write_text("changed")
    with tarfile.open(fileobj=io.BytesIO(code_archive(checkout))) as archive:
        assert archive.getnames() == [".gitignore", "kept.py", "run"]
        assert archive.extractfile("kept.py").read() == b"changed"
        assert [member.mode for member in archive] == [0o644, 0o644, 0o755]
    assert b"planted-value" not in code_archive(checkout)


def test_equal_files_give_equal_archives(checkout):
    former = code_archive(checkout)
    os.utime(checkout / "kept.py", (1, 1))
    assert code_archive(checkout) == former
    (checkout / "kept.py").write_text("changed")
    assert code_archive(checkout) != former


def test_a_folder_without_git_is_refused(tmp_path):
    with pytest.raises(RequestError, match="not a git checkout"):
        code_archive(tmp_path)


def test_sagemaker_accepts_the_names():
    names = jobs.JobNames.of("llama-3.1_8b, für alle--" + "x" * 60, "sft", {"a": 1})
    name = names.name(7)
    pattern = botocore.session.get_session().get_service_model("sagemaker").shape_for("TrainingJobName").metadata
    assert len(name) <= 63
    assert name.startswith("llama-3-1-8b-f-r-alle-x")
    assert name.endswith(f"-sft-{names.digest}-0007")
    assert regex.fullmatch(pattern["pattern"], name)
    assert names.number(name) == 7


class Client:
    """Lists and describes jobs by name; a page has two jobs."""

    def __init__(self, *names):
        self.names = names

    def get_paginator(self, operation):
        assert operation == "list_training_jobs"
        return self

    def paginate(self, **asked):
        assert asked.get("StatusEquals", "InProgress") == "InProgress"
        found = [{"TrainingJobName": name} for name in self.names if asked["NameContains"] in name]
        return [{"TrainingJobSummaries": found[i : i + 2]} for i in range(0, len(found), 2)]

    def describe_training_job(self, **asked):
        return asked


def test_the_newest_job_has_the_highest_number():
    names = jobs.JobNames("tiny", "sft", "0123456789ab")
    own = [names.name(number) for number in (9, 10, 2)]
    others = ["tiny-dpo-0123456789ab-0099", "tiny-sft-0123456789ab-0099-hyperparameter-tuning"]
    assert names.newest(Client(*own, *others))["TrainingJobName"] == "tiny-sft-0123456789ab-0010"
    assert names.newest(Client(*others)) is None


def test_running_jobs_of_the_same_recipe_and_stage_with_another_identity_are_found():
    names = jobs.JobNames("tiny", "sft", "0123456789ab")
    other = "tiny-sft-ba9876543210-0001"
    listed = [names.name(1), other, "very-tiny-sft-ba9876543210-0001", "tiny-dpo-ba9876543210-0001", "tiny-sft-x-0001"]
    assert names.running_others(Client(*listed)) == [other]


def job(**compute):
    recipe = load_recipe(ROOT / "configs" / "python_reference.yaml", [])
    setup = recipe.setup.model_copy(update={"compute": ComputeConfig(**compute)})
    return Job(stage="sft", config=recipe.sft.model_dump(), setup=setup, parameters={"run_id": os.urandom(4).hex()})


ROWS = DatasetDict({"train": Dataset.from_list([{"input_ids": [1, 2], "labels": [-100, 2]}])})
ELSEWHERE = {"target": "sagemaker", "sagemaker": {"instance_type": "ml.g5.2xlarge"}}


def test_the_identity_depends_on_the_work_and_not_on_the_machine(tmp_path):
    identity = jobs.job_identity(job(**ELSEWHERE), ROWS)
    other = {"target": "sagemaker", "sagemaker": {"instance_type": "ml.p3.2xlarge", "use_spot": False}}
    assert jobs.job_identity(job(**other), ROWS) == identity
    assert jobs.job_identity(job(**ELSEWHERE, dtype="float32"), ROWS) != identity
    changed = DatasetDict({"train": Dataset.from_list([{"input_ids": [1, 2], "labels": [-100, 3]}])})
    assert jobs.job_identity(job(**ELSEWHERE), changed) != identity
    (tmp_path / "adapter.safetensors").write_bytes(b"1")
    started = job(**ELSEWHERE).model_copy(update={"start": tmp_path})
    from_one = jobs.job_identity(started, ROWS)
    (tmp_path / "adapter.safetensors").write_bytes(b"2")
    assert jobs.job_identity(started, ROWS) != from_one
    scored = started.model_copy(update={"reward_model": tmp_path})
    assert jobs.job_identity(scored, ROWS) != jobs.job_identity(started, ROWS)


def test_a_job_gets_the_model_that_it_starts_from_and_its_reward_model(tmp_path, monkeypatch):
    uploaded = {}
    monkeypatch.setattr(dispatch, "upload_code", lambda account: "s3://b/code")

    def upload(account, folder, *parts):
        uploaded[parts[0]] = json.loads((folder / "job.json").read_text()) if parts[0] == "jobs" else folder
        return f"s3://b/{parts[0]}/{folder.name}"

    monkeypatch.setattr(dispatch, "upload_folder", upload)
    monkeypatch.setattr(dispatch.Account, "resolve", lambda *_: SimpleNamespace(client=lambda _: None))
    folders = {name: tmp_path / name for name in ("start", "reward_model")}
    for folder in folders.values():
        folder.mkdir()
        (folder / "adapter.safetensors").write_bytes(b"1")
    for models in ({}, folders):
        work = dispatch._Stage(job(**ELSEWHERE).model_copy(update=models), ROWS, Settings(), "tiny")
        channels = work.upload()
        work.upload_job("a-name")
        assert channels.keys() == {"code", "data", *models}
        found = {name: uploaded["jobs"][name] for name in folders}
        assert found == {name: f"{INPUTS}/{name}" if name in models else None for name in folders}


def test_the_identity_depends_on_the_code_that_the_job_runs(checkout, monkeypatch):
    """Not on files that the job does not run, such as the documentation, so an edit there does not start a second job."""
    for file in ("llm_engineering/train.py", "docker/training.lock", "docs/page.md"):
        (checkout / file).parent.mkdir(exist_ok=True)
        (checkout / file).write_text("one")
    git(checkout, "add", "-A")
    monkeypatch.setattr(jobs, "PROJECT_ROOT", checkout)
    former = jobs.job_identity(job(**ELSEWHERE), ROWS)
    (checkout / "docs" / "page.md").write_text("two")
    assert jobs.job_identity(job(**ELSEWHERE), ROWS) == former
    for file in ("llm_engineering/train.py", "docker/training.lock"):
        (checkout / file).write_text("two")
        changed = jobs.job_identity(job(**ELSEWHERE), ROWS)
        assert jobs.JobNames.of("tiny", "sft", changed) != jobs.JobNames.of("tiny", "sft", former)
        former = changed


def test_instance_types_are_tried_in_order_and_once():
    spot = config(fallback_instance_types=["ml.g6.2xlarge", "ml.g5.2xlarge", "ml.g5.4xlarge"])
    assert machines(spot) == [(kind, True) for kind in ("ml.g5.2xlarge", "ml.g6.2xlarge", "ml.g5.4xlarge")]
    assert machines_after(spot, Machine("ml.g6.2xlarge", True)) == [("ml.g5.4xlarge", True)]
    assert machines_after(spot, Machine("ml.g5.4xlarge", True)) == []
    assert machines_after(spot, Machine("ml.other.large", True)) == []
    assert machines(config(use_spot=False)) == [("ml.g5.2xlarge", False)]


def test_on_demand_comes_after_all_spot_types_if_the_recipe_allows_it():
    allowed = config(fallback_instance_types=["ml.g6.2xlarge"], fallback_on_demand=True)
    kinds = ["ml.g5.2xlarge", "ml.g6.2xlarge"]
    assert machines(allowed) == [(kind, spot) for spot in (True, False) for kind in kinds]
    assert machines_after(allowed, Machine("ml.g5.2xlarge", False)) == [("ml.g6.2xlarge", False)]
    with pytest.raises(ValidationError, match="no effect with use_spot false"):
        config(use_spot=False, fallback_on_demand=True)


def ended(status="Failed", secondary="Failed", reason="", spot=True, **more):
    return {
        "TrainingJobName": "a-job",
        "TrainingJobStatus": status,
        "SecondaryStatus": secondary,
        "FailureReason": reason,
        "EnableManagedSpotTraining": spot,
        "ResourceConfig": {"InstanceType": "ml.g5.2xlarge", "InstanceCount": 2, "VolumeSizeInGB": 100},
        "StoppingCondition": {"MaxRuntimeInSeconds": 600, "MaxWaitTimeInSeconds": 1200},
        "AlgorithmSpecification": {"TrainingImage": "the-image"},
        "RoleArn": ROLE,
        "OutputDataConfig": {"S3OutputPath": "s3://b/results"},
        **more,
    }


@pytest.mark.parametrize(
    ("description", "said", "remedy"),
    [
        (
            ended(reason="CapacityError: Unable to provision requested ML compute capacity."),
            "no available machine of the type ml.g5.2xlarge on the spot market",
            "fallback_instance_types",
        ),
        (
            ended(reason="CapacityError: no", spot=False),
            "no available machine of the type ml.g5.2xlarge.",
            "use another region.",
        ),
        (
            ended(reason="AlgorithmError: Error: OutOfMemoryError: CUDA out of memory. Tried, exit code: 1"),
            "The GPU ran out of memory.",
            "per_device_train_batch_size",
        ),
        (
            ended(reason="AlgorithmError: , exit code: 137"),
            "The machine ran out of memory",
            "more memory than ml.g5.2xlarge",
        ),
        (
            ended(reason="AlgorithmError: Error: [Errno 28] No space left on device, exit code: 1"),
            "volume of 100 GB is full",
            "volume_size_gb",
        ),
        (
            ended(reason="ClientError: Cannot pull image the-image"),
            "The image the-image could not be pulled.",
            "make image",
        ),
        (ended(reason="ClientError: Data download failed: AccessDenied (403)"), "lacks a permission", ROLE),
        (ended(reason="ClientError: Data download failed: AccessDenied s3://b/images/x"), "lacks a permission", ROLE),
        (
            ended(reason="AlgorithmError: Error: The loss is nan. Lower sft.learning_rate., exit code: 1"),
            "The loss is nan. Lower sft.learning_rate.",
            "resumes from the newest checkpoint",
        ),
        (ended(reason="ClientError: Data download failed: No space left on device"), "volume of", "volume_size_gb"),
        (
            ended(reason="ClientError: Please use an instance type with more memory"),
            "The machine ran out of memory",
            "more memory",
        ),
        (ended(reason="InternalServerError"), "ended with an error", "SageMaker says: InternalServerError"),
        (ended("Stopped", "MaxRuntimeExceeded"), "max_run_s, 600 s", "max_run_s to finish"),
        (ended("Stopped", "MaxWaitTimeExceeded"), "more than 1200 s", "max_wait_s"),
        (ended("Stopped", "Stopped"), "stopped, but not by this command", "newest checkpoint"),
    ],
)
def test_failures_are_a_sentence_and_a_remedy(description, said, remedy):
    error = failures.explain(description, ["line one", "line two"])
    assert isinstance(error, WorkError)
    assert said in str(error)
    assert remedy in str(error)
    assert str(error).endswith("The last 2 lines of its log:\n  line one\n  line two")


def test_the_jobs_own_error_is_shown_once():
    """The word "image" in it does not make the message blame the pull of the image."""
    own = "The image was built from another lock. Build it anew."
    text = str(failures.explain(ended(reason=f"AlgorithmError: Error: {own}, exit code: 2")))
    assert text.count(own) == 1
    assert "could not be pulled" not in text


def test_only_a_job_without_a_free_machine_is_tried_with_another_type():
    assert failures.is_capacity(ended(reason="CapacityError: Unable to provision requested ML compute capacity."))
    assert not failures.is_capacity(ended(reason="AlgorithmError: CUDA out of memory"))
    assert failures.is_capacity(ended("Stopped", "MaxWaitTimeExceeded"))
    assert not failures.is_capacity(ended("Stopped", "MaxWaitTimeExceeded", TrainingStartTime=datetime.now(UTC)))
    assert not failures.is_capacity(ended("Stopped", "MaxRuntimeExceeded"))


def refusal(code, message="It is refused.", status=400):
    answer = {"Error": {"Code": code, "Message": message}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(answer, "DescribeTrainingJob")


def refused_upload(code):
    try:
        raise refusal(code)
    except ClientError as error:
        with pytest.raises(S3UploadFailedError) as raised:
            raise S3UploadFailedError(f"Failed to upload a to b: {error}")  # noqa: B904 — as boto3 does
    return raised.value


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (refusal("ExpiredToken"), "cannot look: ExpiredToken: It is refused. Renew the credentials"),
        (refusal("400", "Bad Request"), "400: Bad Request. Renew the credentials"),
        (refused_upload("ExpiredToken"), "cannot look: ExpiredToken: It is refused. Renew the credentials"),
        (UnauthorizedSSOTokenError(), "Renew the credentials"),
        (CredentialRetrievalError(provider="process", error_msg="ended"), "Renew the credentials"),
        (refusal("RequestTimeTooSkewed"), "The clock of this machine is wrong"),
        (
            refusal("InvalidSignatureException", "Signature expired: 1 is now earlier than 2"),
            "The clock of this machine",
        ),
        (refusal("SignatureDoesNotMatch", "Signature not yet current: 2 is still later than 1"), "The clock of this"),
        (refusal("InvalidSignatureException", "The signature does not match"), "Correct the credentials"),
        (refusal("TooManyRequestsException", status=429), "Wait a minute"),
        (EndpointConnectionError(endpoint_url="https://a"), "Check the network"),
        (S3UploadFailedError("The connection was lost"), "Check the network"),
        (ProfileNotFound(profile="team"), "`make preflight` checks"),
    ],
)
def test_errors_of_aws_have_a_remedy(error, remedy):
    with pytest.raises(WorkError) as raised, failures.translated("cannot look"):
        raise error
    assert remedy in str(raised.value)


def test_missing_credentials_are_a_wrong_request():
    with pytest.raises(RequestError, match="aws configure"), failures.translated("cannot look"):
        raise NoCredentialsError


def test_the_cost_counts_every_machine_and_the_spot_saving():
    description = ended("Completed", "Completed", TrainingTimeInSeconds=7200, BillableTimeInSeconds=1800)
    # Half an hour billed, two machines.
    price = cost.Price(1.5, "2026-01-31")
    assert cost.cost_facts(description, price) == {
        "training_seconds": 7200,
        "billable_seconds": 1800,
        "spot_saving": 0.75,
        "cost_usd_estimate": 1.5,
        "price_date": "2026-01-31",
    }
    assert "spot saved 75%): about 1.50 USD by the price list of 2026-01-31" in cost.cost_line(description, price)


def test_an_unknown_type_has_no_price():
    description = ended("Completed", spot=False, TrainingTimeInSeconds=60, BillableTimeInSeconds=60)
    assert cost.cost_facts(description, None) == {"training_seconds": 60, "billable_seconds": 60}
    assert "60 s billed; the cost is not known" in cost.cost_line(description, None)


class Waiting(dispatch.Work):
    """A work whose jobs are these descriptions, one after another."""

    def __init__(self, *found):
        super().__init__("exam", {}, config(fallback_instance_types=["ml.g6.2xlarge"]), None, "tiny")
        self.found = list(found)
        self._prices = dict.fromkeys(("ml.g5.2xlarge", "ml.g6.2xlarge"), cost.Price(1.0, "2026-01-31"))

    def start(self, choices):
        return self.found.pop(0) | {"TrainingJobStatus": "InProgress"}

    def unfinished(self):
        return None

    def upload(self):
        return {}

    def fetch(self, description):
        return description["TrainingJobName"]

    command = upload_job = None


def test_the_cost_of_jobs_that_were_replaced_failed_or_were_stopped_counts(monkeypatch, caplog):
    def job(name, kind, seconds, **more):
        resources = {"InstanceType": kind, "InstanceCount": 1, "VolumeSizeInGB": 100}
        return ended(**more) | {
            "TrainingJobName": name, "TrainingJobArn": name, "ResourceConfig": resources, "BillableTimeInSeconds": seconds
        }  # fmt: skip

    caplog.set_level("INFO")
    monkeypatch.setattr(dispatch.Account, "resolve", lambda *_: SimpleNamespace(client=lambda _: None))
    lost = job("one", "ml.g5.2xlarge", 1800, reason="CapacityError: Unable to provision requested ML compute capacity.")
    done, failed = (job("two", "ml.g6.2xlarge", 3600, status=status) for status in ("Completed", "Failed"))
    ends = {"one": lost, "two": done}
    monkeypatch.setattr(dispatch, "follow", lambda client, log, name, *_: ends[name])
    facts = []
    assert dispatch.run_job(Waiting(lost, done), facts.append) == "two"
    assert facts[-1]["sagemaker_cost_usd_estimate"] == 1.5
    assert "Job one: 0 s on 1 x ml.g5.2xlarge, 1800 s billed: about 0.50 USD" in caplog.text
    ends["two"] = failed
    with pytest.raises(WorkError):
        dispatch.run_job(Waiting(lost, failed), facts.append)
    assert facts[-1]["sagemaker_cost_usd_estimate"] == 1.5

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(dispatch, "follow", interrupt)
    monkeypatch.setattr(dispatch.jobs, "describe", lambda *_: lost | {"TrainingJobStatus": "Stopped"})
    caplog.clear()
    with pytest.raises(KeyboardInterrupt):
        dispatch.run_job(Waiting(lost), facts.append)
    assert facts[-1]["sagemaker_cost_usd_estimate"] == 0.5
    assert "1800 s billed: about 0.50 USD" in caplog.text


def test_the_folder_hash_covers_names_and_contents(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        (folder / "sub").mkdir(parents=True)
        (folder / "sub" / "a").write_text("1")
    assert folder_hash(one) == folder_hash(two)
    (two / "sub" / "a").rename(two / "sub" / "b")
    assert folder_hash(one) != folder_hash(two)


def test_the_recipe_for_sagemaker_differs_only_in_compute():
    cuda = load_recipe(ROOT / "configs" / "cuda_8b.yaml", []).model_dump()
    cloud = load_recipe(ROOT / "configs" / "sagemaker_8b.yaml", []).model_dump()
    assert {key for key in cuda if cuda[key] != cloud[key]} == {"compute"}
    changed = {key for key in cuda["compute"] if cuda["compute"][key] != cloud["compute"][key]}
    assert changed == {"target", "sagemaker"}


def test_the_setup_of_a_local_recipe_is_its_evaluation_setup():
    """Evaluation runs in one local process. For a recipe with one process the setups are equal, so the cache stays valid."""
    local = load_recipe(ROOT / "configs" / "python_reference.yaml", [])
    assert local.evaluation_setup == local.setup
    assert local.compute.here == local.compute
    cloud = load_recipe(ROOT / "configs" / "sagemaker_8b.yaml", [])
    assert isinstance(cloud.evaluation_setup, TrainingSetup)
    assert cloud.evaluation_setup.compute == cloud.compute.here == ComputeConfig(dtype="bfloat16")


def test_several_machines_share_no_disk_to_read_the_best_checkpoint_from():
    keys = ["compute.sagemaker.instance_count=2", "compute.num_processes=2", "compute.backend=transformers"]
    with pytest.raises(RequestError, match="load_best reads the best checkpoint in every process"):
        load_recipe(ROOT / "configs" / "sagemaker_8b.yaml", [*keys, "sft.load_best=true"])
