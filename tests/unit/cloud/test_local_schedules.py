"""Schedules of this machine, with a fake crontab and a fake systemctl that record their input."""

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

import tools.cli
import tools.scheduling.schedule
from llm_engineering.cloud.schedules import crontab, local_schedules, systemd
from llm_engineering.cloud.schedules.cron import Entry, parse_timing
from llm_engineering.cloud.schedules.local_schedules import LocalSchedule
from llm_engineering.cloud.schedules.run_records import Place, RunRecord
from llm_engineering.errors import RequestError
from llm_engineering.recipe.loading import load_recipe
from tests.conftest import ROOT

NOW = datetime(2026, 11, 23, 15, 40, tzinfo=UTC)
OTHERS = "MAILTO=me@example.org\n# backups\n17 4 * * * /usr/bin/backup --all # llm-engineering-not-this\n"
CRONTAB = """#!/bin/sh
case "$1" in
-l) [ -f "$FAKE/crontab" ] || { echo "no crontab for me" >&2; exit 1; }; cat "$FAKE/crontab" ;;
-r) rm "$FAKE/crontab" ;;
-) cat > "$FAKE/crontab" ;;
esac
"""
SYSTEMCTL = """#!/bin/sh
shift
echo "$@" >> "$FAKE/systemctl"
case "$1" in
enable|disable) for timer; do :; done; echo "$1" > "$FAKE/$timer" ;;
is-enabled) [ "$(cat "$FAKE/$3" 2>/dev/null)" = enable ] ;;
esac
"""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with cron and without systemd; its crontab is `tmp_path/crontab`."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "crontab").write_text(CRONTAB)
    (programs / "crontab").chmod(0o755)
    for name in ("sh", "cat", "rm", "env"):
        (programs / name).symlink_to(f"/bin/{name}")
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setenv("FAKE", str(tmp_path))
    monkeypatch.setenv("TZ", "UTC")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path


@pytest.fixture
def with_systemd(machine):
    (machine / "bin" / "systemctl").write_text(SYSTEMCTL)
    (machine / "bin" / "systemctl").chmod(0o755)
    return machine


def schedule(folder: Path, scheduler="cron", text="0 3 ? * SUN *", timezone="UTC", name="weekly") -> LocalSchedule:
    return LocalSchedule(
        name=name,
        timing=parse_timing(text, timezone, NOW),
        scheduler=scheduler,
        created=NOW,
        folder=folder / "out puts" / "schedules" / name,
        directory=folder,
        environment={"LLM_OUTPUT_DIR": "/a 100% place"},
    )


def test_the_scheduler_is_systemd_if_it_answers(machine, with_systemd):
    assert local_schedules.scheduler() == "systemd"
    (machine / "bin" / "systemctl").write_text("#!/bin/sh\nexit 1\n")
    assert local_schedules.scheduler() == "cron"
    (machine / "bin" / "crontab").unlink()
    with pytest.raises(RequestError, match="Nothing here can keep a schedule"):
        local_schedules.scheduler()


def test_a_file_of_version_0_1_is_read(tmp_path):
    made = schedule(tmp_path)
    assert LocalSchedule.model_validate_json(made.model_dump_json().replace('"scheduler"', '"keeper"')) == made


def test_a_crontab_line_is_created_paused_changed_and_removed_and_other_lines_stay(machine):
    lines = machine / "crontab"
    lines.write_text(OTHERS)
    weekly, other = schedule(machine), schedule(machine, name="weekly-2")
    local_schedules.write(weekly, "{}", paused=False)
    local_schedules.write(other, "{}", paused=False)
    own = lines.read_text().removeprefix(OTHERS).splitlines()
    assert len(own) == 2
    assert own[0].startswith("0 3 * * 0 cd ")
    assert own[0].endswith(" 2>&1 # llm-engineering-weekly")
    assert "/a 100\\% place" in own[0]
    assert local_schedules.state(weekly) == "active"

    local_schedules.set_paused(weekly, True)
    assert lines.read_text() == OTHERS + f"# paused: {own[0]}\n{own[1]}\n"
    assert local_schedules.state(weekly) == "paused"
    assert local_schedules.state(other) == "active"
    local_schedules.set_paused(weekly, False)
    assert lines.read_text() == OTHERS + f"{own[0]}\n{own[1]}\n"

    local_schedules.write(schedule(machine, text="30 4 1 * ? *"), None, paused=True)
    assert (weekly.folder / "recipe.json").read_text() == "{}"
    changed = lines.read_text().removeprefix(OTHERS).splitlines()
    assert changed == [own[1], "# paused: 30 4 1 * *" + own[0].removeprefix("0 3 * * 0")]

    local_schedules.remove(weekly, stop=False)
    local_schedules.remove(other, stop=False)
    assert lines.read_text() == OTHERS
    assert list((machine / "out puts" / "schedules").iterdir()) == []


def test_a_crontab_that_did_not_exist_is_removed_again(machine):
    local_schedules.write(schedule(machine), "{}", paused=False)
    local_schedules.remove(schedule(machine), stop=False)
    assert not (machine / "crontab").exists()


