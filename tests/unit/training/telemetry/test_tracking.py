"""Trackers get the numbers of a run but no secrets, and a tracker that fails does not end the run."""

import importlib.util
import json
import logging
import math
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset, DatasetDict
from pydantic import SecretStr

from llm_engineering.errors import RequestError
from llm_engineering.recipe.loading import load_recipe
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.stage_blocks import SFTConfig
from llm_engineering.recipe.training_blocks import TrackingConfig
from llm_engineering.training.telemetry import tracking
from llm_engineering.training.telemetry.tracking import TensorBoardRun, Trackers, check_trackers
from tests.conftest import ROOT
from tests.tiny_models import train

CONFIG = SFTConfig(
    learning_rate=1e-2, num_train_epochs=1, per_device_train_batch_size=4, gradient_accumulation_steps=1,
    save_steps=2, eval_steps=2, packing=False,
)  # fmt: skip


def events(folder):
    """`{name: [(step, value)]}` of all event files of a folder, as TensorBoard shows them."""
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard")
    accumulated = loader.EventAccumulator(str(folder))
    accumulated.Reload()
    names = accumulated.Tags()["scalars"]
    return {name: [(event.step, event.value) for event in accumulated.Scalars(name)] for name in names}


@pytest.fixture(scope="module")
def data():
    rows = [{"id": f"r{i}", "input_ids": [1, *range(20 + i, 28 + i), 0]} for i in range(20)]
    for row in rows:
        row["labels"] = [-100] * 4 + row["input_ids"][4:]
    return DatasetDict(train=Dataset.from_list(rows[:16]), validation=Dataset.from_list(rows[16:]))


def reporting_to(setup, *names, comet="off"):
    return setup.model_copy(update={"tracking": TrackingConfig(comet=comet, report_to=list(names))})


def test_tensorboard_holds_every_number_of_the_history(data, setup, settings):
    result = train(data, CONFIG, reporting_to(setup, "tensorboard"), settings, parameters={"run_id": "run-1"})
    folder = result.adapter.parent / "tensorboard"
    assert result.summary["trackers"] == {"tensorboard": {"folder": str(folder)}}
    shown = events(folder)
    history = result.summary["history"]
    expected = {name for entry in history for name, value in entry.items() if isinstance(value, int | float)}
    assert {name.removeprefix("sft/") for name in shown} == expected
    assert {"loss", "eval_loss", "tokens_per_second", "peak_memory_bytes", "grad_norm"} <= expected
    losses = [(entry["step"], pytest.approx(entry["loss"])) for entry in history if "loss" in entry]
    assert shown["sft/loss"] == losses
    assert len(losses) == 4


def test_steps_that_a_resumed_run_repeats_are_shown_once(tmp_path):
    def written(steps, value):
        run = TensorBoardRun(tmp_path)
        for step in steps:
            run.log_metrics({"loss": value}, step)
        run.end()

    pytest.importorskip("tensorboard", reason="needs tensorboard")
    written([1, 2, 3, 4], 1.0)
    written([3, 4, 5], 2.0)
    assert events(tmp_path)["loss"] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0)]


def test_wandb_without_a_key_writes_a_folder_without_secrets(data, setup, settings, monkeypatch):
    pytest.importorskip("wandb", reason="needs wandb")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-this-must-stay-here")
    result = train(data, CONFIG, reporting_to(setup, "wandb"), settings, parameters={"run_id": "run-1"})
    (folder,) = settings.llm_output_dir.resolve().glob("wandb/offline-run-*")
    assert result.summary["trackers"] == {"wandb": {"folder": str(folder)}}
    stored = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    for wanted in (b"sft/loss", b"sft/eval_loss", b"sft/tokens_per_second", b"run-1", b"learning_rate"):
        assert wanted in stored
    for secret in (b"sk-this-must-stay-here", b"def train_sft", b"OPENAI_API_KEY"):
        assert secret not in stored


