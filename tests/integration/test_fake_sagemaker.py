"""The fake SageMaker behaves like SageMaker in the respects that the other cloud tests rely on."""

import io
import tarfile
import time

import pytest
from botocore.exceptions import ClientError

from tests.fakes.aws import Error
from tests.fakes.sagemaker import ACCOUNT, BUCKET, IMAGE, LOG_GROUP, ROLE, running_sagemaker, why_no_jobs

needs_jobs = pytest.mark.skipif(why_no_jobs() is not None, reason=str(why_no_jobs()))


@pytest.fixture
def fake():
    with running_sagemaker() as fake:
        yield fake


def request(name: str, script: str, **changes):
    return {
        "TrainingJobName": name,
        "AlgorithmSpecification": {
            "TrainingImage": IMAGE, "TrainingInputMode": "File",
            "ContainerEntrypoint": ["sh", "-c"], "ContainerArguments": [script],
        },
        "RoleArn": ROLE,
        "OutputDataConfig": {"S3OutputPath": f"s3://{BUCKET}/out"},
        "ResourceConfig": {"InstanceType": "ml.g5.2xlarge", "InstanceCount": 1, "VolumeSizeInGB": 30},
        "StoppingCondition": {"MaxRuntimeInSeconds": 600},
        **changes,
    }  # fmt: skip


def spot(**changes):
    return {
        "EnableManagedSpotTraining": True,
        "StoppingCondition": {"MaxRuntimeInSeconds": 600, "MaxWaitTimeInSeconds": 1200},
        "CheckpointConfig": {"S3Uri": f"s3://{BUCKET}/checkpoints/run", "LocalPath": "/opt/ml/checkpoints"},
        **changes,
    }


def finished(sagemaker, name: str, *until: str):
    for _ in range(600):
        job = sagemaker.describe_training_job(TrainingJobName=name)
        if job["SecondaryStatus"] in (until or ("Completed", "Failed", "Stopped")):
            return job
        time.sleep(0.05)
    raise AssertionError(job)


def wait_for_object(s3, key: str) -> None:
    for _ in range(600):
        if s3.list_objects_v2(Bucket=BUCKET, Prefix=key)["KeyCount"]:
            return
        time.sleep(0.05)
    raise AssertionError(key)


@needs_jobs
def test_a_job_reads_its_channels_writes_a_model_and_logs(fake):
    s3, sagemaker = fake.client("s3"), fake.client("sagemaker", "launcher")
    s3.put_object(Bucket=BUCKET, Key="in/rows/part.txt", Body=b"one")
    script = "echo hello $WHO; cat /opt/ml/input/data/rows/part.txt > /opt/ml/model/copy; ls /proc | grep -c '^[0-9]'"
    rows = {"S3DataSource": {"S3DataType": "S3Prefix", "S3Uri": f"s3://{BUCKET}/in/rows"}}
    channels = [{"ChannelName": "rows", "DataSource": rows}]
    sagemaker.create_training_job(**request("a", script, InputDataConfig=channels, Environment={"WHO": "you"}))
    job = finished(sagemaker, "a")
    assert job["TrainingJobStatus"] == "Completed"
    passed = [t["Status"] for t in job["SecondaryStatusTransitions"]]
    assert passed == ["Starting", "Downloading", "Training", "Uploading", "Completed"]
    body = s3.get_object(Bucket=BUCKET, Key="out/a/output/model.tar.gz")["Body"].read()
    with tarfile.open(fileobj=io.BytesIO(body)) as tar:
        assert tar.extractfile("copy").read() == b"one"
    logs = fake.client("logs")
    (stream,) = logs.describe_log_streams(logGroupName=LOG_GROUP, logStreamNamePrefix="a/")["logStreams"]
    events = logs.get_log_events(logGroupName=LOG_GROUP, logStreamName=stream["logStreamName"], startFromHead=True)
    lines = [e["message"] for e in events["events"]]
    assert lines[0] == "hello you"
    assert int(lines[1]) < 6  # the job has its own process namespace
    by = {(r.principal, r.service, r.operation) for r in fake.requests}
    assert ("launcher", "sagemaker", "CreateTrainingJob") in by
    assert {("job", "s3", "ListObjectsV2"), ("job", "s3", "PutObject"), ("job", "logs", "PutLogEvents")} <= by


