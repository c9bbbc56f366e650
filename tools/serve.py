"""Serves a model OpenAI-compatibly on loopback until Ctrl-C: python -m tools.serve [--version N] [--port 8000]"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import httpx

from llm_engineering.errors import RequestError, WorkError
from llm_engineering.recipe.loading import load_recipe
from tools.cli import add_recipe_arguments, exit_code, prepare_zenml, start_logging

logger = logging.getLogger("llm_engineering.serve")

HOST = "127.0.0.1"
DEFAULT_PORT = 8000
LOG_LINES_SHOWN = 15
# A server that still answers somebody when it is asked to end gets this long.
GRACE_S = 10.0
_POLL_S = 0.2
# Starts a program that is sent SIGTERM when this process is gone: PR_SET_PDEATHSIG of prctl(2), which Linux alone has.
_END_WITH_PARENT = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execv(sys.argv[1], sys.argv[1:])"
_UNDER_THIS = [sys.executable, "-c", _END_WITH_PARENT] if sys.platform == "linux" else []


def main() -> int:
    """Parse the command line and serve; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.serve", description="Serve a model OpenAI-compatibly on loopback until Ctrl-C."
    )
    parser.add_argument("--version", metavar="N", help="default: the version in production, else staging")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help="default: %(default)s")
    add_recipe_arguments(parser)
    arguments = parser.parse_args()
    if not 0 < arguments.port < 65536:
        parser.error(f"--port must be from 1 to 65535, not {arguments.port}")
    start_logging(arguments.debug)
    return exit_code(lambda: _serve(arguments), arguments.debug)


def _serve(arguments: argparse.Namespace) -> int:
    # Both end it the same way; a shell's background job starts with SIGINT ignored.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    recipe = load_recipe(arguments.config, arguments.set)
    check_port(arguments.port)

    from llm_engineering.publish.merge import merged_device
    from llm_engineering.publish.verification import precision
    from llm_engineering.recipe.settings import Settings

    settings = Settings()
    settings.check_writable()
    device = merged_device(recipe.compute.here)
    prepare_zenml()
    from tools.merged import merged_model
    from tools.promoted import find_model

    found = find_model(recipe, arguments.version)
    logger.info("%s", found.described)
    folder = merged_model(found, recipe, settings)
    vllm = installed_vllm() if device.name == "cuda" else None
    log = settings.llm_output_dir.resolve() / f"serve-{arguments.port}.log"
    with tempfile.TemporaryDirectory(prefix="serve-") as cache:
        if vllm is not None:
            command = vllm_command(vllm, folder, recipe.name, arguments.port, precision(device.dtype))
        else:
            link_as_cached(folder, recipe.name, Path(cache))
            command = transformers_command(recipe.name, arguments.port, device.name)
        if recipe.model.trust_remote_code:
            command.append("--trust-remote-code")
        logger.info("Starting %s, which logs to %s", Path(command[0]).name, log)
        try:
            run_server(command, f"http://{HOST}:{arguments.port}", recipe.name, Path(cache), log)
        except KeyboardInterrupt:
            logger.info("Ended.")
    return 0


def check_port(port: int) -> None:
    """Raises:
    RequestError: the port cannot be listened on.
    """
    with socket.socket() as probe:
        # Connections of a former server that wait for their end do not hinder the next one.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise RequestError(
                f"Port {port} cannot be used: {error.strerror}. Choose another one: make serve ARGS='--port N'."
            ) from error


def link_as_cached(folder: Path, name: str, cache: Path) -> None:
    """Lay the model's files out as the hub's cache has them, so that clients know the model by a name and not a path.

    https://huggingface.co/docs/huggingface_hub/guides/manage-cache
    """
    model = cache / f"models--{name}"
    snapshot = model / "snapshots" / "served"
    snapshot.mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("served")
    for file in folder.iterdir():
        (snapshot / file.name).symlink_to(file.resolve())


def transformers_command(name: str, port: int, device: str) -> list[str]:
    """`transformers serve` of this environment, pinned to one model of the cache."""
    program = Path(sys.executable).with_name("transformers")
    return [str(program), "serve", name, "--device", device, "--host", HOST, "--port", str(port)]


def installed_vllm() -> str | None:
    """vLLM's program: of this environment, which need not be on the PATH, else of another."""
    return shutil.which("vllm", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


def vllm_command(program: str, folder: Path, name: str, port: int, dtype: str) -> list[str]:
    """vLLM's server; template and end tokens are those in the folder.

    Args:
        dtype: the precision that was verified; on its own vLLM takes half precision for float32 files.
    """
    address = ["--host", HOST, "--port", str(port)]
    return [program, "serve", str(folder), "--served-model-name", name, "--dtype", dtype, *address]


def run_server(command: Sequence[str], url: str, name: str, cache: Path, log: Path) -> None:
    """Start the server, say when it answers, and stay until a signal or its own end.

    The server and what it started end with this; on Linux the server also after a kill -9 of this.

    Raises:
        KeyboardInterrupt: a signal ended it.
        WorkError: it ended by itself; the end of its log is shown.
    """
    environment = {**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    with log.open("w", encoding="utf-8") as output:
        # In a session of its own: Ctrl-C reaches this process alone, which then ends the server in order.
        server = subprocess.Popen(
            [*_UNDER_THIS, *command],
            cwd=cache,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        while server.poll() is None and not _answers(f"{url}/health"):
            time.sleep(_POLL_S)
        if server.poll() is None:
            print(f"Serving: {url}/v1, model {name} (Ctrl-C ends it)", flush=True)
            server.wait()
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES_SHOWN:])
        raise WorkError(f"The server ended by itself with exit code {server.returncode}; the end of {log}:\n{tail}")
    finally:
        _end(server)


def _answers(url: str) -> bool:
    try:
        # A proxy of the environment does not know this machine's ports.
        return httpx.get(url, timeout=5, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def _end(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    try:
        server.wait(GRACE_S)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        # Too long, or a second Ctrl-C.
        server.kill()
        server.wait()
    # What it started and left behind, if anything.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
