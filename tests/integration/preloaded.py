"""Runs commands in processes forked from a server that has already imported the libraries. This saves seconds for each.

The server imports only modules that read no settings during the import. The exceptions are modules that read the hub's
settings; each process reloads these. In all else, a command behaves as in its own process.
"""

import atexit
import importlib
import logging
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import IO, Any

LIBRARIES = ("tests.integration.installed", "zenml.client", "zenml.zen_stores.sql_zen_store",
              "zenml.pipelines.pipeline_definition", "zenml.orchestrators.step_launcher", "zenml.log_stores",
              "zenml.deployers", "zenml.sandboxes", "datasets",
              "matplotlib.pyplot", "peft", "transformers.trainer", "llm_engineering.training.cpt",
              "llm_engineering.training.sft", "llm_engineering.training.dpo", "llm_engineering.training.kto",
              "llm_engineering.training.reward", "llm_engineering.training.grpo", "llm_engineering.training.rloo",
              "llm_engineering.evaluation.evaluate", "llm_engineering.generation.clients.chat_completions", "llm_engineering.generation.clients.endpoint", "typer.main",
              "zenml.container_registries",
              "tests.integration.warm")  # fmt: skip


def fork_server() -> ForkServerContext:
    """The context of the processes that are forked. The first of them starts the server, for all files of a test process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(LIBRARIES))
    return context


class Forked:
    """A running command, with the methods of `subprocess.Popen` that the tests need.

    Attributes:
        stdout, stderr: text streams with the command's output.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        env: Mapping[str, str],
        folder: Path,
        own_session: bool = False,
        terminal: int | None = None,
    ) -> None:
        """Start `python -m module arguments` in `folder`; if the name ends with `.py`, `python module arguments`.

        Args:
            own_session: start a new session, so that signals to the process group reach no other test process.
            terminal: descriptor of a terminal that becomes stdin and stdout of the command.
        """
        fork_server()
        ends = [os.pipe(), os.pipe()]
        # The descriptors are sent to the server together with the process object.
        streams = (ends[0][1], ends[1][1]) if terminal is None else (terminal, ends[1][1], terminal)
        self._process = _Process(streams, (module, list(arguments), dict(env), folder, own_session))
        self._process.start()
        for _, writing in ends:
            os.close(writing)
        self.stdout: IO[str] = os.fdopen(ends[0][0], "r", errors="replace")
        self.stderr: IO[str] = os.fdopen(ends[1][0], "r", errors="replace")
        assert self._process.pid is not None
        self.pid = self._process.pid
        self.args = [module, *arguments]

    @property
    def returncode(self) -> int | None:
        """The exit code, negative after a signal; None while the command runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The exit code, or None while the command runs."""
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal if the command still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        """Wait until the command ends; returns its exit code.

        Raises:
            subprocess.TimeoutExpired: the command runs longer than `timeout` seconds.
        """
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait until the command ends; returns its stdout and stderr."""
        written: dict[str, str] = {}

        def read(name: str, stream: IO[str]) -> None:
            written[name] = "" if stream.closed else stream.read()

        readers = [
            threading.Thread(target=read, args=(name, stream), daemon=True)
            for name, stream in (("stdout", self.stdout), ("stderr", self.stderr))
        ]
        for reader in readers:
            reader.start()
        self.wait(timeout)
        for reader in readers:
            reader.join()
        self.stdout.close()
        self.stderr.close()
        return written["stdout"], written["stderr"]


class _Process(ForkServerProcess):
    def __init__(self, streams: tuple[int, ...], rest: tuple[Any, ...]) -> None:
        """`streams` become stdout, stderr and, if there is a third one, stdin."""
        super().__init__()
        # Descriptors here, and `DupFd` in the forked process.
        self._streams: tuple[Any, ...] = streams
        self._rest = rest

    def __getstate__(self) -> dict[str, Any]:
        # Called once, when the object is pickled for the server.
        return {**self.__dict__, "_streams": tuple(DupFd(stream) for stream in self._streams)}

    def run(self) -> None:
        module, arguments, env, folder, own_session = self._rest
        if own_session:
            os.setsid()
        os.environ.clear()
        os.environ.update(env)
        # Which Python the command starts its child processes with.
        sys.executable = os.environ.pop("CHILD_PYTHON", sys.executable)
        os.chdir(folder)
        for descriptor, stream in zip((1, 2, 0), self._streams, strict=False):
            own = stream.detach()
            os.dup2(own, descriptor)
            os.close(own)
        if len(self._streams) == 3:
            # multiprocessing has opened /dev/null.
            sys.stdin = os.fdopen(0, closefd=False)
        for name in ("huggingface_hub.constants", "datasets.config"):
            importlib.reload(sys.modules[name])
        if module.startswith("llm_engineering."):
            # These commands run without ZenML. The preloaded ZenML has added a handler to the root logger.
            logging.getLogger().handlers.clear()
        sys.argv = [module, *arguments]
        sys.path[0] = str(folder)
        try:
            if module.endswith(".py"):
                runpy.run_path(module, run_name="__main__")
            else:
                runpy.run_module(module, run_name="__main__", alter_sys=True)
        finally:
            # multiprocessing does not call the exit functions.
            atexit._run_exitfuncs()
