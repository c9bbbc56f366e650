"""Schedules in a fake account, over HTTP: created, listed, paused, changed and removed."""

import json
import os
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

import tools.cli
import tools.scheduling.schedule_job
from llm_engineering.cloud.schedules.run_records import Place, RunRecord
from llm_engineering.errors import RequestError, WorkError
from llm_engineering.recipe.settings import Settings
from tests.conftest import ROOT
from tests.fakes.aws import Request
from tests.fakes.iam import actions, assert_allowed, policy
from tests.fakes.sagemaker import ACCOUNT, BUCKET, REGION, ROLE
from tests.integration.schedules import (  # noqa: F401
    FOLDER,
    RECIPE,
    SCHEDULER_ROLE,
    TOPIC,
    account,
    allow,
    fire,
    list_names,
    put_secret,
    settings_of,
)
from tools.scheduling import schedule
from tools.scheduling.schedule_job import Server


@pytest.fixture
def fake(account, tmp_path, monkeypatch):
    """The account as the launcher's commands in this process find it, without requests so far."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "ZENML_"))]:
        monkeypatch.delenv(name)
    for name, value in {**account.env(), **settings_of(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(Settings.model_config, "env_file", None)
    server = Server("https://zenml.example.org", "stack-id", "project-id", has_logins=True)
    monkeypatch.setattr(tools.scheduling.schedule_job, "_server", lambda session: server)
    put_secret(account, {"ZENML_STORE_API_KEY": "planted-key-4711"})
    account.client("s3").put_object(Bucket=BUCKET, Key="data/rows.jsonl", Body=b"{}")
    account.client("s3").put_object(Bucket=BUCKET, Key="model/config.json", Body=b"{}")
    account.requests.clear()
    yield account
    account.errors.clear()
    for name in list_names(account):
        account.client("scheduler").delete_schedule_group(Name=name)
    for key in account.objects("llm-engineering/"):
        account.client("s3").delete_object(Bucket=BUCKET, Key=key)


@pytest.fixture
def recipe(tmp_path) -> Path:
    file = tmp_path / "weekly.yaml"
    file.write_text(RECIPE.format(local=ROOT / "configs" / "python_reference.yaml", bucket=BUCKET, spot="true"))
    return file


def call(*arguments: str) -> int:
    """`llm-engineering schedule` in this process; errors are raised."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tools.cli, "exit_code", lambda work, debug: work())
        patch.setattr(tools.cli, "start_logging", lambda debug: None)
        return tools.cli.main(["schedule", *arguments])


def create(recipe: Path, *arguments: str, cron: str = "0 3 ? * SUN *") -> int:
    return call("create", "--config", str(recipe), "--cron", cron, *arguments)


def listed(capsys) -> list[dict]:
    capsys.readouterr()
    assert call("list", "--json") == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_schedule_is_created_listed_paused_changed_and_removed_with_nothing_left(fake, recipe, capsys, monkeypatch):
    assert create(recipe, "--timezone", "Europe/Berlin") == 0
    (made,) = fake.asked("scheduler", "CreateSchedule")
    assert (made["ScheduleExpression"], made["ScheduleExpressionTimezone"]) == ("cron(0 3 ? * SUN *)", "Europe/Berlin")
    assert made["Target"]["RoleArn"] == SCHEDULER_ROLE
    request = json.loads(made["Target"]["Input"])
    assert request["TrainingJobName"] == "weekly--<aws.scheduler.execution-id>"
    assert request["CheckpointConfig"]["S3Uri"] == f"s3://{BUCKET}/{FOLDER}checkpoints/<aws.scheduler.execution-id>/"
    assert request["Environment"]["ZENML_STORE_URL"] == "https://zenml.example.org"
    (rule,) = fake.client("events").list_rules(NamePrefix="llm-engineering")["Rules"]
    assert json.loads(rule["EventPattern"])["detail"]["TrainingJobName"] == [{"prefix": "weekly--"}]
    (target,) = fake.client("events").list_targets_by_rule(Rule=rule["Name"])["Targets"]
    assert target["Arn"] == TOPIC
    (alarm,) = fake.client("cloudwatch").describe_alarms()["MetricAlarms"]
    assert alarm["AlarmActions"] == [TOPIC]
    (shown,) = listed(capsys)
    assert (shown["name"], shown["state"], shown["runs"]) == ("weekly", "active", [])
    assert datetime.fromisoformat(shown["next"]) > datetime.now(UTC)

    with pytest.raises(RequestError, match="There is a schedule weekly already"):
        create(recipe)
    assert call("pause") == 0
    assert listed(capsys)[0] | {"state": "paused", "next": None} == listed(capsys)[0]
    with monkeypatch.context() as patch:
        patch.setenv("SCHEDULER_ROLE", f"{SCHEDULER_ROLE}-2")
        assert call("change", "--cron", "30 4 1 * ? *") == 0
    (shown,) = listed(capsys)
    assert (shown["state"], shown["expression"], shown["timezone"]) == ("paused", "cron(30 4 1 * ? *)", "Europe/Berlin")
    full = "llm-engineering-weekly"
    described = fake.client("scheduler").get_schedule(GroupName=full, Name=full)
    assert json.loads(described["Target"]["Input"]) == request
    assert described["Target"]["RoleArn"] == f"{SCHEDULER_ROLE}-2"
    assert call("change", "--config", str(recipe), "--set", "seed=7") == 0
    described = fake.client("scheduler").get_schedule(GroupName=full, Name=full)
    assert json.loads(described["Target"]["Input"])["InputDataConfig"] != request["InputDataConfig"]
    assert call("resume") == 0
    assert listed(capsys)[0]["state"] == "active"

    assert call("remove") == 0
    assert list_names(fake) == []
    assert fake.client("events").list_rules()["Rules"] == []
    assert fake.client("cloudwatch").describe_alarms()["MetricAlarms"] == []
    assert fake.objects("llm-engineering/schedules/") == []
    assert fake.objects("data/") == ["data/rows.jsonl"]
    assert listed(capsys) == []
    with pytest.raises(RequestError, match="There is no schedule weekly"):
        call("remove", "--name", "weekly")
    assert "planted" not in json.dumps([str(asked) for asked in fake.requests])