def test_wandb_gets_the_key_from_the_settings_and_accepts_repeated_steps(settings, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="needs wandb")
    calls = []

    class Run:
        url, dir = "https://wandb.example/run", "/tmp/run/files"

        def define_metric(self, name, step_metric):
            calls.append((name, step_metric))

        def log(self, numbers):
            calls.append(numbers)

    def init(**arguments):
        calls.append(arguments)
        return Run()

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    tracked = TrackingConfig(project_name="p", comet="off", report_to=["wandb"])
    trackers = Trackers.start(tracked, Settings(), tmp_path / "sft-1", ["sft", "m" * 70])
    for step in (3, 2):
        trackers.log_metrics({"sft/loss": 1.0}, step)
    arguments, *rest = calls
    assert (arguments["mode"], arguments["project"], arguments["name"]) == ("online", "p", "sft-1")
    assert arguments["settings"].api_key == "k" * 40
    assert max(map(len, arguments["tags"])) == 64
    assert rest == [("*", "step"), {"sft/loss": 1.0, "step": 3}, {"sft/loss": 1.0, "step": 2}]
    assert "k" * 40 not in repr(Settings())


def test_a_tracker_that_fails_does_not_end_the_run(data, setup, settings, monkeypatch, caplog):
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    import wandb
    from torch.utils.tensorboard import SummaryWriter

    def broken(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(SummaryWriter, "add_scalar", broken)
    monkeypatch.setattr(wandb, "init", broken)
    with caplog.at_level(logging.WARNING):
        result = train(data, CONFIG, reporting_to(setup, "tensorboard", "wandb"), settings)
    assert math.isfinite(result.summary["train_loss"])
    assert result.summary["trackers"]["wandb"] == {}
    assert "TensorBoard: log_metrics failed (OSError: no space left); training continues" in caplog.text
    assert "wandb: start failed (OSError: no space left); training continues" in caplog.text


def test_all_trackers_get_the_same_finite_numbers():
    class Recorder:
        def __init__(self):
            self.got = []

        def log_metrics(self, metrics, step):
            self.got.append((metrics, step))

    one, other = Recorder(), Recorder()
    Trackers({"one": one, "other": other}).log_metrics({"a": 1.5, "b": math.nan, "c": "text", "d": 2}, 7)
    assert one.got == other.got == [({"a": 1.5, "d": 2}, 7)]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_reported_before_anything_runs(name, data, setup, settings, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None if wanted == name else real(wanted))
    with pytest.raises(RequestError, match=rf"report_to names {name}.*pip install 'llm-engineering\[{name}\]'"):
        check_trackers(TrackingConfig(report_to=[name]))
    with pytest.raises(RequestError, match="which is not installed"):
        train(data, CONFIG, reporting_to(setup, name), settings)
    assert not list(settings.llm_output_dir.rglob("checkpoint-*"))


def test_unknown_tracker_is_refused():
    recipe = ROOT / "configs" / "python_reference.yaml"
    assert load_recipe(recipe, ["tracking.report_to=[wandb]"]).tracking.report_to == ["wandb"]
    with pytest.raises(RequestError, match="report_to"):
        load_recipe(recipe, ["tracking.report_to=[mlflow]"])
    assert json.loads(load_recipe(recipe).tracking.model_dump_json())["report_to"] == []


@pytest.mark.parametrize("fault", ["nobody listens", "no answer", "no experiment"])
def test_comet_without_a_connection_is_offline_at_once(fault, settings, tmp_path, monkeypatch, caplog):
    import comet_ml

    started = []
    plain_start = comet_ml.start

    def start(**options):
        started.append(options["online"])
        return SimpleNamespace(url="", get_key=lambda: "key") if options["online"] else plain_start(**options)

    monkeypatch.setattr(comet_ml, "start", start)
    monkeypatch.setattr(tracking, "PROBE_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}/clientlib/"
        if fault == "nobody listens":
            server.close()
        if fault == "no experiment":
            monkeypatch.setattr(tracking, "_check_reachable", lambda address: None)
        monkeypatch.setattr(comet_ml.config, "get_backend_address", lambda: address)
        keyed = settings.model_copy(update={"comet_api_key": SecretStr("x" * 25)})
        trackers = Trackers.start(TrackingConfig(comet="auto"), keyed, tmp_path / "name", [])
    trackers.log_metrics({"loss": 1.0}, 1)
    place = trackers.end()["comet"]
    # Without a connection, Comet is not asked for an experiment.
    assert started == ([True, False] if fault == "no experiment" else [False])
    assert Path(place["archive"]).is_file()
    assert "metrics are stored offline instead" in caplog.text


def test_any_answer_of_the_server_is_enough():
    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(403)

        def log_message(self, *arguments):
            pass

    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.handle_request).start()
        tracking._check_reachable(f"http://127.0.0.1:{server.server_port}/")
