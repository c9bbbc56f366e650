"""The entry of a training container: python -m llm_engineering.cloud.container COMMAND …

Compares the installed versions with the lock of the image, reads the job's secret, says to torchrun which of several
machines this is, runs COMMAND, passes SIGTERM on to it, and leaves the reason of a failure where SageMaker looks for it.

| environment | is |
|---|---|
| `LLM_IMAGE_LOCK` | the lock that the image was built from, as a path in the project; the image sets it |
| `LLM_SECRET` | the name of a secret in Secrets Manager: a JSON object of environment variables for COMMAND |
"""

from __future__ import annotations

import importlib.metadata
import json
import os
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

from llm_engineering.errors import INTERRUPTED, RequestError

LOCK = "LLM_IMAGE_LOCK"
SECRET = "LLM_SECRET"

ML = Path("/opt/ml")
# SageMaker shows this much of the file in FailureReason.
_REASON_CHARACTERS = 1024
_REASON_LINES = 20
# A shorter value, such as a yes, stands in many lines and is no secret.
_SHORTEST_SECRET = 8
# Any port that nothing else listens on: jobs have their machines to themselves.
_MASTER_PORT = "29500"


def main() -> int:
    """Run the command line's command; returns its exit code."""
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
    environment = {**os.environ, **secrets, **torchrun_variables(ML)}
    code, received, last = _run(command, environment, secrets.values())
    if code not in (0, INTERRUPTED) and received is None:
        write_reason(ML, reason(last, code))
    return code if code >= 0 else 128 - code


def check_versions(lock: str | None) -> None:
    """Compare what is installed with the lock of the image.

    Args:
        lock: its path, relative to the project; lines `name==version`, perhaps with a marker.

    Raises:
        RequestError: there is no lock, or a package is missing or installed in another version; all are named.
    """
    if lock is None:
        raise RequestError(f"The image does not say which lock it was built from ({LOCK}). Build it with `make image`.")
    try:
        lines = Path(lock).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise RequestError(f"The image's lock {lock} is not in the project ({error.strerror}).") from error
    different = [found for line in lines if (found := _difference(line, lock))]
    if different:
        more = f" and {len(different) - 10} more" if len(different) > 10 else ""
        raise RequestError(
            f"The image was built from another {lock} than this code has: {', '.join(different[:10])}{more}. "
            "Build it anew with `make image`, or go back to the code that it was built from."
        )


def _difference(line: str, lock: str) -> str:
    """How a line of the lock differs from what is installed; empty if it does not."""
    text = line.partition(" #")[0].partition("--hash")[0].strip(" \\")
    if not text or text.startswith(("#", "-")):
        return ""
    try:
        wanted = Requirement(text)
    except InvalidRequirement as error:
        raise RequestError(f"{lock} has a line that is no requirement: {line}") from error
    if wanted.marker is not None and not wanted.marker.evaluate():
        return ""
    try:
        installed = importlib.metadata.version(wanted.name)
    except importlib.metadata.PackageNotFoundError:
        return f"{wanted} (not installed)"
    # A local part such as +cu128 is no other version.
    return "" if wanted.specifier.contains(installed, prereleases=True) else f"{wanted} (installed is {installed})"


def secret_variables(name: str | None) -> dict[str, str]:
    """The environment variables that a secret holds.

    Raises:
        RequestError: it cannot be read, or is no JSON object of texts. Its content is never named.
    """
    if not name:
        return {}
    try:
        text = boto3.client("secretsmanager").get_secret_value(SecretId=name).get("SecretString", "")
    except (BotoCoreError, ClientError) as error:
        raise RequestError(
            f"The secret {name} cannot be read: {error}. Let the job's role do secretsmanager:GetSecretValue on it, or "
            "correct SAGEMAKER_SECRET."
        ) from error
    values = secret_object(text)
    if values is None:
        raise RequestError(
            f"The secret {name} is no JSON object of texts. It has the form "
            '{"COMET_API_KEY": "...", "HF_TOKEN": "..."}.'
        )
    return values


def secret_object(text: str) -> dict[str, str] | None:
    """A secret's variables; None if it is no JSON object of texts."""
    try:
        held = json.loads(text)
    except ValueError:
        return None
    is_object = isinstance(held, dict) and all(isinstance(value, str) for value in held.values())
    return held if is_object else None


def torchrun_variables(ml: Path) -> dict[str, str]:
    """What torchrun reads where its options are not given, of the machines that SageMaker names; empty for one.

    SageMaker writes `input/config/resourceconfig.json`: `{"current_host", "hosts", "network_interface_name"}`. Hosts
    are numbered in the order of their names, which is the same on all of them.
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


def _run(
    command: Sequence[str], environment: Mapping[str, str], secrets: Iterable[str]
) -> tuple[int, signal.Signals | None, Iterable[str]]:
    """Run a command and show what it writes, without the secrets: the log is kept and read by others.

    Returns its exit code, the signal that was passed on, and its last lines.
    """
    hidden = [secret for secret in secrets if len(secret) >= _SHORTEST_SECRET]
    received: signal.Signals | None = None
    process: subprocess.Popen[str] | None = None

    def pass_on(number: int, _: FrameType | None) -> None:
        nonlocal received
        received = signal.Signals(number)
        if process is not None:
            process.send_signal(signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    last: deque[str] = deque(maxlen=_REASON_LINES)
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
        last.append(line)
    return process.wait(), received, last


def reason(last: Iterable[str], code: int) -> str:
    """Why a command failed: its last line that begins with `Error:`, else the end of what it wrote."""
    lines = list(last)
    errors = [line for line in lines if line.startswith("Error: ")]
    if errors:
        return errors[-1].strip()
    ended = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return f"{ended}; its last lines:\n{''.join(lines)}"


def write_reason(ml: Path, text: str) -> None:
    """Leave the reason where SageMaker takes it from: its beginning and its end, if it is too long."""
    if len(text) > _REASON_CHARACTERS:
        half = _REASON_CHARACTERS // 2 - 3
        text = f"{text[:half]} … {text[-half:]}"
    folder = ml / "output"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "failure").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