def test_a_rate_fires_first_after_its_time_and_counts_from_there(fake, recipe, capsys):
    """Without a StartDate, EventBridge fires a rate at once, and again after each update."""
    full, week = "llm-engineering-weekly", timedelta(days=7)

    def start() -> datetime:
        return fake.client("scheduler").get_schedule(GroupName=full, Name=full)["StartDate"]

    create(recipe, cron="rate(7 days)")
    assert timedelta(0) <= datetime.now(UTC) + week - start() < timedelta(minutes=1)
    first = start()
    assert datetime.fromisoformat(listed(capsys)[0]["next"]).replace(microsecond=0) == first.replace(microsecond=0)
    for action in (["pause"], ["resume"], ["change", "--config", str(recipe), "--set", "seed=7"]):
        assert call(*action) == 0
        assert start() == first
    # A schedule that was created five days ago. Its rate of a day counts from the change.
    stored = fake.client("scheduler").get_schedule(GroupName=full, Name=full)
    target = stored["Target"]
    fake.client("scheduler").update_schedule(
        GroupName=full, Name=full, Target=target, FlexibleTimeWindow={"Mode": "OFF"}, State="ENABLED",
        ScheduleExpression="rate(7 days)", StartDate=datetime.now(UTC) + timedelta(days=2, hours=3),
    )  # fmt: skip
    capsys.readouterr()
    assert call("change", "--cron", "rate(1 day)") == 0
    assert timedelta(0) <= datetime.now(UTC) + timedelta(days=1) - start() < timedelta(minutes=1)
    assert f"start at {start():%a %Y-%m-%d %H:%M}" in capsys.readouterr().out


def test_the_recipe_in_the_job_has_the_paths_of_the_container(fake, recipe, tmp_path):
    checks = tmp_path / "my_checks.jsonl"
    checks.write_text('{"prompt": "Say yes.", "must_contain": ["yes"]}\n')
    exam = tmp_path / "my_exam.jsonl"
    exam.write_text('{"question": "Who?", "answers": ["Kell"]}\n')
    more = {"evaluation.checks": checks, "exam.path": exam, "exam.retrieval_passages": 0}
    create(recipe, *(word for key, value in more.items() for word in ("--set", f"{key}={value}")))
    (key,) = [key for key in fake.objects(f"{FOLDER}recipe/") if key.endswith("recipe.json")]
    kept = json.loads(fake.client("s3").get_object(Bucket=BUCKET, Key=key)["Body"].read())
    assert kept["compute"]["target"] == "local"
    assert kept["compute"]["sagemaker"] is None
    assert kept["data"]["instructions"] == "/opt/ml/input/data/data-instructions/rows.jsonl"
    assert kept["model"]["name_or_path"] == "/opt/ml/input/data/model-name-or-path"
    assert kept["evaluation"]["checks"] == "/opt/ml/input/data/recipe/checks/my_checks.jsonl"
    assert kept["exam"]["path"] == "/opt/ml/input/data/recipe/exam/path/my_exam.jsonl"
    assert kept["exam"]["control"] == "embedded:general"
    for name, file in (("checks/my_checks.jsonl", checks), ("exam/path/my_exam.jsonl", exam)):
        body = fake.client("s3").get_object(Bucket=BUCKET, Key=f"{key.rpartition('/')[0]}/{name}")["Body"]
        assert body.read() == file.read_bytes()
    (made,) = fake.asked("scheduler", "CreateSchedule")
    channels = {
        channel["ChannelName"]: channel["DataSource"]["S3DataSource"]["S3Uri"]
        for channel in json.loads(made["Target"]["Input"])["InputDataConfig"]
    }
    assert channels["data-instructions"] == f"s3://{BUCKET}/data/rows.jsonl"
    assert channels["model-name-or-path"] == f"s3://{BUCKET}/model/"
    assert sorted(channels) == ["code", "data-instructions", "model-name-or-path", "recipe"]