def test_a_crontab_line_runs_its_command_in_a_shell(machine):
    """Cron ends a command at `%` unless it has a backslash, and passes the rest to sh."""
    log = machine / "a log's 5%.txt"
    code = "import os, sys; print(os.getcwd(), os.environ['WHAT'], sys.argv[1])"
    command = [sys.executable, "-c", code, 'it\'s "%d"']
    crontab.write(Entry("name", schedule(machine).timing, command, machine, {"WHAT": "5% $HOME"}, log), False)
    line = (machine / "crontab").read_text().rstrip("\n")
    command = line.split(None, 5)[5].replace("\\%", "%")
    subprocess.run(["/bin/sh", "-c", command], check=True)
    assert log.read_text() == f'{machine} 5% $HOME it\'s "%d"\n'


def test_a_systemd_timer_is_created_paused_changed_and_removed(with_systemd):
    weekly = schedule(with_systemd, "systemd", timezone="Europe/Berlin")
    local_schedules.write(weekly, "{}", paused=False)
    units = with_systemd / "config" / "systemd" / "user"
    assert sorted(file.name for file in units.iterdir()) == [
        "llm-engineering-weekly.service",
        "llm-engineering-weekly.timer",
    ]
    assert "OnCalendar=Sun *-*-* 3:0:00 Europe/Berlin\n" in (units / "llm-engineering-weekly.timer").read_text()
    service = (units / "llm-engineering-weekly.service").read_text()
    assert 'Environment="LLM_OUTPUT_DIR=/a 100%% place"\n' in service
    assert f'"--scheduled" "{weekly.folder}"\n' in service
    assert local_schedules.state(weekly) == "active"
    local_schedules.set_paused(weekly, True)
    assert local_schedules.state(weekly) == "paused"
    local_schedules.write(schedule(with_systemd, "systemd", "0 5 * * ? *"), None, paused=True)
    assert local_schedules.state(weekly) == "paused"
    assert "OnCalendar=*-*-* 5:0:00 UTC\n" in (units / "llm-engineering-weekly.timer").read_text()
    local_schedules.set_paused(weekly, False)
    assert local_schedules.state(weekly) == "active"
    local_schedules.remove(weekly, stop=False)
    assert list(units.iterdir()) == []
    assert not weekly.folder.exists()
    asked = (with_systemd / "systemctl").read_text().splitlines()
    assert "disable --now llm-engineering-weekly.timer" in asked
    assert asked[-1] == "daemon-reload"


@pytest.mark.skipif(not Path("/usr/bin/systemd-analyze").exists(), reason="needs systemd-analyze")
def test_systemd_accepts_the_units(with_systemd):
    timing, command = schedule(with_systemd).timing, [sys.executable, 'a $b "c" %d']
    systemd.write(Entry("odd", timing, command, with_systemd, {"A": 'b "c" %'}, Path("/tmp/log")), True)
    units = with_systemd / "config" / "systemd" / "user"
    checked = subprocess.run(
        ["/usr/bin/systemd-analyze", "verify", "--user", "--man=no", units / "odd.service", units / "odd.timer"],
        capture_output=True, text=True, env={"XDG_RUNTIME_DIR": str(with_systemd), "HOME": str(with_systemd)},
    )  # fmt: skip
    assert checked.returncode == 0, checked.stderr
    assert "odd." not in checked.stderr, checked.stderr


def test_a_crontab_refuses_another_timezone(machine):
    with pytest.raises(RequestError, match="leave TIMEZONE out"):
        local_schedules.check(parse_timing("0 3 * * ? *", "Asia/Tokyo", NOW), "cron", NOW)
    local_schedules.check(parse_timing("0 3 * * ? *", "Etc/UTC", NOW), "cron", NOW)
    local_schedules.check(parse_timing("0 3 * * ? *", "Asia/Tokyo", NOW), "systemd", NOW)


def test_a_killed_run_is_listed_as_failed(machine):
    place = Place(str(machine / "place"))
    place.write(RunRecord(run="20261123T030000-999999", began=NOW))
    found = schedule(machine).model_copy(update={"folder": machine / "place"})
    assert local_schedules.runs(found, 3)[0].verdict == "failed: killed: its process ended without a verdict"


