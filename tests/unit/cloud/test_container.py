"""The entry of a training container: lock, secret, torchrun's variables, output, and the reason of a failure."""

import importlib.metadata
import json
import os
import signal
import subprocess
import sys

import pytest

from llm_engineering.cloud import container
from llm_engineering.errors import RequestError

BOTO3 = importlib.metadata.version("boto3")


def lock(tmp_path, *lines):
    path = tmp_path / "image.lock"
    path.write_text("\n".join(lines))
    return str(path)


def test_a_lock_of_the_installed_versions_passes(tmp_path):
    container.check_versions(
        lock(
            tmp_path,
            "# a comment",
            "--extra-index-url nowhere",
            f"boto3=={BOTO3} \\",
            "    --hash=sha256:00",
            "no-such-package==1.0 ; sys_platform == 'win32'",
            f"pydantic=={importlib.metadata.version('pydantic')} # why",
        )
    )


def test_the_local_part_of_a_version_is_ignored(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.13.0+cu128")
    container.check_versions(lock(tmp_path, "torch==2.13.0"))
    with pytest.raises(RequestError, match=r"torch==2.12.0 \(installed is 2.13.0\+cu128\)"):
        container.check_versions(lock(tmp_path, "torch==2.12.0"))


def test_all_differences_are_named(tmp_path):
    with pytest.raises(RequestError) as error:
        container.check_versions(lock(tmp_path, "boto3==0.1", "no-such-package==1.0"))
    assert f"boto3==0.1 (installed is {BOTO3})" in str(error.value)
    assert "no-such-package==1.0 (not installed)" in str(error.value)
    assert "make image" in str(error.value)


def test_an_image_that_names_no_lock_is_refused(tmp_path):
    with pytest.raises(RequestError, match="make image"):
        container.check_versions(None)
    with pytest.raises(RequestError, match="is not in the project"):
        container.check_versions(str(tmp_path / "missing.lock"))


class Secrets:
    def __init__(self, text):
        self.text = text

    def get_secret_value(self, **asked):
        assert asked == {"SecretId": "the-name"}
        return {"SecretString": self.text}


def test_the_secret_is_read_by_its_name(monkeypatch):
    monkeypatch.setattr(container.boto3, "client", lambda service: Secrets('{"COMET_API_KEY": "k"}'))
    assert container.secret_variables("the-name") == {"COMET_API_KEY": "k"}
    assert container.secret_variables(None) == {}


@pytest.mark.parametrize("text", ["planted-value", '["planted-value"]', '{"A": {"B": "planted-value"}}', ""])
def test_a_secret_of_another_form_is_refused_and_not_shown(text, monkeypatch):
    monkeypatch.setattr(container.boto3, "client", lambda service: Secrets(text))
    with pytest.raises(RequestError, match="not a JSON object") as error:
        container.secret_variables("the-name")
    assert "planted-value" not in str(error.value)


def resources(tmp_path, current, hosts):
    folder = tmp_path / "input" / "config"
    folder.mkdir(parents=True, exist_ok=True)
    content = {"current_host": current, "hosts": hosts, "network_interface_name": "eth9"}
    (folder / "resourceconfig.json").write_text(json.dumps(content))


def test_torchrun_gets_the_other_machines(tmp_path):
    hosts = [f"algo-{i}" for i in (10, 2, 1, 3, 4, 5, 6, 7, 8, 9)]
    resources(tmp_path, "algo-10", hosts)
    assert container.torchrun_variables(tmp_path) == {
        "PET_NNODES": "10",
        "PET_NODE_RANK": "9",
        "PET_MASTER_ADDR": "algo-1",
        "PET_MASTER_PORT": "29500",
        "NCCL_SOCKET_IFNAME": "eth9",
        "GLOO_SOCKET_IFNAME": "eth9",
    }


def test_a_single_machine_needs_no_variables(tmp_path):
    assert container.torchrun_variables(tmp_path) == {}
    resources(tmp_path, "algo-1", ["algo-1"])
    assert container.torchrun_variables(tmp_path) == {}


def network_device(tmp_path, name, driver):
    """A device as the kernel lists it in /sys/class/infiniband."""
    (tmp_path / "drivers" / driver).mkdir(parents=True)
    device = tmp_path / "networks" / name / "device"
    device.mkdir(parents=True)
    (device / "driver").symlink_to(tmp_path / "drivers" / driver)


def test_nccl_must_use_efa_where_machine_and_image_have_it(tmp_path, capfd):
    networks, plugin = tmp_path / "networks", tmp_path / "libnccl-net-ofi.so"
    assert container.efa_variables(networks, plugin) == {}
    network_device(tmp_path, "mlx5_0", "mlx5_core")
    assert container.efa_variables(networks, plugin) == {}
    assert capfd.readouterr().out == ""
    network_device(tmp_path, "rdmap0s6", "efa")
    assert container.efa_variables(networks, plugin) == {}
    assert "make image ARGS=--efa" in capfd.readouterr().out
    plugin.touch()
    assert container.efa_variables(networks, plugin) == {
        "NCCL_NET_PLUGIN": "ofi",
        "NCCL_NET": "Libfabric",
        "FI_PROVIDER": "efa",
    }
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("driver", "used"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024\n", True),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (root@x)\n", True),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.82.07  Release Build  (root@x)\n", False),
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  600.10  Sun May 12 19:39:15 UTC 2030\n", False),
    ],
)
def test_compatibility_libraries_are_used_only_with_an_older_driver(driver, used, tmp_path, monkeypatch):
    monkeypatch.setenv("LD_LIBRARY_PATH", "/before")
    (tmp_path / "compat").mkdir()
    for name in ("libcuda.so", "libcuda.so.1", "libcuda.so.580.82.07", "libnvidia-nvvm.so.999.1"):
        (tmp_path / "compat" / name).touch()
    (tmp_path / "version").write_text(driver + "GCC version:  gcc version 12.2.0\n")
    found = container.cuda_variables(tmp_path / "compat", tmp_path / "version")
    assert found == ({"LD_LIBRARY_PATH": f"{tmp_path / 'compat'}:/before"} if used else {})