@needs_jobs
def test_a_failure_has_the_written_reason_and_the_exit_code(fake):
    sagemaker = fake.client("sagemaker", "launcher")
    sagemaker.create_training_job(**request("a", "echo no rows > /opt/ml/output/failure; exit 3"))
    job = finished(sagemaker, "a")
    assert (job["TrainingJobStatus"], job["FailureReason"]) == ("Failed", "AlgorithmError: no rows\n, exit code: 3")


@needs_jobs
def test_a_stop_sends_sigterm_and_keeps_the_model(fake):
    sagemaker, s3 = fake.client("sagemaker", "launcher"), fake.client("s3")
    script = (
        "trap 'echo half > /opt/ml/model/m; exit 1' TERM; touch /opt/ml/checkpoints/up; while :; do sleep 0.1; done"
    )
    sagemaker.create_training_job(**request("a", script, **spot()))
    wait_for_object(s3, "checkpoints/run/up")
    sagemaker.stop_training_job(TrainingJobName="a")
    job = finished(sagemaker, "a")
    assert (job["TrainingJobStatus"], "FailureReason" in job) == ("Stopped", False)
    assert s3.get_object(Bucket=BUCKET, Key="out/a/output/model.tar.gz")["ContentLength"] > 0
    with pytest.raises(ClientError, match="in status Stopped"):
        sagemaker.stop_training_job(TrainingJobName="a")


@needs_jobs
@pytest.mark.parametrize("graceful", [True, False])
def test_an_interrupted_job_starts_again_with_its_checkpoints(fake, graceful):
    sagemaker = fake.client("sagemaker", "launcher")
    script = (
        "cd /opt/ml/checkpoints; if [ -e step ]; then cat * > ../model/steps; exit 0; fi; "
        "trap 'echo last > term; exit 1' TERM; echo 7 > step; while :; do sleep 0.1; done"
    )
    sagemaker.create_training_job(**request("a", script, **spot()))
    s3 = fake.client("s3")
    wait_for_object(s3, "checkpoints/run/step")
    fake.interrupt("a", graceful)
    job = finished(sagemaker, "a")
    passed = [t["Status"] for t in job["SecondaryStatusTransitions"]]
    assert passed == ["Starting", "Downloading", "Training", "Interrupted", "Starting", "Downloading", "Training",
                      "Uploading", "Completed"]  # fmt: skip
    body = s3.get_object(Bucket=BUCKET, Key="out/a/output/model.tar.gz")["Body"].read()
    with tarfile.open(fileobj=io.BytesIO(body)) as tar:
        assert tar.extractfile("steps").read() == (b"7\nlast\n" if graceful else b"7\n")
    assert job["BillableTimeInSeconds"] <= job["TrainingTimeInSeconds"]


@needs_jobs
def test_machines_find_each_other_by_name_and_fail_together(fake):
    sagemaker = fake.client("sagemaker", "launcher")
    script = (
        "grep -q 'current_host.: .algo-1' /opt/ml/input/config/resourceconfig.json && exec sleep 60; "
        "getent hosts algo-1 && exit 4"
    )
    resources = {"InstanceType": "ml.g5.2xlarge", "InstanceCount": 2, "VolumeSizeInGB": 30}
    sagemaker.create_training_job(**request("a", script, ResourceConfig=resources))
    assert finished(sagemaker, "a")["FailureReason"].endswith("exit code: 4")


@needs_jobs
def test_leaving_the_fake_ends_its_jobs():
    with running_sagemaker() as fake:
        sagemaker = fake.client("sagemaker", "launcher")
        sagemaker.create_training_job(**request("a", "trap '' TERM; while :; do sleep 0.1; done"))
        finished(sagemaker, "a", "Training")
    assert not fake.jobs["a"].thread.is_alive()
    assert fake.jobs["a"].status == "Stopped"


