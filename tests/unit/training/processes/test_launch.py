"""Worker processes of a run: their output, signals, ends and errors; and the settings for several processes."""

import json
import logging
import os
import signal
import subprocess
import sys

import psutil
import pytest
from datasets import Dataset, DatasetDict

from llm_engineering.errors import RequestError, WorkError
from llm_engineering.models.device import Device, check_processes, choose_optimiser
from llm_engineering.recipe.compute_blocks import ComputeConfig
from llm_engineering.recipe.loading import load_recipe
from llm_engineering.recipe.model_blocks import ModelConfig
from llm_engineering.recipe.stage_blocks import SFTConfig
from llm_engineering.recipe.training_blocks import TrackingConfig, TrainingSetup
from llm_engineering.training.processes import launch, ranks
from llm_engineering.training.processes.job import Job, read_job, write_failure
from llm_engineering.training.processes.launch import Ended, launch_training, run_processes
from llm_engineering.training.sft import train_sft
from tests.conftest import ROOT
from tests.renew_references import STEPS


def run(*codes):
    """Run each text as a Python program in its own process."""
    environments = [{**os.environ, "CODE": code} for code in codes]
    return run_processes([sys.executable, "-c", "import os; exec(os.environ['CODE'])"], environments)


def test_output_is_logged_line_by_line(caplog):
    with caplog.at_level(logging.INFO):
        ended = run(
            "import sys; print('one'); print('two', file=sys.stderr)", "print('a' * 100000); print('é', end='')"
        )
    assert ended == Ended([0, 0], [], None)
    lines = {r.getMessage() for r in caplog.records}
    assert lines - {"one", "two", "é"} == {"a" * 100000}, sorted(map(len, lines))


def test_failure_of_one_process_stops_the_others(monkeypatch):
    monkeypatch.setattr(launch, "GRACE_S", 0.2)
    waits = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    assert run(waits, "raise SystemExit(2)") == Ended([-signal.SIGKILL, 2], [], None)
    assert run(waits, "import signal; os.kill(os.getpid(), signal.SIGKILL)") == Ended([-9, -9], [1], None)


def test_signal_is_forwarded_once_and_the_processes_can_finish(tmp_path):
    waits = f"""
import pathlib, signal, sys, time
received = []
signal.signal(signal.SIGTERM, lambda *_: received.append(1))
folder = pathlib.Path({str(tmp_path)!r})
(folder / str(os.getpid())).touch()
while len(list(folder.iterdir())) < 2: time.sleep(0.01)
"""
    sends = waits + "os.kill(os.getppid(), signal.SIGINT)\n"
    ends = "while not received: time.sleep(0.01)\ntime.sleep(0.3)\nsys.exit(130 if received == [1] else 1)"
    assert run(waits + ends, sends + ends) == Ended([130, 130], [], signal.SIGINT)


def test_second_signal_stops_at_once():
    sends = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.kill(os.getppid(), signal.SIGINT)
time.sleep(0.5)
os.kill(os.getppid(), signal.SIGINT)
time.sleep(600)
"""
    with pytest.raises(KeyboardInterrupt):
        run(sends)


def test_process_does_not_outlive_its_launcher():
    launches = """
