"""A machine of a fake training job: a process in its own mount and process namespaces.

Its `/opt/ml` is a temporary folder that no other process sees, and none of its processes outlives it. The rest of its
image is this machine: `python` is the interpreter of the tests.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import psutil

from tests.fakes.aws import REGION

if TYPE_CHECKING:
    from tests.fakes.job import Job

LOG_GROUP = "/aws/sagemaker/TrainingJobs"
_ML = Path("/opt/ml")
# Private mounts: $1 is the job's /opt/ml, $2 its /etc/hosts; the rest is the command.
_INSIDE = f'mount --bind "$1" {_ML} && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'
_NAMESPACES = [
    "setpriv", "--pdeathsig", "KILL",
    "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", _INSIDE, "sh",
]  # fmt: skip


def why_no_jobs() -> str | None:
    """The reason why jobs cannot run on this machine, for `pytest.mark.skipif`; None if they can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "jobs of the fake SageMaker need Linux and root, for their own /opt/ml"
    with tempfile.TemporaryDirectory() as folder:
        hosts = Path(folder, "hosts")
        hosts.touch()
        try:
            _ML.mkdir(parents=True, exist_ok=True)
            subprocess.run([*_NAMESPACES, folder, hosts, "true"], check=True, capture_output=True, timeout=30)
        except (OSError, subprocess.SubprocessError):
            return (
                "jobs of the fake SageMaker need unshare and setpriv, and the right to mount, which this machine denies"
            )
    return None


