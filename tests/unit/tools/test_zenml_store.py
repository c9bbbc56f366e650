"""ZenML's store is looked at before it is used: a database that has moved or is damaged, and results without files."""

import sqlite3
from contextlib import closing
from types import SimpleNamespace
from uuid import uuid4

import psutil
import pytest
import yaml

from llm_engineering.errors import RequestError
from tools.cli import exit_code, prepare_zenml
from tools.zenml_store import check_database, forget_lost, open_database


@pytest.fixture
def database(tmp_path, monkeypatch):
    """A small database, which ZenML's settings name."""
    monkeypatch.setenv("ZENML_CONFIG_PATH", str(tmp_path / "zenml"))
    file = tmp_path / "zenml.db"
    connection = sqlite3.connect(file)
    connection.execute("CREATE TABLE runs (name TEXT)")
    connection.executemany("INSERT INTO runs VALUES (?)", [("a" * 500,) for _ in range(100)])
    connection.commit()
    connection.close()
    (tmp_path / "zenml").mkdir()
    (tmp_path / "zenml" / "config.yaml").write_text(yaml.safe_dump({"store": {"url": f"sqlite:///{file}"}}))
    return file


def test_a_whole_database_passes_also_while_another_process_holds_it(database):
    check_database()
    held = sqlite3.connect(database, isolation_level=None)
    held.execute("BEGIN EXCLUSIVE")
    check_database()
    held.close()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda file: file.rename(file.with_name("moved.db")), "zenml.db does not exist, but .*config.yaml names it. If the folder"),
        (lambda file: file.write_bytes(b"x" * 5000), "is damaged .file is not a database.. Replace it by a backup"),
        (lambda file: file.write_bytes(file.read_bytes()[:20000]), "is damaged"),
        (lambda file: file.write_bytes(b""), None),
    ],
)  # fmt: skip
def test_a_database_that_is_gone_or_damaged_is_named_with_the_remedy(database, damage, words):
    damage(database)
    if words is None:
        # ZenML fills an empty file.
        check_database()
        return
    with pytest.raises(RequestError, match=words):
        check_database()


def test_a_database_on_a_disk_gets_a_log_and_passes_with_changes_in_it(database, monkeypatch):
    open_database()
    held = sqlite3.connect(database)
    assert held.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    held.executemany("INSERT INTO runs VALUES (?)", [("b" * 5000,) for _ in range(100)])
    held.commit()
    pages = held.execute("PRAGMA page_count").fetchone()[0]
    assert pages * 4096 > database.stat().st_size
    check_database()
    held.close()


def test_a_database_in_a_folder_that_machines_share_gets_no_log(database, monkeypatch):
    shared = SimpleNamespace(mountpoint=str(database.parent), fstype="nfs4")
    monkeypatch.setattr(
        psutil, "disk_partitions", lambda **options: [SimpleNamespace(mountpoint="/", fstype="ext4"), shared]
    )
    open_database()
    with closing(sqlite3.connect(database)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)


def test_a_folder_of_settings_that_cannot_be_made_is_named_with_its_variable(tmp_path, monkeypatch):
    (tmp_path / "home").write_text("no folder")
    monkeypatch.setenv("ZENML_CONFIG_PATH", str(tmp_path / "home" / "zenml"))
    with pytest.raises(RequestError, match=r"home/zenml cannot be written to .*Set ZENML_CONFIG_PATH"):
        check_database()


def test_no_settings_and_a_server_are_no_error(tmp_path, monkeypatch):
    monkeypatch.setenv("ZENML_CONFIG_PATH", str(tmp_path))
    check_database()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"store": {"url": "https://server.example"}}))
    check_database()


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        ("database is locked", "Wait until that process ends"),
        ("database or disk is full", "Make room on this disk"),
        ("attempt to write a readonly database", "Make the file and its folder writable"),
        ("database disk image is malformed", "Replace it by a backup"),
    ],
)
def test_an_error_of_the_database_is_a_sentence(said, remedy, capsys):
    def work():
        try:
            raise sqlite3.OperationalError(said)
        except sqlite3.OperationalError as error:
            raise RuntimeError("[SQL: UPDATE pipeline_run SET …]") from error

    assert exit_code(work, debug=False) == 1
    printed = capsys.readouterr().err
    assert printed.startswith(f"Error: ZenML's database refused a request: {said}. ")
    assert remedy in printed
    assert "SQL" not in printed


def test_steps_whose_results_have_lost_their_files_are_repeated(tmp_path, monkeypatch, caplog):
    prepare_zenml()
    from zenml import client
    from zenml.utils import pagination_utils

    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / "data.json").write_text("1")
    steps = {uuid4(): SimpleNamespace(cache_expires_at=None) for _ in range(3)}

    def artifact(name, folder, step):
        found = SimpleNamespace(uri=str(folder), artifact=SimpleNamespace(name=name), producer_step_run_id=step)
        found.get_hydrated_version = lambda: found
        return found

    first, second, third = steps
    artifacts = [artifact("kept", whole, first), artifact("lost", tmp_path / "gone", second)]
    artifacts += [
        artifact("remote", "s3://bucket/gone", third),
        artifact("saved without a step", tmp_path / "gone", None),
    ]

    class Client:
        list_artifact_versions = None
        get_run_step = staticmethod(steps.__getitem__)

        def update_step_run(self, step, cache_expires_at):
            steps[step].cache_expires_at = cache_expires_at

    monkeypatch.setattr(client, "Client", Client)
    monkeypatch.setattr(pagination_utils, "depaginate", lambda *args, **kwargs: artifacts)
    forget_lost()
    assert [step for step, found in steps.items() if found.cache_expires_at is not None] == [second]
    assert "will be made again if needed: lost" in caplog.text
    caplog.clear()
    forget_lost()
    assert not caplog.text
