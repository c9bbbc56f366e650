"""A run of a schedule: skipped, judged or failed, and the notifications."""

import http.server
import json
import threading
from datetime import UTC, datetime

import pytest
from moto.s3.models import s3_backends

from llm_engineering.cloud.schedules.notify import notify
from llm_engineering.cloud.schedules.run_records import JOB_VARIABLE, Place, RunRecord
from llm_engineering.feedback.human_rows import take_snapshot
from llm_engineering.feedback.people import said_about, snapshots
from llm_engineering.feedback.served import ServedLog
from llm_engineering.recipe.loading import load_recipe
from llm_engineering.recipe.settings import Settings
from pipelines.inputs import Inputs
from tests.conftest import ROOT
from tests.fakes.aws import ACCOUNT, REGION, FakeAWS, running_aws
from tools.cli import prepare_zenml
from tools.scheduling.scheduled import Scheduled, fingerprint

# By default, ZenML takes its source root from the main module, which is outside the project if pytest runs in a worker.
prepare_zenml()

PASSED = {"outcome": "passed", "stage": "staging", "reason": "every rule passed", "rules": []}
INPUTS = Inputs(
    documents="d",
    instructions=None,
    preferences=None,
    replay=None,
    evaluation=None,
    checks=None,
    recipes={"sft": "s", "dpo": "p"},
    code="c",
)