def test_data_that_a_job_cannot_read_is_refused_with_the_remedy(fake, recipe, tmp_path):
    (tmp_path / "docs").mkdir()
    rows = tmp_path / "pairs.jsonl"
    rows.write_text("{}")
    with pytest.raises(RequestError) as refused:
        create(
            recipe, "--documents", str(tmp_path / "docs"),
            "--set", "data.instructions=null", "--set", f"data.preferences={rows}",
            "--set", f"model.name_or_path=s3://{BUCKET}/nowhere",
        )  # fmt: skip
    said = str(refused.value)
    assert (
        f"aws s3 sync {tmp_path}/docs s3://{BUCKET}/documents/docs, then DOCUMENTS=s3://{BUCKET}/documents/docs" in said
    )
    assert f"aws s3 cp {rows} s3://{BUCKET}/data/pairs.jsonl, then --set data.preferences=" in said
    assert f"s3://{BUCKET}/nowhere holds no object" in said
    assert fake.asked("scheduler", "CreateScheduleGroup") == []
    assert fake.objects("llm-engineering/schedules/") == []


def test_everything_missing_in_the_account_is_named_at_once(fake, recipe, monkeypatch):
    monkeypatch.delenv("SCHEDULER_ROLE")
    monkeypatch.delenv("SAGEMAKER_RETRAIN_IMAGE")
    monkeypatch.setenv("COMET_API_KEY", "planted-comet-4711")
    put_secret(fake, {"HF_TOKEN": "planted-hf-4711"})
    allow(fake, "s3.amazonaws.com")
    try:
        with pytest.raises(RequestError) as refused:
            create(recipe)
    finally:
        allow(fake, "events.amazonaws.com")
    said = str(refused.value)
    assert "set SCHEDULER_ROLE" in said
    assert "set SAGEMAKER_RETRAIN_IMAGE" in said
    assert f"The topic {TOPIC} does not let EventBridge publish to it" in said
    assert "lacks COMET_API_KEY and ZENML_STORE_API_KEY" in said
    assert "planted" not in said
    assert fake.asked("scheduler", "CreateScheduleGroup") == []


@pytest.mark.parametrize("cron", ["0 3 * * SUN *", "61 3 * * ? *", "0 3 1 * 0", "rate(7 day)"])
def test_a_wrong_time_is_refused_before_any_request(fake, recipe, cron):
    with pytest.raises(RequestError):
        create(recipe, cron=cron)
    assert fake.requests == []


def test_nothing_is_left_of_a_schedule_that_cannot_be_created(fake, recipe):
    fake.fail(
        "scheduler", "CreateSchedule", "ValidationException", "The execution role must allow EventBridge Scheduler"
    )
    with pytest.raises(WorkError, match="nothing of it is left: .*The execution role"):
        create(recipe)
    assert list_names(fake) == []
    assert fake.client("events").list_rules()["Rules"] == []
    assert fake.client("cloudwatch").describe_alarms()["MetricAlarms"] == []
    assert fake.objects("llm-engineering/schedules/") == []


def test_names_that_could_confuse_the_jobs_of_two_schedules_are_refused(fake, recipe):
    for name in ("weekly--extra", "a" * 26, "-weekly", "wöchentlich"):
        with pytest.raises(RequestError, match="cannot be the name of a schedule"):
            create(recipe, f"--name={name}")


def test_the_list_reads_only_the_records_of_the_runs_that_it_shows(fake, recipe, capsys):
    create(recipe)
    place = Place(f"s3://{BUCKET}/{FOLDER}")
    fake.starting_s = 60.0
    try:
        job = fire(fake)
        for run in ("weekly--1", "weekly--2", job):
            place.write(RunRecord(run=run, began=datetime.now(UTC)))
        fake.requests.clear()
        assert [run["run"] for run in listed(capsys)[0]["runs"]] == [job]
        assert [read["Key"] for read in fake.asked("s3", "GetObject")] == [f"{FOLDER}runs/{job}.json"]
        call("remove", "--stop")
    finally:
        fake.starting_s = 0.0


