"""A `python` whose processes are forked from a server that has already imported the libraries. This saves seconds for each.

The server has imported no module of the project: each process imports those of its own folder. A program `python` sends
its arguments, environment, streams and namespaces to the server, waits for the forked process, forwards signals to it,
and ends with its exit code. The forked process is killed when the program is.
"""

import ctypes
import functools
import gc
import importlib
import json
import logging
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_LIBRARIES = ("boto3", "datasets", "peft", "torch.distributed.run", "transformers.trainer", "trl.trainer.dpo_trainer",
              "trl.trainer.grpo_trainer", "trl.trainer.kto_trainer", "trl.trainer.reward_trainer",
              "trl.trainer.rloo_trainer", "trl.trainer.sft_trainer", "zenml.client", "zenml.pipelines.pipeline_definition",
              "zenml.orchestrators.step_launcher", "zenml.zen_stores.rest_zen_store", "zenml.zen_stores.sql_zen_store")  # fmt: skip
# A training process ends when the process with the id in this variable is no longer its parent.
_LAUNCHER = "LLM_TRAINING_LAUNCHER"
# The namespaces of a job's machine: its mounts and its processes.
_NAMESPACES = ("mnt", "pid")
# It runs without site packages, and so starts in milliseconds.
_PROGRAM = """#!{python} -SE
import json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
spaces = [os.open(f"/proc/self/ns/{{name}}", os.O_RDONLY) for name in {namespaces!r}]
socket.send_fds(server, [b" "], [0, 1, 2, *spaces])
server.sendall(json.dumps([sys.argv, os.getcwd(), dict(os.environ)]).encode() + b"\\n")
answers = server.makefile()
waiting, pid = [], None
def forward(number, frame):
    os.kill(pid, number) if pid else waiting.append(number)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, forward)
pid = int(answers.readline())
for number in waiting:
    os.kill(pid, number)
code = int(answers.readline())
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if code != -signal.SIGKILL else None
    os.kill(os.getpid(), -code)
os._exit(code if code >= 0 else 128 - code)
"""


@contextmanager
def warm_python() -> Iterator[Path]:
    """Serve until the block ends; gives the folder of the program `python`."""
    with tempfile.TemporaryDirectory(prefix="python-") as folder:
        # Some libraries read these variables during their import: this is the environment of a job, and what the command
        # line sets for ZenML.
        names = ("PATH", "HOME", "PYTHONPATH", "ZENML_ANALYTICS_OPT_IN", "ZENML_LOGGING_VERBOSITY",
                 "ZENML_ENABLE_RICH_TRACEBACK", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")  # fmt: skip
        environment = {name: os.environ[name] for name in names if name in os.environ} | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.fakes.warm_python", folder]
        server = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE)
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == b"ready\n"
            yield Path(folder)
        finally:
            server.terminate()
            server.wait()


def serve(folder: Path) -> list[str]:
    """Import the libraries, and fork a process for each connection.

    Returns in the forked processes: the arguments of `python`.
    """
    for name in _LIBRARIES:
        importlib.import_module(name)
    list_packages_once()
    gc.collect()
    gc.freeze()
    address, program = folder / "socket", folder / "python"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(address))
        listener.listen()
        program.write_text(_PROGRAM.format(python=sys.executable, address=str(address), namespaces=_NAMESPACES))
        program.chmod(0o755)
        print("ready", flush=True)
        forked: set[int] = set()
        while True:
            client, _ = listener.accept()
            forked -= {process for process in forked if os.waitpid(process, os.WNOHANG)[0]}
            process = os.fork()
            if process == 0:
                break
            forked.add(process)
            client.close()
    arguments = _become(client)
    sys.executable = str(program)
    return arguments


def list_packages_once() -> None:
    """List the installed packages for this process and the forked ones. ZenML starts a process for this twice in each run."""
    environment = importlib.import_module("zenml.environment").Environment
    environment.get_python_packages = functools.cache(environment.get_python_packages)
    environment.get_python_packages()


def _become(client: socket.socket) -> list[str]:
    """Continue in a process with the client's namespaces, streams, folder and environment; returns the client's arguments."""
    _, descriptors, _, _ = socket.recv_fds(client, 1, 3 + len(_NAMESPACES))
    arguments: list[str]
    arguments, cwd, environment = json.loads(client.makefile().readline())
    streams, spaces = descriptors[:3], descriptors[3:]
    libc = ctypes.CDLL(None, use_errno=True)
    # Only with root may a process enter another namespace.
    own = [os.stat(f"/proc/self/ns/{name}").st_ino for name in _NAMESPACES]
    for number, space in zip(own, spaces, strict=True):
        if os.fstat(space).st_ino != number and libc.setns(space, 0) != 0:
            raise OSError(ctypes.get_errno(), "setns")
        os.close(space)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    # Only a child is in the namespace of processes.
    child = os.fork()
    if child != 0:
        for number in range(3):
            os.close(number)
        ended = os.pidfd_open(child)
        awaited: list[Any] = [client, ended]
        if ended not in select.select(awaited, [], [])[0]:
            # The program has ended, because it was killed.
            os.kill(child, signal.SIGKILL)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        client.sendall(f"{code}\n".encode())
        os._exit(0)
    client.sendall(f"{os.getpid()}\n".encode())
    client.close()
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    if _LAUNCHER in os.environ:
        os.environ[_LAUNCHER] = str(os.getppid())
    return arguments


def run(arguments: list[str]) -> None:
    """Run what `python arguments` would run."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(write_through=True)  # type: ignore[union-attr]
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    for name in ("huggingface_hub.constants", "datasets.config"):
        importlib.reload(sys.modules[name])
    # ZenML has added one during its import.
    logging.getLogger().handlers.clear()
    words = [word for word in arguments[1:] if word != "-u"]
    path = [entry for entry in sys.path if entry not in ("", str(ROOT))]
    added = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    kind, rest = words[0], words[1:]
    if kind == "-m":
        sys.argv, sys.path[:] = rest, [os.getcwd(), *added, *path]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv, sys.path[:] = ["-c", *rest[1:]], ["", *added, *path]
        exec(rest[0], {"__name__": "__main__"})
    else:
        sys.argv, sys.path[:] = words, [str(Path(kind).resolve().parent), *added, *path]
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    run(serve(Path(sys.argv[1])))
