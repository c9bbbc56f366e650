"""A schedule fires as EventBridge fires it: its jobs run the chain, and report to a ZenML server with logins."""

import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid

import httpx
import pytest

from llm_engineering.cloud.schedules.run_records import Place
from tests.conftest import ROOT, free_port
from tests.fakes.iam import assert_allowed, policy
from tests.fakes.sagemaker import BUCKET, LOG_GROUP, why_no_jobs
from tests.integration.preloaded import Forked
from tests.integration.schedules import FOLDER, RECIPE, account, fire, list_names, put_secret, settings_of  # noqa: F401
from tests.tiny_models import write_llama


class Webhook(http.server.ThreadingHTTPServer):
    """A webhook that records the messages it gets."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), WebhookHandler)
        self.messages: list[tuple[str, str]] = []


class WebhookHandler(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.server.messages.append((self.path, json.loads(body)["text"]))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture
def webhook():
    with Webhook() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield server
        server.shutdown()


class ZenMLServer:
    """A ZenML server, the key of its service account, and the id of a stack that keeps artifacts in S3."""

    def __init__(self, url: str, key: str) -> None:
        self.url, self.key = url, key
        token = httpx.post(f"{url}/api/v1/login", data={"password": key}).json()["access_token"]
        self.client = httpx.Client(base_url=f"{url}/api/v1", headers={"Authorization": f"Bearer {token}"}, timeout=60)
        store = {"type": "artifact_store", "flavor": "s3", "configuration": {"path": f"s3://{BUCKET}/zenml"}}
        orchestrator = self.get("/components", type="orchestrator")["items"][0]["id"]
        parts = {"artifact_store": [self.post("/components", name="s3", **store)], "orchestrator": [orchestrator]}
        self.stack = self.post("/stacks", name="s3", components=parts)

    def get(self, path: str, **parameters) -> dict:
        return self.client.get(path, params=parameters).raise_for_status().json()

    def post(self, path: str, **values) -> str:
        answer = self.client.post(path, json=values)
        assert answer.is_success, answer.text
        return answer.json()["id"]


@pytest.fixture
def zenml_server(tmp_path):
    """A server that requires logins, with a service account and a stack whose artifacts are in S3."""
    pytest.importorskip("s3fs", reason="ZenML's artifact store in S3 needs s3fs")
    port = free_port()
    env = {name: value for name, value in os.environ.items() if not name.startswith(("ZENML_", "AWS_"))}
    env |= {"ZENML_CONFIG_PATH": str(tmp_path / "server"), "ZENML_LOCAL_STORES_PATH": str(tmp_path / "server")}
    made, log = tmp_path / "server.json", tmp_path / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.fakes.zenml_server", str(port), str(made)],
            cwd=ROOT,
            env=env,
            stdout=output,
            stderr=output,
        )
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
        yield ZenMLServer(f"http://127.0.0.1:{port}", made.read_text())
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def command(env: dict[str, str], *arguments: str, code: int = 0) -> str:
    """`llm-engineering schedule` in a process of its own; returns what it wrote."""
    process = Forked("tools.cli", ["schedule", *arguments], env, ROOT)
    said = "".join(process.communicate(300))
    assert process.wait() == code, said
    return said


def rows(count: int) -> bytes:
    answer = "The number {i} comes after {before}, and {after} comes after it."
    texts = [answer.format(i=i, before=i - 1, after=i + 1) for i in range(count)]
    return "".join(
        json.dumps({"instruction": f"Where does the number {i} stand?", "output": text}) + "\n"
        for i, text in enumerate(texts)
    ).encode()


def log_of(fake, job: str) -> str:
    logs = fake.client("logs")
    (stream,) = logs.describe_log_streams(logGroupName=LOG_GROUP, logStreamNamePrefix=f"{job}/")["logStreams"]
    name = stream["logStreamName"]
    events = logs.get_log_events(logGroupName=LOG_GROUP, logStreamName=name, startFromHead=True)["events"]
    return "\n".join(event["message"] for event in events)


@pytest.mark.skipif(why_no_jobs() is not None, reason=str(why_no_jobs()))
def test_runs_of_a_fired_schedule_retrain_skip_and_fail(account, tokenizer, zenml_server, webhook, tmp_path):
    """The schedule fires twice at the same time, then without new data, then with data that cannot be read."""
    key = zenml_server.key
    planted, hook = f"planted-{uuid.uuid4().hex}", f"hook-{uuid.uuid4().hex}"
    address = f"http://127.0.0.1:{webhook.server_port}/{hook}"
    put_secret(account, {"ZENML_STORE_API_KEY": key, "OPENAI_API_KEY": planted, "NOTIFY_WEBHOOK": address})
    s3 = account.client("s3")
    s3.put_object(Bucket=BUCKET, Key="data/rows.jsonl", Body=rows(40))
    # With the whole vocabulary, DPO passes its gate.
    for file in write_llama(tmp_path / "model", tokenizer).iterdir():
        s3.upload_file(str(file), BUCKET, f"model/{file.name}")
    recipe = tmp_path / "weekly.yaml"
    recipe.write_text(RECIPE.format(local=ROOT / "configs" / "python_reference.yaml", bucket=BUCKET, spot="false"))
    env = {name: value for name, value in os.environ.items() if not name.startswith(("ZENML_", "AWS_"))}
    env |= {**account.env(), **settings_of(tmp_path), "OPENAI_API_KEY": planted, "NOTIFY_WEBHOOK": address}
    env |= {
        "ZENML_STORE_URL": zenml_server.url,
        "ZENML_STORE_API_KEY": key,
        "ZENML_CONFIG_PATH": str(tmp_path / "launcher"),
    }
    account.requests.clear()
    asked = ("create", "--config", str(recipe), "--cron", "0 3 ? * SUN *")
    assert "make stack-aws" in command(env, *asked, code=2)
    env["ZENML_ACTIVE_STACK_ID"] = zenml_server.stack
    command(env, *asked)

    first = fire(account)
    second = fire(account)
    for job in (second, first):
        account.job(job).thread.join(300)
    assert account.job(first).status == "Completed", log_of(account, first)
    assert account.job(second).status == "Completed", log_of(account, second)
    place = Place(f"s3://{BUCKET}/{FOLDER}")
    records = {job: place.record(job, s3) for job in (first, second)}
    assert records[second].verdict == "skipped: running"
    assert (records[first].verdict, records[first].version) == ("staged: version 1", 1)
    run = zenml_server.get(f"/runs/{records[first].run_id}")
    artifacts = zenml_server.get("/artifact_versions", size=100)["items"]
    assert (run["name"].partition("-")[0], run["body"]["status"]) == ("retrain", "completed")
    uris = [artifact["body"]["uri"] for artifact in artifacts]
    assert len(uris) > 10
    assert all(uri.startswith(f"s3://{BUCKET}/zenml/") for uri in uris)
    # The next run finds the answers that were paid for.
    assert f"{FOLDER}answers.jsonl" in account.objects(FOLDER)

    third = fire(account)
    account.job(third).thread.join(300)
    assert account.job(third).status == "Completed", log_of(account, third)
    assert webhook.messages == []
    s3.put_object(Bucket=BUCKET, Key="data/rows.jsonl", Body=f'{{"{planted}": 1}}\n'.encode())
    fourth = fire(account)
    account.job(fourth).thread.join(300)
    assert account.job(fourth).status == "Failed"
    ((path, message),) = webhook.messages
    assert path == f"/{hook}"
    assert message.startswith("Retraining weekly failed\n")
    found = json.loads(command(env, "list", "--json", "--limit", "9").splitlines()[0])
    verdicts = {run["run"]: run["verdict"] for run in found[0]["runs"]}
    assert verdicts[third] == "skipped: no new data"
    assert verdicts[fourth].startswith("failed: ")
    assert verdicts[fourth].removeprefix("failed: ") in message
    assert verdicts[fourth][:100].removeprefix("failed: ") in account.job(fourth).reason

    # The secrets are in Secrets Manager only.
    s3.delete_object(Bucket=BUCKET, Key="data/rows.jsonl")
    own = [*policy("job", SECRET="job"), *policy("job-schedules")]
    assert "sagemaker:ListTrainingJobs" in assert_allowed(account.requests, "job", own)
    seen = {"requests": str(account.requests), "notification": message, "verdicts": json.dumps(found)}
    seen |= {f"log of {job}": log_of(account, job) for job in (first, second, third, fourth)}
    seen |= {key: s3.get_object(Bucket=BUCKET, Key=key)["Body"].read().decode("latin-1") for key in account.objects("")}
    seen |= {str(file): file.read_bytes().decode("latin-1") for file in (tmp_path / "server").rglob("*.db")}
    assert any(name.endswith(".db") for name in seen)
    for secret in (key, planted, hook):
        assert [name for name, text in seen.items() if secret in text] == []
    command(env, "remove")
    assert account.objects(FOLDER) == []
    assert list_names(account) == []
