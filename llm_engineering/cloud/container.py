"""The entry of a training container: python -m llm_engineering.cloud.container COMMAND …

Compares the installed versions with the lock of the image, reads the job's secret, sets torchrun's variables and the
network if the job has several machines, and chooses CUDA's libraries for the machine's driver. Then it runs COMMAND, forwards SIGTERM to it,
deletes old checkpoints from S3 meanwhile, and writes the reason of a failure into SageMaker's file.

| environment variable | meaning |
|---|---|
| `LLM_IMAGE_LOCK` | the lock that the image was built from, as a path in the project; the image sets it |
| `LLM_SECRET` | the name of a secret in Secrets Manager: a JSON object of environment variables for COMMAND |
| `LLM_CHECKPOINTS_URI` | the address to which SageMaker copies `/opt/ml/checkpoints` |
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import FrameType

import boto3
from botocore.exceptions import BotoCoreError, ClientError
from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import Version

from llm_engineering.cloud.old_checkpoints import CHECKPOINTS_URI, deleting_old_checkpoints
from llm_engineering.errors import INTERRUPTED, RequestError

LOCK = "LLM_IMAGE_LOCK"
SECRET = "LLM_SECRET"

ML = Path("/opt/ml")
# CUDA's libraries for machines with an older driver, and the file in which a driver names its version.
_COMPAT = Path("/usr/local/cuda/compat")
_DRIVER = Path("/proc/driver/nvidia/version")
# FailureReason shows at most this number of characters of the file.
_REASON_CHARACTERS = 1024
_REASON_LINES = 20
# The machine's network devices with direct access to memory, and NCCL's plugin for AWS's ones in the image.
_NETWORKS = Path("/sys/class/infiniband")
_EFA_PLUGIN = Path("/opt/amazon/ofi-nccl/lib/libnccl-net-ofi.so")
# Shorter values are not hidden: a value such as "yes" is not secret, and occurs in many lines.
SHORTEST_SECRET = 8
# Any port works, because no other program uses the job's machines.
_MASTER_PORT = "29500"


def main() -> int:
    """Run the command of the command line; returns its exit code."""
    command = sys.argv[1:]
    try:
        if not command:
            raise RequestError("There is no command to run: python -m llm_engineering.cloud.container COMMAND …")
        check_versions(os.environ.get(LOCK))
        secrets = secret_variables(os.environ.get(SECRET))
    except RequestError as error:
        print(f"Error: {error}", file=sys.stderr)
        write_reason(ML, f"Error: {error}")
        return error.exit_code
    machines = torchrun_variables(ML)
    network = efa_variables(_NETWORKS, _EFA_PLUGIN) if machines else {}
    environment = {**os.environ, **secrets, **machines, **network, **cuda_variables(_COMPAT, _DRIVER)}
    # One machine is enough: all of them share the address of the checkpoints.
    uri = os.environ.get(CHECKPOINTS_URI) if is_first_machine(ML) else None
    with deleting_old_checkpoints(uri, ML / "checkpoints"):
        code, received, last_lines = _run(command, environment, secrets.values())
    if code not in (0, INTERRUPTED) and received is None:
        write_reason(ML, reason(last_lines, code))
    return code if code >= 0 else 128 - code


def check_versions(lock: str | None) -> None:
    """Compare the installed packages with the lock of the image.

    Args:
        lock: path of the lock in the project; its lines are `name==version`, perhaps with a marker.

    Raises:
        RequestError: there is no lock, or packages are missing or have another version; the first ten are listed.
    """
    if lock is None:
        raise RequestError(f"The image does not say which lock it was built from ({LOCK}). Build it with `make image`.")
    try:
        lines = Path(lock).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise RequestError(f"The image's lock {lock} is not in the project ({error.strerror}).") from error
    different = [difference for line in lines if (difference := _difference(line, lock))]
    if different:
        more = f" and {len(different) - 10} more" if len(different) > 10 else ""
        raise RequestError(
            f"The image was built from another {lock} than this code has: {', '.join(different[:10])}{more}. "
            "Build a new image with `make image`, or check out the code that this image was built from."
        )


def _difference(line: str, lock: str) -> str:
    """How the installed package differs from a line of the lock; empty if it does not."""
    text = line.partition(" #")[0].partition("--hash")[0].strip(" \\")
    if not text or text.startswith(("#", "-")):
        return ""
    try:
        wanted = Requirement(text)
    except InvalidRequirement as error:
        raise RequestError(
            f"{lock} has a line that is not a requirement: {line}. Renew it with `make lock`."
        ) from error
    if wanted.marker is not None and not wanted.marker.evaluate():
        return ""
    try:
        installed = importlib.metadata.version(wanted.name)
    except importlib.metadata.PackageNotFoundError:
        return f"{wanted} (not installed)"
    # The comparison ignores a local part such as +cu128.
    return "" if wanted.specifier.contains(installed, prereleases=True) else f"{wanted} (installed is {installed})"


def secret_variables(name: str | None) -> dict[str, str]:
    """The environment variables that a secret holds.

    Raises:
        RequestError: the secret cannot be read, or is not a JSON object of strings. The message never shows its content.
    """
    if not name:
        return {}
    try:
        text = boto3.client("secretsmanager").get_secret_value(SecretId=name).get("SecretString", "")
    except (BotoCoreError, ClientError) as error:
        raise RequestError(
            f"The secret {name} cannot be read: {error}. Allow the job's role secretsmanager:GetSecretValue on it, or "
            "correct SAGEMAKER_SECRET."
        ) from error
    values = secret_object(text)
    if values is None:
        raise RequestError(
            f"The secret {name} is not a JSON object of strings. Give it the form "
            '{"COMET_API_KEY": "...", "HF_TOKEN": "..."}.'
        )
    return values


def secret_object(text: str) -> dict[str, str] | None:
    """The variables in the text of a secret; None if it is not a JSON object of strings."""
    try:
        secret = json.loads(text)
    except ValueError:
        return None
    is_object = isinstance(secret, dict) and all(isinstance(value, str) for value in secret.values())
    return secret if is_object else None


def is_first_machine(ml: Path) -> bool:
    """Whether this is the only machine, or the first one, which writes the checkpoints."""
    return torchrun_variables(ml).get("PET_NODE_RANK", "0") == "0"


def torchrun_variables(ml: Path) -> dict[str, str]:
    """The environment variables that tell torchrun about the other machines; empty for a single machine.

    SageMaker lists the machines in `input/config/resourceconfig.json`: `{"current_host", "hosts",
    "network_interface_name"}`. The rank of a machine is its index in the sorted names, so all machines compute the same ranks.
    """
    file = ml / "input" / "config" / "resourceconfig.json"
    if not file.is_file():
        return {}
    resources = json.loads(file.read_text(encoding="utf-8"))
    hosts = sorted(resources["hosts"], key=lambda host: (len(host), host))
    if len(hosts) == 1:
        return {}
    interface = resources.get("network_interface_name", "eth0")
    return {
        "PET_NNODES": str(len(hosts)),
        "PET_NODE_RANK": str(hosts.index(resources["current_host"])),
        "PET_MASTER_ADDR": hosts[0],
        "PET_MASTER_PORT": _MASTER_PORT,
        "NCCL_SOCKET_IFNAME": interface,
        "GLOO_SOCKET_IFNAME": interface,
    }


def efa_variables(networks: Path, plugin: Path) -> dict[str, str]:
    """The environment variables that make NCCL use EFA, AWS's network between machines; empty on machines without it.

    NCCL_NET makes NCCL fail if it cannot use the plugin. Without it, NCCL would use TCP, and only its log would say so.

    Args:
        networks: the folder in which the kernel lists the devices. Each has a link to its driver.
        plugin: NCCL's plugin aws-ofi-nccl, which only images built with `make image ARGS=--efa` have.
    """
    if not any((device / "device" / "driver").resolve().name == "efa" for device in networks.glob("*")):
        return {}
    if not plugin.is_file():
        print(
            "These machines have EFA, but the image lacks its software, so the processes exchange gradients over TCP, which "
            "is slower. Build the image with `make image ARGS=--efa`.",
            flush=True,
        )
        return {}
    return {"NCCL_NET_PLUGIN": "ofi", "NCCL_NET": "Libfabric", "FI_PROVIDER": "efa"}


def cuda_variables(compat: Path, driver: Path) -> dict[str, str]:
    """The environment variable that puts CUDA's compatibility libraries before an older driver's; empty otherwise.

    On a newer driver these libraries would not work.

    Args:
        compat: the folder of the libraries. The name of `libcuda.so.580.82.07` has the version.
        driver: the file with the version of the machine's driver; missing on a machine without cards.
    """
    if not driver.is_file():
        return {}
    module = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)\s", driver.read_text(encoding="utf-8"))
    libraries = [re.fullmatch(r"libcuda\.so\.(\d+(?:\.\d+)+)", path.name) for path in compat.glob("libcuda.so.*")]
    versions = [Version(library[1]) for library in libraries if library]
    if module is None or not versions or Version(module[1]) >= max(versions):
        return {}
    print(f"The driver {module[1]} is older than CUDA's {max(versions)}: {compat} is used.", flush=True)
    paths = [str(compat), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return {"LD_LIBRARY_PATH": os.pathsep.join(paths)}


def _run(
    command: Sequence[str], environment: Mapping[str, str], secrets: Iterable[str]
) -> tuple[int, signal.Signals | None, Iterable[str]]:
    """Run a command and print its output without the secrets, because others can read the job's log.

    Returns:
        The command's exit code, the signal that was forwarded to it, and the last lines of its output.
    """
    # The output is read line by line, so each line of a secret is hidden alone.
    hidden = [line for secret in secrets for line in secret.splitlines() if len(line) >= SHORTEST_SECRET]
    received: signal.Signals | None = None
    process: subprocess.Popen[str] | None = None

    def forward(number: int, _: FrameType | None) -> None:
        nonlocal received
        received = signal.Signals(number)
        if process is not None:
            process.send_signal(signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    last_lines: deque[str] = deque(maxlen=_REASON_LINES)
    try:
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
    except OSError as error:
        return 1, received, ["".join(traceback.format_exception_only(error))]
    if received is not None:
        process.send_signal(signal.SIGTERM)
    assert process.stdout is not None
    for line in process.stdout:
        for secret in hidden:
            line = line.replace(secret, "***")
        print(line, end="", flush=True)
        last_lines.append(line)
    return process.wait(), received, last_lines


def reason(last_lines: Iterable[str], code: int) -> str:
    """Why a command failed: its last line that begins with `Error:`, or the end of its output if there is none."""
    lines = list(last_lines)
    errors = [line for line in lines if line.startswith("Error: ")]
    if errors:
        return errors[-1].strip()
    ended = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return f"{ended}; its last lines:\n{''.join(lines)}"


def write_reason(ml: Path, text: str) -> None:
    """Write the reason into the file that SageMaker reads. A long reason is shortened to its beginning and its end."""
    if len(text) > _REASON_CHARACTERS:
        half = _REASON_CHARACTERS // 2 - 3
        text = f"{text[:half]} … {text[-half:]}"
    folder = ml / "output"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "failure").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
