"""A training job of the fake SageMaker: its states and its machines."""

from __future__ import annotations

import io
import queue
import tarfile
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.fakes.aws import ACCOUNT, REGION
from tests.fakes.machine import Machine, split_uri

if TYPE_CHECKING:
    from tests.fakes.sagemaker import FakeSageMaker


class Job:
    """A training job, in a thread of its own."""

    def __init__(self, fake: FakeSageMaker, request: dict[str, Any], quota: str) -> None:
        self.fake, self.request, self.quota = fake, request, quota
        self.name: str = request["TrainingJobName"]
        self.arn = f"arn:aws:sagemaker:{REGION}:{ACCOUNT}:training-job/{self.name}"
        self.status, self.reason = "InProgress", ""
        self.created = time.time()
        self.orders: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.transitions: list[dict[str, Any]] = []
        self.thread = threading.Thread(target=self._run_guarded, daemon=True)
        self.go("Starting")

    def go(self, secondary: str, message: str = "") -> None:
        """Change the secondary status."""
        now = time.time()
        if self.transitions:
            self.transitions[-1]["EndTime"] = now
        self.transitions.append(
            {"Status": secondary, "StartTime": now, "StatusMessage": message or _MESSAGES[secondary]}
        )

    def summary(self) -> dict[str, Any]:
        times = {"CreationTime": self.created, "LastModifiedTime": self.transitions[-1]["StartTime"]}
        if self.status in ("Completed", "Failed", "Stopped"):
            times["TrainingEndTime"] = self.transitions[-1]["StartTime"]
        return {"TrainingJobName": self.name, "TrainingJobArn": self.arn, "TrainingJobStatus": self.status, **times}

    def described(self) -> dict[str, Any]:
        asked = {k: v for k, v in self.request.items() if k != "Tags"}
        training = [t for t in self.transitions if t["Status"] == "Training"]
        seconds = round(sum(t.get("EndTime", time.time()) - t["StartTime"] for t in training))
        answer = {
            **asked, **self.summary(), "SecondaryStatus": self.transitions[-1]["Status"],
            "SecondaryStatusTransitions": self.transitions,
            "ModelArtifacts": {"S3ModelArtifacts": f"{self._output}/model.tar.gz"},
        }  # fmt: skip
        if training:
            answer["TrainingStartTime"] = training[0]["StartTime"]
        if self.reason:
            answer["FailureReason"] = self.reason
        if self.status not in ("InProgress", "Stopping"):
            spot = asked.get("EnableManagedSpotTraining", False)
            answer |= {
                "TrainingTimeInSeconds": max(1, seconds),
                "BillableTimeInSeconds": max(1, round(seconds * (0.3 if spot else 1))),
            }
        return answer

    @property
    def _output(self) -> str:
        return f"{self.request['OutputDataConfig']['S3OutputPath'].rstrip('/')}/{self.name}/output"

    def _end(self, status: str, reason: str = "") -> None:
        self.reason = reason[:1024]
        self.go(status, reason)
        self.status = status

    def _run_guarded(self) -> None:
        try:
            self._run()
        except Exception as error:
            # Otherwise its client would wait forever.
            self._end("Failed", reason=f"InternalServerError: {error!r}")
            raise

    def _run(self) -> None:
        if self.quota in self.fake.no_capacity:
            self.transitions[-1]["StatusMessage"] = "Insufficient capacity error from EC2 while launching, retrying!"
            self._order(600.0)
            return self._end("Stopped")
        order = self._order(self.fake.starting_s)
        refused = self.fake.fails_to_start.get(self.request["ResourceConfig"]["InstanceType"])
        if refused and order is None:
            return self._end("Failed", reason=refused)
        while order is None:
            with tempfile.TemporaryDirectory(prefix="job-") as folder:
                self.go("Downloading")
                try:
                    machines = self._machines(Path(folder))
                except LookupError as error:
                    return self._end("Failed", reason=f"ClientError: {error}")
                self.go("Training")
                order, failed = self._train(machines)
                if order in ("interrupt", "kill"):
                    self.go("Interrupted")
                    self.go("Starting")
                    order = self._order(self.fake.starting_s)
                    continue
                if order == "end":
                    return self._end("Stopped")
                if order is None:
                    self.go("Uploading")
                self._upload(machines[0].ml)
                if order is None and failed:
                    return self._end("Failed", reason=failed.failure())
                if order is None:
                    return self._end("Completed")
        self._end("Stopped")
        return None

    def _order(self, seconds: float) -> str | None:
        try:
            return self.orders.get(timeout=seconds) if seconds else self.orders.get_nowait()
        except queue.Empty:
            return None

    def _machines(self, folder: Path) -> list[Machine]:
        count = self.request["ResourceConfig"]["InstanceCount"]
        names = [f"algo-{i}" for i in range(1, count + 1)]
        return [Machine.make(self, folder / name, name, names) for name in names]

    def _train(self, machines: list[Machine]) -> tuple[str | None, Machine | None]:
        """Run the command on all machines; returns the order that ended it and the machine that failed first, if any."""
        for machine in machines:
            machine.start()
        order = None
        while order is None and any(m.process.poll() is None for m in machines):
            order = self._order(0.1)
            for machine in machines:
                machine.copy_checkpoints()
            if any(m.process.poll() for m in machines):
                break
        # Found before the other machines are ended, because ending them is not their failure.
        failed = next((m for m in machines if m.process.poll()), None)
        grace = self.fake.grace_s if order in ("stop", "interrupt") else 0.0
        for machine in machines:
            machine.end(grace)
            if order not in ("kill", "end"):
                machine.copy_checkpoints()
        return order, failed

    def _upload(self, ml: Path) -> None:
        for folder, name in ((ml / "model", "model.tar.gz"), (ml / "output", "output.tar.gz")):
            with io.BytesIO() as archive:
                with tarfile.open(fileobj=archive, mode="w:gz") as tar:
                    for path in sorted(folder.iterdir()):
                        tar.add(path, arcname=path.name)
                bucket, key = split_uri(f"{self._output}/{name}")
                if name == "model.tar.gz" or any(folder.iterdir()):
                    self.fake.client("s3", "job").put_object(Bucket=bucket, Key=key, Body=archive.getvalue())


_MESSAGES = {
    "Starting": "Preparing the instances for training",
    "Downloading": "Downloading the training image and input data",
    "Training": "Training image download completed. Training in progress.",
    "Interrupted": "Spot instances were reclaimed",
    "Uploading": "Uploading generated training model",
    "Completed": "Training job completed",
    "Stopping": "Stopping the training job",
    "Stopped": "Training job stopped",
    "Failed": "Training job failed",
}