@dataclass
class Machine:
    """One machine of a job: its /opt/ml, and the container's process."""

    job: Job
    name: str
    ml: Path
    hosts: Path
    process: subprocess.Popen[bytes] = field(init=False)
    copied: dict[Path, tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def make(cls, job: Job, folder: Path, name: str, names: list[str]) -> Self:
        """Create the folders of a machine, and download inputs and checkpoints.

        Raises:
            LookupError: a channel has no objects.
        """
        ml = folder / "ml"
        for part in ("input/config", "input/data", "model", "output/data", "checkpoints"):
            (ml / part).mkdir(parents=True)
        (folder / "home").mkdir()
        (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"127.0.0.1 {n}\n" for n in names))
        resources = {"current_host": name, "hosts": names, "network_interface_name": "lo"}
        (ml / "input/config/resourceconfig.json").write_text(json.dumps(resources))
        parameters = job.request.get("HyperParameters", {})
        (ml / "input/config/hyperparameters.json").write_text(json.dumps(parameters))
        machine = cls(job, name, ml, folder / "hosts")
        for channel in job.request.get("InputDataConfig", []):
            source = channel["DataSource"]["S3DataSource"]["S3Uri"]
            if not machine._download(source, ml / "input/data" / channel["ChannelName"]):
                raise LookupError(
                    f'Data download failed:No S3 objects found under S3 URL "{source}" given in input data source.'
                )
        if "CheckpointConfig" in job.request:
            machine._download(job.request["CheckpointConfig"]["S3Uri"], machine._checkpoints)
            machine.copied = machine._files()
        return machine

    @property
    def _checkpoints(self) -> Path:
        asked = self.job.request["CheckpointConfig"].get("LocalPath", f"{_ML}/checkpoints")
        return self.ml / Path(asked).relative_to(_ML)

    def _download(self, uri: str, folder: Path) -> int:
        """Download the objects with a prefix as SageMaker does: a path begins after the prefix, or after its last slash."""
        bucket, prefix = split_uri(uri)
        s3 = self.job.fake.client("s3", "job")
        count = 0
        for page in s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            for found in page.get("Contents", []):
                key: str = found["Key"]
                if key.endswith("/"):
                    continue
                inside = key[len(prefix) :].startswith("/") or prefix.endswith("/")
                base = prefix if inside else prefix.rpartition("/")[0]
                target = folder / key[len(base) :].lstrip("/")
                target.parent.mkdir(parents=True, exist_ok=True)
                s3.download_file(bucket, key, str(target))
                count += 1
        return count

    def start(self) -> None:
        """Start the command; its output is sent to the logs."""
        job, image = self.job, self.job.request["AlgorithmSpecification"]
        command = [*image.get("ContainerEntrypoint", []), *image.get("ContainerArguments", [])]
        key, secret = job.fake.credentials("job")
        env = {
            "PATH": f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(self.ml.parent / "home"), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1",
            "AWS_REGION": REGION, "AWS_ENDPOINT_URL": job.fake.url, "AWS_ACCESS_KEY_ID": key,
            "AWS_SECRET_ACCESS_KEY": secret, "TRAINING_JOB_NAME": job.name, "TRAINING_JOB_ARN": job.arn,
            **job.fake.environment, **job.request.get("Environment", {}),
        }  # fmt: skip
        self.process = subprocess.Popen(
            [*_NAMESPACES, str(self.ml), str(self.hosts), *command],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env, cwd="/",
            start_new_session=True,
        )  # fmt: skip
        self._log = threading.Thread(target=self._pump, daemon=True)
        self._log.start()

    def _pump(self) -> None:
        """Send the lines of the output to CloudWatch; the first line creates the stream."""
        logs, stream = self.job.fake.client("logs", "job"), f"{self.job.name}/{self.name}-{time.time_ns() // 10**6}"
        made = False
        assert self.process.stdout is not None
        for line in self.process.stdout:
            text = line.decode(errors="replace").rstrip("\n")
            if not text.strip():
                continue
            if not made:
                self._make_stream(logs, stream)
                made = True
            event = {"timestamp": int(time.time() * 1000), "message": text}
            logs.put_log_events(logGroupName=LOG_GROUP, logStreamName=stream, logEvents=[event])

    @staticmethod
    def _make_stream(logs: Any, stream: str) -> None:
        with suppress(logs.exceptions.ResourceAlreadyExistsException):
            logs.create_log_group(logGroupName=LOG_GROUP)
        logs.create_log_stream(logGroupName=LOG_GROUP, logStreamName=stream)

    def end(self, grace_s: float) -> None:
        """Send SIGTERM to the container's first process, and SIGKILL to all of them after `grace_s`."""
        if self.process.poll() is None and grace_s:
            with suppress(psutil.NoSuchProcess):
                for child in psutil.Process(self.process.pid).children():
                    child.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(grace_s)
        if self.process.poll() is None:
            # Not only `unshare`: killed before it has asked the kernel to kill its child, it would leave the child running,
            # and the child would hold the pipe that `_pump` reads.
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._log.join()

    def failure(self) -> str:
        """The FailureReason: the reason that the container wrote, and its exit code."""
        file = self.ml / "output" / "failure"
        reason = file.read_text() if file.is_file() else ""
        return f"AlgorithmError: {reason}, exit code: {self.process.returncode}"

    def copy_checkpoints(self) -> None:
        """Upload new and changed files to S3; nothing is removed there."""
        if "CheckpointConfig" not in self.job.request:
            return
        bucket, prefix = split_uri(self.job.request["CheckpointConfig"]["S3Uri"])
        now = self._files()
        for path, state in now.items():
            if self.copied.get(path) == state:
                continue
            key = f"{prefix.rstrip('/')}/{path.relative_to(self._checkpoints)}"
            try:
                body = path.read_bytes()
            except OSError:  # the job has just removed it
                continue
            self.job.fake.client("s3", "job").put_object(Bucket=bucket, Key=key, Body=body)
            self.copied[path] = state

    def _files(self) -> dict[Path, tuple[int, int]]:
        found = {}
        # os.walk ignores folders that disappear while it runs: the job renames and removes its own.
        for folder, _, names in os.walk(self._checkpoints):
            for name in sorted(names):
                path = Path(folder, name)
                with suppress(OSError):
                    found[path] = (path.stat().st_mtime_ns, path.stat().st_size)
        return found


def split_uri(uri: str) -> tuple[str, str]:
    """Bucket and key of `s3://bucket/key`."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key