def test_a_run_in_progress_is_stopped_only_with_stop(machine):
    weekly = schedule(machine)
    local_schedules.write(weekly, "{}", paused=False)
    holds = "import sys, time; from llm_engineering.cloud.schedules.run_records import Place\nwith Place(sys.argv[1]).lock() as first:\n print(first, flush=True); time.sleep(60)"  # fmt: skip
    process = subprocess.Popen([sys.executable, "-c", holds, str(weekly.folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "True\n"
        with Place(str(weekly.folder)).lock() as is_first:
            assert not is_first
        assert weekly.place.running_process() == process.pid
        with pytest.raises(RequestError, match=f"process {process.pid}, is in progress"):
            local_schedules.remove(weekly, stop=False)
        assert local_schedules.state(weekly) == "paused"
        local_schedules.remove(weekly, stop=True)
        assert process.wait(10) == -15
        assert not (machine / "crontab").exists()
    finally:
        process.kill()
        process.stdout.close()


@pytest.fixture
def commands(machine, monkeypatch, settings):
    """`llm-engineering schedule … --target local` in this process, with settings and outputs of its own."""
    monkeypatch.chdir(machine)
    for name in ("NOTIFY_WEBHOOK", "NOTIFY_SNS_TOPIC", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)

    def call(action: str, *arguments: str) -> int:
        monkeypatch.setattr(tools.cli, "exit_code", lambda work, debug: work())
        monkeypatch.setattr(tools.cli, "start_logging", lambda debug: None)
        return tools.cli.main(["schedule", action, "--target", "local", *arguments])

    return call


def test_commands_for_this_machine(machine, commands, capsys):
    recipe = str(ROOT / "configs" / "python_reference.yaml")
    commands("create", "--config", recipe, "--cron", "0 3 * * 0", "--set", "seed=7", "--name", "weekly")
    line = (machine / "crontab").read_text()
    assert line.startswith("0 3 * * 0 cd ")
    with pytest.raises(RequestError, match="This machine already has a schedule weekly"):
        commands("create", "--config", recipe, "--cron", "0 3 * * 0", "--name", "weekly")
    folder = machine / "outputs" / "schedules" / "weekly"
    assert load_recipe(folder / "recipe.json") == load_recipe(recipe, ["seed=7"])

    commands("pause")
    commands("change", "--cron", "0 5 ? * MON *")
    assert load_recipe(folder / "recipe.json").seed == 7
    with pytest.raises(RequestError, match="Add CONFIG="):
        commands("change", "--set", "seed=8")
    Place(str(folder)).write(RunRecord(run="a", began=NOW, ended=NOW, outcome="skipped", reason="no new data"))
    capsys.readouterr()
    commands("list", "--json")
    (shown,) = json.loads(capsys.readouterr().out)
    assert (shown["where"], shown["state"], shown["next"]) == ("this machine (cron)", "paused", None)
    assert (shown["expression"], shown["timezone"]) == ("cron(0 5 ? * MON *)", "UTC")
    assert [run["verdict"] for run in shown["runs"]] == ["skipped: no new data"]
    commands("list")
    assert "skipped: no new data" in capsys.readouterr().out
    commands("resume")
    assert (machine / "crontab").read_text() == line.replace("0 3 * * 0 ", "0 5 * * 1 ", 1)
    (machine / "crontab").unlink()
    commands("list", "--json")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])[0]["state"] == "lost"
    commands("remove")
    assert not (machine / "outputs" / "schedules" / "weekly").exists()
    with pytest.raises(RequestError, match="There is no schedule"):
        commands("remove")


def test_a_run_that_cron_starts_records_its_verdict(machine, commands, monkeypatch):
    """In cron's environment, which has almost no variables."""
    monkeypatch.chdir(ROOT)
    recipe = machine / "mine.yaml"
    recipe.write_text(f"extends: {ROOT}/configs/python_reference.yaml\nname: mine\ndocuments: {{path: my_docs}}\n")
    commands("create", "--config", str(recipe), "--cron", "@weekly")
    line = (machine / "crontab").read_text().rstrip("\n")
    command = line.split(None, 5)[5].replace("\\%", "%")
    done = subprocess.run(["/bin/sh", "-c", command], env={"HOME": str(machine), "PATH": "/usr/bin:/bin"})
    place = Place(str(machine / "outputs" / "schedules" / "mine"))
    assert done.returncode == 2, (machine / "outputs" / "schedules" / "mine" / "log.txt").read_text()
    assert next(place.records()).verdict.startswith("failed: documents.path my_docs does not exist.")


def test_a_secret_that_only_this_shell_has_is_refused(machine, commands, monkeypatch):
    monkeypatch.setenv("COMET_API_KEY", "planted-comet-4711")
    recipe = str(ROOT / "configs" / "python_reference.yaml")
    with pytest.raises(RequestError, match="COMET_API_KEY is set only in this shell") as refused:
        commands("create", "--config", recipe, "--cron", "@weekly")
    assert "planted" not in str(refused.value)
    assert not (machine / "crontab").exists()
    (machine / ".env").write_text("COMET_API_KEY=planted-comet-4711\n")
    commands("create", "--config", recipe, "--cron", "@weekly")
    written = (machine / "crontab").read_text() + "".join(
        file.read_text() for file in (machine / "outputs").rglob("*") if file.is_file()
    )
    assert "planted" not in written


def test_a_time_that_cron_cannot_express_is_refused_before_anything_is_written(machine, commands):
    recipe = str(ROOT / "configs" / "python_reference.yaml")
    for text in ("0 3 L * ? *", "rate(7 days)", "0 3 * * SUN *"):
        with pytest.raises(RequestError):
            commands("create", "--config", recipe, "--cron", text)
    assert not (machine / "crontab").exists()
    assert not (machine / "outputs" / "schedules").exists()