def test_a_job_without_capacity_fails_after_it_was_created(fake):
    fake.fails_to_start["ml.g5.2xlarge"] = "CapacityError: Unable to provision requested ML compute capacity."
    sagemaker = fake.client("sagemaker", "launcher")
    sagemaker.create_training_job(**request("a", "true"))
    job = finished(sagemaker, "a")
    assert job["FailureReason"].startswith("CapacityError")
    assert "TrainingStartTime" not in job


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({}, "ResourceInUse"),
        ({"TrainingJobName": "b", "ResourceConfig": {"InstanceType": "ml.g5.2xlarge", "InstanceCount": 5,
                                                     "VolumeSizeInGB": 30}}, "ResourceLimitExceeded"),
        ({"TrainingJobName": "b", "EnableManagedSpotTraining": True}, "ValidationException"),
    ],
)  # fmt: skip
def test_jobs_that_are_refused(fake, changes, code):
    sagemaker = fake.client("sagemaker", "launcher")
    sagemaker.create_training_job(**request("a", "true"))
    with pytest.raises(ClientError) as error:
        sagemaker.create_training_job(**request("a", "true") | changes)
    assert error.value.response["Error"]["Code"] == code


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"Colour": "red"}, "Colour is unknown"),
        ({"TrainingJobName": "a_b"}, "does not match"),
        ({"TrainingJobName": "a" * 64}, "not between"),
        ({"Environment": {"A": "x" * 513}}, "not between"),
        ({"RoleArn": None}, "is NoneType, not string"),
        ({"ResourceConfig": {"InstanceType": "ml.g5.2xlarge", "VolumeSizeInGB": "30"}}, "VolumeSizeInGB is str"),
    ],
)
def test_a_request_that_does_not_fit_botocores_model_is_refused_and_recorded(fake, changes, said):
    # EventBridge Scheduler also sends the stored request without a check by a client.
    with pytest.raises(Error, match=said):
        fake.send("sagemaker", "CreateTrainingJob", request("a", "true") | changes, "scheduler")
    assert len(fake.invalid) == 1
    assert not fake.jobs
    fake.invalid.clear()


def test_failures_on_demand_in_every_protocol(fake):
    fake.forbid("sts", "GetCallerIdentity")
    fake.forbid("sagemaker", "ListTrainingJobs")
    fake.fail("s3", "HeadBucket", "404", status=404)
    for service, call, code in (
        ("sts", lambda c: c.get_caller_identity(), "AccessDenied"),
        ("sagemaker", lambda c: c.list_training_jobs(), "AccessDeniedException"),
        ("s3", lambda c: c.head_bucket(Bucket=BUCKET), "404"),
    ):
        with pytest.raises(ClientError) as error:
            call(fake.client(service, "launcher"))
        assert error.value.response["Error"]["Code"] == code
        call_by_setup = fake.client(service)
        call(call_by_setup)


def test_quotas_come_in_pages_and_permissions_are_simulated(fake):
    quotas = fake.client("service-quotas", "launcher").get_paginator("list_service_quotas")
    names = [q["QuotaName"] for page in quotas.paginate(ServiceCode="sagemaker") for q in page["Quotas"]]
    assert names == list(fake.quotas)
    fake.denied.add("iam:PassRole")
    source = f"arn:aws:iam::{ACCOUNT}:user/launcher"
    answer = fake.client("iam", "launcher").simulate_principal_policy(
        PolicySourceArn=source, ActionNames=["iam:PassRole", "s3:GetObject"], ResourceArns=[ROLE]
    )
    said = {r["EvalActionName"]: r["EvalDecision"] for r in answer["EvaluationResults"]}
    assert said == {"iam:PassRole": "implicitDeny", "s3:GetObject": "allowed"}
    assert fake.client("sts", "launcher").get_caller_identity()["Arn"] == source