class Webhook(http.server.HTTPServer):
    """A webhook that answers with `status` and collects the texts of the notifications in `received`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), WebhookHandler)
        self.received: list[str] = []
        self.status = 200


class WebhookHandler(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.server.received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"])
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture
def webhook(settings, monkeypatch):
    with Webhook() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        monkeypatch.setenv("NOTIFY_WEBHOOK", f"http://127.0.0.1:{server.server_port}/planted-hook-4711")
        monkeypatch.setenv("OPENAI_API_KEY", "planted-openai-4711")
        monkeypatch.delenv("NOTIFY_SNS_TOPIC", raising=False)
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def recipe():
    return load_recipe(ROOT / "configs" / "python_reference.yaml")


def verdicts(place) -> list[str]:
    return [record.verdict for record in Place(str(place)).records()]


def run(place, monkeypatch, name: str, work):
    monkeypatch.setenv(JOB_VARIABLE, name)
    return Scheduled(str(place)).run(work)


def judged(recipe, inputs=INPUTS, decision=PASSED, code=0):
    def work(scheduled):
        if not scheduled.is_new(recipe, inputs):
            return scheduled.skip("no new data")
        scheduled.judged("run-id", 4, decision)
        return code

    return work


def test_run_is_skipped_if_nothing_has_changed_since_the_last_one(tmp_path, monkeypatch, recipe, webhook):
    place = tmp_path / "weekly"
    for name, inputs in (("a", INPUTS), ("b", INPUTS), ("c", INPUTS.model_copy(update={"documents": "new"}))):
        assert run(place, monkeypatch, name, judged(recipe, inputs)) == 0
    assert verdicts(place) == ["staged: version 4", "skipped: no new data", "staged: version 4"]
    assert webhook.received == []


def test_new_feedback_is_new_data_and_a_request_without_feedback_is_not(tmp_path, monkeypatch, webhook, settings):
    place = tmp_path / "weekly"
    recipe = load_recipe(ROOT / "configs" / "kto_thumbs.yaml", ["data.labelled=feedback"])
    log = ServedLog(settings.llm_output_dir / "served" / recipe.name, 1, "abc")

    def run_after_a_request(name, has_feedback):
        log.write_answer(name, [{"role": "user", "content": f"Who is {name}?"}], {"content": "Kell."}, "stop", None)
        if has_feedback:
            log.write_feedback(name, "up", None, None)
        people = {"labelled": take_snapshot(said_about(recipe, "labelled", settings), snapshots(settings))}
        inputs = {"people": people, "instructions": "i", "recipes": {"kto": "k"}}
        run(place, monkeypatch, name, judged(recipe, INPUTS.model_copy(update=inputs)))

    for name, has_feedback in (("a", True), ("b", False), ("c", True)):
        run_after_a_request(name, has_feedback)
    assert verdicts(place) == ["staged: version 4", "skipped: no new data", "staged: version 4"]


def test_a_repeat_of_the_version_in_production_counts_as_promoted(tmp_path, monkeypatch, recipe, webhook):
    place = tmp_path / "weekly"
    for name, stage in (("a", "production"), ("b", None)):
        inputs = INPUTS.model_copy(update={"documents": name})
        run(place, monkeypatch, name, judged(recipe, inputs, {**PASSED, "stage": stage}))
    assert verdicts(place) == ["promoted: version 4", "promoted: version 4"]


def test_a_run_compares_itself_with_the_last_run_that_judged_a_model(tmp_path, monkeypatch, recipe, webhook):
    place = tmp_path / "weekly"
    failed = {**PASSED, "outcome": "failed", "stage": None, "rules": [{"name": "loss better", "verdict": "failed"}]}
    stale = {**PASSED, "outcome": "stale", "stage": None, "reason": "production changed"}

    def broken(scheduled):
        assert scheduled.is_new(recipe, INPUTS)
        raise OSError("no disk")

    with pytest.raises(OSError, match="no disk"):
        run(place, monkeypatch, "a", broken)
    run(place, monkeypatch, "b", judged(recipe, decision=stale))
    run(place, monkeypatch, "c", judged(recipe, decision=failed))
    run(place, monkeypatch, "d", judged(recipe, decision=failed))
    assert verdicts(place) == [
        "skipped: no new data", "gate failed: loss better", "stale: production changed", "failed: no disk"
    ]  # fmt: skip


def test_a_job_reads_records_only_back_to_the_last_run_that_judged_a_model(tmp_path, monkeypatch, recipe, settings):
    with running_aws(FakeAWS()) as fake:
        key, secret = fake.credentials("job")
        for name, value in (("ENDPOINT_URL", fake.url), ("ACCESS_KEY_ID", key), ("SECRET_ACCESS_KEY", secret)):
            monkeypatch.setenv(f"AWS_{name}", value)
        fake.client("s3").create_bucket(Bucket="bucket", CreateBucketConfiguration={"LocationConstraint": REGION})
        place = Place("s3://bucket/weekly")
        stored = s3_backends[ACCOUNT]["aws"].buckets["bucket"].keys
        for day, outcome in enumerate(("staged", "promoted", "failed"), 1):
            began = datetime(2026, 3, day, tzinfo=UTC)
            fingerprinted = fingerprint(recipe, INPUTS) if outcome == "promoted" else None
            place.write(RunRecord(run=f"r{day}", began=began, outcome=outcome, fingerprint=fingerprinted))
            stored[f"weekly/runs/r{day}.json"].last_modified = began.replace(tzinfo=None)
        assert not Scheduled("s3://bucket/weekly").is_new(recipe, INPUTS)
        assert [read["Key"][-7:-5] for read in fake.asked("s3", "GetObject")] == ["r3", "r2"]


def test_second_run_is_skipped_while_the_first_runs(tmp_path, monkeypatch, webhook):
    place = tmp_path / "weekly"

    def first(scheduled):
        assert run(place, monkeypatch, "b", lambda _: pytest.fail("the second run was not skipped")) == 0
        assert verdicts(place) == ["skipped: running", "running"]
        return 0

    assert run(place, monkeypatch, "a", first) == 0
    assert run(place, monkeypatch, "c", lambda _: 0) == 0


def test_failed_and_interrupted_runs_are_reported_without_secrets(tmp_path, monkeypatch, webhook, capsys):
    place = tmp_path / "weekly"

    def leaking(scheduled):
        raise ValueError("401 for key planted-openai-4711")

    def interrupted(scheduled):
        raise KeyboardInterrupt

    monkeypatch.setenv("NOTIFY_WEBHOOK", f"http://127.0.0.1:{webhook.server_port}/planted-hook-4711")
    with pytest.raises(ValueError, match="401"):
        run(place, monkeypatch, "a", leaking)
    with pytest.raises(KeyboardInterrupt):
        run(place, monkeypatch, "b", interrupted)
    assert webhook.received[0].startswith("Retraining weekly failed\n401 for key ***\n")
    assert webhook.received[1].startswith("Retraining weekly interrupted\n")
    kept = "".join(file.read_text() for file in (place / "runs").iterdir())
    assert "planted-openai-4711" not in kept + "".join(webhook.received)


def test_fingerprint_changes_with_everything_that_decides_the_result(recipe):
    same = fingerprint(recipe, INPUTS)

    def changed(**blocks):
        return recipe.model_copy(update=blocks)

    assert fingerprint(changed(compute=recipe.compute.model_copy(update={"device": "cpu"})), INPUTS) == same
    assert fingerprint(changed(tracking=recipe.tracking.model_copy(update={"comet": "off"})), INPUTS) == same
    assert fingerprint(recipe, INPUTS.model_copy(update={"code": "new", "incumbent": 5})) == same
    for field in (
        "documents",
        "instructions",
        "preferences",
        "replay",
        "replay_instructions",
        "evaluation",
        "checks",
        "exam",
    ):
        assert fingerprint(recipe, INPUTS.model_copy(update={field: "new"})) != same
    assert fingerprint(changed(seed=7), INPUTS) != same
    assert fingerprint(changed(model=recipe.model.model_copy(update={"revision": "abc"})), INPUTS) != same


def test_fingerprint_changes_with_the_code_of_a_step(recipe, monkeypatch):
    from pipelines import chain

    same = fingerprint(recipe, INPUTS)
    monkeypatch.setitem(chain.evaluate.configuration.environment, "CODE_VERSION", "changed")
    assert fingerprint(recipe, INPUTS) != same


def test_a_failed_notification_is_logged_without_the_address(webhook, caplog):
    # ZenML sets the root logger to CRITICAL.
    caplog.set_level("INFO", logger="llm_engineering")
    webhook.status = 500
    assert not notify("Retraining weekly failed", "why", Settings())
    assert "NOTIFY_WEBHOOK failed: HTTPStatusError 500" in caplog.text
    assert "planted" not in caplog.text


def test_notification_over_a_topic(settings, monkeypatch):
    topic = f"arn:aws:sns:{REGION}:{ACCOUNT}:retraining"
    with running_aws(FakeAWS()) as fake:
        key, secret = fake.credentials("job")
        for name, value in (("ENDPOINT_URL", fake.url), ("ACCESS_KEY_ID", key), ("SECRET_ACCESS_KEY", secret)):
            monkeypatch.setenv(f"AWS_{name}", value)
        with_topic = settings.model_copy(update={"notify_sns_topic": topic})
        assert not notify("Retraining weekly failed", "why", with_topic)
        fake.client("sns").create_topic(Name="retraining")
        assert notify("Retraining größer\nfailed " + "x" * 100, f"the key is {secret}", with_topic)
        sent = fake.asked("sns", "Publish")[-1]
        assert not fake.invalid
    assert sent["Subject"].startswith("Retraining gr??er failed xx")
    assert len(sent["Subject"]) == 100
    assert sent["Message"] == "the key is ***"
