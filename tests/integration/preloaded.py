"""Commands in processes that are forked from one which has imported the libraries: seconds less for each command.

Imported is what reads no setting when it is imported, but for those of the hub, which are read again. What the commands
do, and how they end, is their own.
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
from multiprocessing.context import ForkServerProcess
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import IO, Any

_LIBRARIES = ("tests.integration.installed", "zenml.client", "zenml.zen_stores.sql_zen_store", "datasets",
              "matplotlib.pyplot", "peft", "transformers.trainer", "trl.trainer.dpo_trainer",
              "trl.trainer.sft_trainer", "llm_engineering.training.sft", "llm_engineering.training.dpo",
              "llm_engineering.evaluation.evaluate", "llm_engineering.generation.endpoint")  # fmt: skip


class Forked:
    """A command that runs: what the tests need of `subprocess.Popen`, of the same meaning.

    Attributes:
        stdout, stderr: of text, or None if they go where those of the tests go.
    """

    def __init__(
        self, module: str, arguments: Sequence[str], env: Mapping[str, str], folder: Path, own_session: bool = False
    ) -> None:
        """Start `python -m module arguments` in `folder`; of a name that ends in `.py`, that file.

        With `own_session` signals to its process group reach no other process of the tests.
        """
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(_LIBRARIES))
        ends = [os.pipe(), os.pipe()]
        # The descriptors travel with what is sent to the server when the process starts.
        self._process = _Process(ends[0][1], ends[1][1], (module, list(arguments), dict(env), folder, own_session))
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
        """The exit code; that of a signal is below zero. None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The same."""
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end.

        Raises:
            subprocess.TimeoutExpired: it takes longer.
        """
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end; what it wrote."""
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
    def __init__(self, stdout: int, stderr: int, rest: tuple[Any, ...]) -> None:
        super().__init__()
        self._streams, self._rest = (stdout, stderr), rest

    def __getstate__(self) -> dict[str, Any]:
        # Pickled once, to be sent to the server.
        return {**self.__dict__, "_streams": tuple(DupFd(stream) for stream in self._streams)}

    def run(self) -> None:
        module, arguments, env, folder, own_session = self._rest
        if own_session:
            os.setsid()
        os.environ.clear()
        os.environ.update(env)
        os.chdir(folder)
        for descriptor, stream in zip((1, 2), self._streams, strict=True):
            own = stream.detach()
            os.dup2(own, descriptor)
            os.close(own)
        for name in ("huggingface_hub.constants", "datasets.config"):
            importlib.reload(sys.modules[name])
        if module.startswith("llm_engineering."):
            # Which goes without ZenML, and ZenML sets the root logger up when it is imported.
            logging.getLogger().handlers.clear()
        sys.argv = [module, *arguments]
        sys.path[0] = str(folder)
        try:
            if module.endswith(".py"):
                runpy.run_path(module, run_name="__main__")
            else:
                runpy.run_module(module, run_name="__main__", alter_sys=True)
        finally:
            # Which multiprocessing leaves out.
            atexit._run_exitfuncs()