def test_a_run_that_never_began_is_listed_with_its_reason_and_matches_the_rule(fake, recipe, capsys):
    """No capacity: no code of this project runs, so only AWS can report the failure, through the rule."""
    create(recipe, "--name", "late")
    fake.fails_to_start["ml.g5.xlarge"] = "CapacityError: Unable to provision requested ML compute capacity."
    try:
        assert call("run") == 0
        (job,) = [job for job in fake.jobs.values() if job.name.startswith("late--")]
        job.thread.join(30)
    finally:
        fake.fails_to_start.clear()
    (shown,) = listed(capsys)
    assert [run["verdict"] for run in shown["runs"]] == [
        "failed: CapacityError: Unable to provision requested ML compute capacity."
    ]
    (rule,) = fake.client("events").list_rules(NamePrefix="llm-engineering")["Rules"]
    detail = json.loads(rule["EventPattern"])["detail"]
    assert job.name.startswith(detail["TrainingJobName"][0]["prefix"])
    assert job.status in detail["TrainingJobStatus"]


def test_a_schedule_with_a_running_job_is_removed_only_with_stop(fake, recipe, capsys):
    create(recipe, "--name", "busy")
    fake.starting_s = 60.0
    try:
        job = fire(fake, "busy")
        with pytest.raises(RequestError, match=f"busy is paused, but its job {job} still runs"):
            call("remove")
        assert listed(capsys)[0]["state"] == "paused"
        assert listed(capsys)[0]["runs"][0]["verdict"] == "running"
        assert call("remove", "--stop") == 0
    finally:
        fake.starting_s = 0.0
    assert fake.job(job).status == "Stopped"
    # The rule would report a stopped job as a failure.
    operations = [request.operation for request in fake.requests]
    assert operations.index("DeleteRule") < operations.index("StopTrainingJob")
    assert list_names(fake) == []
    assert fake.objects("llm-engineering/schedules/") == []


def test_a_refused_start_is_listed_as_missed(fake, recipe, capsys):
    """If CreateTrainingJob is refused, there is no job. The alarm reports it, and the list shows the missed time."""
    from llm_engineering.cloud.schedules.eventbridge import get, missed

    create(recipe, "--timezone", "UTC", cron="0 * * * ? *")
    session = schedule._session(Settings())
    made = get(session, "weekly")
    hour, now = 3600.0, made.created.timestamp()
    assert missed(made, None, datetime.fromtimestamp(now + 0.9 * hour, UTC)) is None
    late = datetime.fromtimestamp(now + 2.1 * hour, UTC)
    due = made.timing.next_times(made.created, 1)[0]
    assert missed(made, None, late) == due
    assert missed(made, RunRecord(run="weekly--1", began=due), late.replace(minute=59)) != due
    assert missed(made.model_copy(update={"paused": True}), None, late) is None
    # After a pause: times in the pause were not missed.
    assert missed(made.model_copy(update={"modified": late}), None, late) is None


def test_the_policies_allow_exactly_the_requests(fake, recipe, capsys):
    create(recipe)
    fake.starting_s = 60.0
    try:
        job = fire(fake)
        listed(capsys)
        assert call("pause") == 0
        assert call("remove", "--stop") == 0
    finally:
        fake.starting_s = 0.0
    own = policy("launcher-schedules")
    used = assert_allowed(fake.requests, "launcher", [*own, *policy("launcher", SECRET="job")])
    # A failed run of a local schedule publishes to the topic itself.
    assert actions(own) - used == {"sns:Publish"}
    scheduler = policy("scheduler")
    assert assert_allowed(fake.requests, "scheduler", scheduler) == actions(scheduler)
    other = Request(
        "scheduler", "sagemaker", "CreateTrainingJob", {"TrainingJobName": "other", "RoleArn": ROLE}, REGION
    )
    with pytest.raises(AssertionError, match="scheduler is not allowed"):
        assert_allowed([other], "scheduler", scheduler)
    (trust,) = policy("scheduler-trust")
    (group,) = fake.asked("scheduler", "CreateScheduleGroup")
    arn = f"arn:aws:scheduler:{REGION}:{ACCOUNT}:schedule-group/{group['Name']}"
    assert fnmatchcase(arn, trust["Condition"]["ArnLike"]["aws:SourceArn"])
    assert fake.job(job).status == "Stopped"


def test_the_topic_policy_of_the_documentation_is_accepted(fake, recipe):
    statements = policy("topic")
    conditional = [{**statement, "Condition": statements[1]["Condition"]} for statement in statements]
    for taken, given in ((False, conditional), (True, statements)):
        text = json.dumps({"Version": "2012-10-17", "Statement": given})
        fake.client("sns").set_topic_attributes(TopicArn=TOPIC, AttributeName="Policy", AttributeValue=text)
        if taken:
            assert create(recipe) == 0
        else:
            with pytest.raises(RequestError, match="does not let EventBridge publish to it"):
                create(recipe)