import os, subprocess, sys, time
from llm_engineering.training.processes import ranks
child = "from llm_engineering.training.processes import ranks; ranks.end_with_launcher(); print('here', flush=True); import time; time.sleep(600)"
env = os.environ | {ranks.LAUNCHER: str(os.getpid())}
print(subprocess.Popen([sys.executable, "-c", child], env=env).pid, flush=True)
time.sleep(600)
"""
    launcher = subprocess.Popen([sys.executable, "-c", launches], stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(launcher.stdout.readline()))
    assert launcher.stdout.readline() == "here\n"
    launcher.kill()
    launcher.wait()
    psutil.wait_procs([child], timeout=30)
    assert not child.is_running()


@pytest.fixture
def job(tiny_model):
    compute = ComputeConfig(device="cpu", dtype="float32", num_processes=2)
    model = ModelConfig(name_or_path=str(tiny_model), revision="test")
    setup = TrainingSetup(model=model, max_length=64, compute=compute, tracking=TrackingConfig(comet="off"), seed=7)
    return Job(stage="sft", config=SFTConfig(**STEPS).model_dump(), setup=setup, parameters={"run_id": "r"})


@pytest.fixture
def data():
    rows = Dataset.from_list([{"id": "r", "input_ids": [1, 2], "labels": [-100, 2]}])
    return DatasetDict(train=rows, validation=rows)


def test_error_of_a_process_is_raised_again(job, data, settings, monkeypatch):
    def ends(ended, *errors):
        def run_processes(command, environments):
            file = launch.Path(command[-1])
            read = read_job(file)
            assert read.model_copy(update={"data": None}) == job
            assert DatasetDict.load_from_disk(str(read.data))["train"][0]["id"] == "r"
            assert [e["RANK"] for e in environments] == ["0", "1"]
            assert {e["WORLD_SIZE"] for e in environments} == {"2"}
            for rank, error in errors:
                write_failure(file.parent, rank, error)
            return ended

        monkeypatch.setattr(launch, "run_processes", run_processes)
        launch_training(train_sft, job, data, settings)

    with pytest.raises(RequestError, match="^The checkpoint is another's.$"):
        ends(Ended([-9, 2], [], None), (1, RequestError("The checkpoint is another's.")))
    with pytest.raises(WorkError, match="^The disk is full.$"):
        ends(Ended([1, 1], [], None), (1, WorkError("The disk is full.")), (0, RuntimeError("Connection closed")))
    with pytest.raises(WorkError, match="^Training process 0 of 2 failed with ValueError: odd\n(.|\n)*ValueError: odd"):
        ends(Ended([1, -9], [], None), (0, ValueError("odd")))
    with pytest.raises(WorkError, match="^Training process 1 of 2 was ended by SIGKILL"):
        ends(Ended([1, -9], [1], None), (0, RuntimeError("Connection closed")))
    with pytest.raises(WorkError, match="exit codes 3, -9 and reported no error"):
        ends(Ended([3, -9], [], None))
    with pytest.raises(KeyboardInterrupt, match="SIGTERM in training"):
        ends(Ended([130, -15], [1], signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt):
        ends(Ended([130, 130], [], None))
    # The job's files are deleted.
    (folder,) = settings.llm_output_dir.glob("training/sft-job-*")
    assert [path.name for path in folder.iterdir()] == ["lock"]


def test_a_job_runs_once_at_a_time(job, data, settings, monkeypatch):
    def again(command, environments):
        launch_training(train_sft, job, data, settings)

    monkeypatch.setattr(launch, "run_processes", again)
    with pytest.raises(RequestError, match="Another process trains the same run"):
        launch_training(train_sft, job, data, settings)


def test_a_job_has_no_secrets(job, monkeypatch):
    monkeypatch.setenv("COMET_API_KEY", "comet-secret-1")
    assert "comet-secret-1" not in job.model_dump_json()
    assert launch._environments(2, launch.Settings())[0]["COMET_API_KEY"] == "comet-secret-1"


def test_a_separate_process_for_the_backend_is_the_only_one(data, job, settings, monkeypatch):
    started = []
    monkeypatch.setattr(
        launch, "run_processes", lambda command, environments: started.extend(environments) or Ended([1], [], None)
    )
    monkeypatch.setattr(launch, "needs_own_process", lambda compute: True)
    alone = job.setup.model_copy(update={"compute": job.setup.compute.one_process})
    with pytest.raises(WorkError):
        launch_training(train_sft, job.model_copy(update={"setup": alone}), data, settings)
    (environment,) = started
    assert "WORLD_SIZE" not in environment
    assert environment[ranks.LAUNCHER] == str(os.getpid())


def test_number_of_processes_must_be_that_of_the_recipe(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(RequestError, match=r"^3 process\(es\) were started, and compute.num_processes is 1. Use --set"):
        ranks.join(ComputeConfig(), "cpu")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["num_processes=0"], "`compute.num_processes` is 0"),
        (["distributed=fsdp2"], "distributed fsdp2 has no effect with num_processes 1"),
        (
            ["num_processes=2", "distributed=fsdp2", "device=cpu"],
            "distributed fsdp2 needs CUDA: use ddp with device cpu",
        ),
        (["num_processes=2", "distributed=deepspeed"], "distributed deepspeed needs zero_stage: 1, 2 or 3"),
        (["num_processes=2", "zero_stage=2"], "zero_stage has no effect with distributed ddp"),
    ],
)
def test_impossible_settings_for_processes_are_refused(keys, words):
    with pytest.raises(RequestError, match=words):
        load_recipe(ROOT / "configs" / "python_reference.yaml", [f"compute.{key}" for key in keys])


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["sft.method=qlora", "compute.distributed=fsdp2"], "sft.method qlora keeps its weights in 4 bits"),
        (
            ["sft.method=qlora", "compute.distributed=deepspeed", "compute.zero_stage=3"],
            "or deepspeed with zero_stage 1 or 2",
        ),
        (["dpo.optim=adamw_8bit", "compute.distributed=fsdp2"], "dpo.optim adamw_8bit has a state that is not sharded"),
        (["dpo.precompute_ref_log_probs=true"], "precompute_ref_log_probs works only with compute.num_processes 1"),
    ],
)
def test_methods_that_need_one_process_are_refused_with_several(keys, words):
    with pytest.raises(RequestError, match=words):
        load_recipe(ROOT / "configs" / "python_reference.yaml", ["compute.num_processes=2", *keys])


def test_sharded_run_chooses_an_optimiser_that_can_be_sharded(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    cuda = Device("cuda", launch.ranks.torch.bfloat16, "sdpa", [])
    chosen = [choose_optimiser("auto", cuda, distributed)[0] for distributed in ("ddp", "fsdp2", "deepspeed")]
    assert chosen == ["adamw_8bit", "adamw_torch", "adamw_torch"]


@pytest.mark.parametrize(
    ("instance_type", "device", "in_job"),
    [("ml.g5.2xlarge", "auto", "cuda"), ("ml.p4d.24xlarge", "auto", "cuda"), ("ml.m5.large", "auto", "auto"),
     ("ml.g5.2xlarge", "cpu", "cpu")],
)  # fmt: skip
def test_a_job_on_a_machine_with_gpus_trains_on_cuda(instance_type, device, in_job):
    block = {"instance_type": instance_type}
    compute = ComputeConfig.model_validate({"target": "sagemaker", "sagemaker": block, "device": device})
    assert (compute.in_job.device, compute.in_job.target) == (in_job, "local")


def test_settings_for_one_process_do_not_depend_on_the_number_of_training_processes():
    compute = ComputeConfig(num_processes=2, distributed="deepspeed", zero_stage=2, dtype="float32")
    assert compute.one_process == ComputeConfig(dtype="float32")
    block = {"instance_type": "ml.g5.2xlarge"}
    remote = ComputeConfig.model_validate({"target": "sagemaker", "sagemaker": block, "dtype": "float32"})
    assert remote.one_process == remote.here == ComputeConfig(dtype="float32")


def test_machine_must_have_the_gpus_and_packages_of_the_processes(monkeypatch):
    cpu, cuda = (Device(name, launch.ranks.torch.float32, "sdpa", []) for name in ("cpu", "cuda"))
    many = ComputeConfig(num_processes=4)
    check_processes(many, cpu)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(RequestError, match=r"num_processes is 4, and this machine has 2 CUDA card\(s\)"):
        check_processes(many, cuda)
    # Four processes on two machines.
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    check_processes(many, cuda)
    with pytest.raises(RequestError, match="distributed is fsdp2, which needs CUDA"):
        check_processes(ComputeConfig(num_processes=2, distributed="fsdp2"), cpu)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RequestError, match="deepspeed is not installed. Install it"):
        check_processes(ComputeConfig(num_processes=2, distributed="deepspeed", zero_stage=2), cuda)


@pytest.mark.parametrize(("visible", "card"), [(None, "0"), ("2,3", "2"), ("GPU-5,GPU-7", "GPU-5"), ("", "")])
def test_one_worker_process_sees_one_card(visible, card, settings, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    (environment,) = launch._environments(1, settings)
    assert environment["CUDA_VISIBLE_DEVICES"] == card
    assert all(one.get("CUDA_VISIBLE_DEVICES") == visible for one in launch._environments(2, settings))


def test_transformers_is_not_imported_before_a_job_is_read():
    """unsloth patches transformers, so it must be imported first."""
    code = "import sys, llm_engineering.training.__main__; print('transformers' in sys.modules, 'trl' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_a_file_that_is_not_a_job_is_refused(tmp_path):
    with pytest.raises(RequestError, match="cannot be read"):
        read_job(tmp_path / "none.json")
    (tmp_path / "job.json").write_text(json.dumps({"stage": "sft", "key": "s"}))
    with pytest.raises(RequestError, match="is not a training job"):
        read_job(tmp_path / "job.json")