def test_machines_without_cards_and_images_without_the_libraries_need_no_variables(tmp_path):
    assert container.cuda_variables(tmp_path, tmp_path / "version") == {}
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun\n")
    assert container.cuda_variables(tmp_path, tmp_path / "version") == {}


def test_the_reason_is_the_last_error_line():
    lines = ["Error: the first\n", "Error: the second\n", "noise of torchrun\n"]
    assert container.reason(lines, 1) == "Error: the second"
    assert container.reason(["one\n", "two\n"], 3) == "exit code 3; its last lines:\none\ntwo\n"
    assert container.reason([], -9).startswith("ended by SIGKILL")


def test_a_long_reason_keeps_both_ends(tmp_path):
    container.write_reason(tmp_path, "a" * 600 + "b" * 600 + "c" * 600)
    text = (tmp_path / "output" / "failure").read_text()
    assert len(text) <= 1024
    assert text.startswith("a" * 500)
    assert text.endswith("c" * 500)


# The container's main with another folder instead of /opt/ml, and a secret without a network request.
MAIN = """
import sys
from pathlib import Path
from llm_engineering.cloud import container
container.ML = Path(sys.argv.pop(1))
container.secret_variables = lambda name: {"KEY": "planted-value", "LINES": "-----BEGIN\\nplanted-second\\n-----END-"}
sys.exit(container.main())
"""


def start(tmp_path, *command, **environment):
    locked = lock(tmp_path, f"boto3=={BOTO3}")
    return subprocess.Popen(
        [sys.executable, "-c", MAIN, str(tmp_path), *command],
        env={**os.environ, container.LOCK: locked, "PYTHONUNBUFFERED": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_the_command_gets_the_secret_and_its_output_hides_it(tmp_path):
    program = (
        "import os; print(len(os.environ['KEY']), os.environ['KEY'], os.environ['LINES'], flush=True); print('done')"
    )
    process = start(tmp_path, sys.executable, "-c", program)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert output == "13 *** ***\n***\n***\ndone\n"
    assert not (tmp_path / "output").exists()


def test_a_failure_is_written_where_sagemaker_looks(tmp_path):
    program = "import os, sys; print('Error: with planted-value. Do this.', file=sys.stderr); sys.exit(2)"
    process = start(tmp_path, sys.executable, "-c", program)
    process.communicate(timeout=60)
    assert process.returncode == 2
    assert (tmp_path / "output" / "failure").read_text() == "Error: with ***. Do this."


def test_wrong_versions_end_the_container_before_the_command(tmp_path):
    other = tmp_path / "other.lock"
    other.write_text("boto3==0.1")
    process = start(tmp_path, "touch", str(tmp_path / "ran"), **{container.LOCK: str(other)})
    process.communicate(timeout=60)
    assert process.returncode == 2
    assert not (tmp_path / "ran").exists()
    assert "boto3==0.1" in (tmp_path / "output" / "failure").read_text()


def test_sigterm_reaches_the_command_and_is_not_a_failure(tmp_path):
    program = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), sys.exit(130)))\n"
        "print('ready', flush=True)\ntime.sleep(60)"
    )
    process = start(tmp_path, sys.executable, "-c", program)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert output == "saved\n"
    assert process.returncode == 130
    assert not (tmp_path / "output").exists()
