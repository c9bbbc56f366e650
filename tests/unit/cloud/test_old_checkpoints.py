"""Old checkpoints are deleted from S3, and never the one from which a run would continue."""

import os
from pathlib import Path

import boto3
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError
from moto import mock_aws

from llm_engineering.cloud import old_checkpoints
from llm_engineering.cloud.old_checkpoints import delete_old_checkpoints, deleting_old_checkpoints

RUN = "sft-0123/checkpoints"


@pytest.fixture
def s3(monkeypatch):
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    with mock_aws():
        client = boto3.client("s3", "us-east-1")
        client.create_bucket(Bucket="bucket")
        yield client


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("weights")


def put(s3, *names: str, body: str = "weights") -> None:
    for name in names:
        s3.put_object(Bucket="bucket", Key=f"jobs/checkpoints/{name}", Body=body)


def left(s3) -> list[str]:
    listed = s3.list_objects_v2(Bucket="bucket")["Contents"]
    return [found["Key"].removeprefix("jobs/checkpoints/") for found in listed]


def test_what_training_has_deleted_is_deleted_from_s3_and_nothing_else(s3, tmp_path):
    kept = [f"{RUN}/checkpoint-20/a", f"{RUN}/checkpoint-30/a", f"{RUN}/checkpoint-30/sub/b", "comet/archive.zip"]
    write(tmp_path, *kept)
    old = [f"{RUN}/checkpoint-9/a", f"{RUN}/checkpoint-9/sub/b", f"{RUN}/.partial/checkpoint-30/a"]
    # Another run of the job, of which this machine has no newer checkpoint, and a key beside the prefix.
    other = ["dpo-4567/checkpoints/checkpoint-5/a"]
    put(s3, *kept, *old, *other)
    s3.put_object(Bucket="bucket", Key=f"jobs/checkpoints-2/{RUN}/checkpoint-1/a", Body="w")
    delete_old_checkpoints(s3, "s3://bucket/jobs/checkpoints/", tmp_path)
    assert sorted(left(s3)) == sorted([*kept, *other, f"jobs/checkpoints-2/{RUN}/checkpoint-1/a"])


def test_the_older_checkpoint_stays_until_s3_has_all_of_the_newer_one(s3, tmp_path):
    write(tmp_path, f"{RUN}/checkpoint-20/a", f"{RUN}/checkpoint-20/b")
    put(s3, f"{RUN}/checkpoint-10/a", f"{RUN}/checkpoint-20/a")
    delete_old_checkpoints(s3, "s3://bucket/jobs/checkpoints", tmp_path)
    assert f"{RUN}/checkpoint-10/a" in left(s3)
    put(s3, f"{RUN}/checkpoint-20/b", body="half")
    delete_old_checkpoints(s3, "s3://bucket/jobs/checkpoints", tmp_path)
    assert f"{RUN}/checkpoint-10/a" in left(s3)
    put(s3, f"{RUN}/checkpoint-20/b")
    delete_old_checkpoints(s3, "s3://bucket/jobs/checkpoints", tmp_path)
    assert left(s3) == [f"{RUN}/checkpoint-20/a", f"{RUN}/checkpoint-20/b"]


def test_a_missing_right_is_told_and_does_not_end_the_job(monkeypatch, capsys, tmp_path):
    class Refusing:
        def get_paginator(self, operation):
            raise ClientError({"Error": {"Code": "AccessDenied", "Message": "no"}}, operation)

    monkeypatch.setattr(old_checkpoints, "_PAUSE_S", 0.0)
    monkeypatch.setattr(boto3, "client", lambda service: Refusing())
    with deleting_old_checkpoints("s3://bucket/jobs", tmp_path):
        for _ in range(200):
            if said := capsys.readouterr().err:
                break
            old_checkpoints.threading.Event().wait(0.01)
    assert "Old checkpoints stay in s3://bucket/jobs" in said
    assert "s3:DeleteObject" in said


def test_deletion_goes_on_after_an_error_of_the_network(monkeypatch, capsys, tmp_path):
    tried, ended = [], old_checkpoints.threading.Event()

    def fail_once(*arguments):
        tried.append(arguments)
        if len(tried) == 1:
            raise EndpointConnectionError(endpoint_url="https://s3")
        ended.set()

    monkeypatch.setattr(old_checkpoints, "_PAUSE_S", 0.0)
    monkeypatch.setattr(boto3, "client", lambda service: None)
    monkeypatch.setattr(old_checkpoints, "delete_old_checkpoints", fail_once)
    with deleting_old_checkpoints("s3://bucket/jobs", tmp_path):
        assert ended.wait(10)
    assert "until the next attempt: Could not connect" in capsys.readouterr().err
