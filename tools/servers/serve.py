"""The commands `serve`, for a model, and `dashboard`, for ZenML's dashboard. Both servers listen only on loopback."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import httpx
import typer

from llm_engineering.errors import RequestError, WorkError
from llm_engineering.recipe.loading import load_recipe
from tools.cli import DEFAULT_RECIPE, Config, Overrides, Version, prepare_zenml

if TYPE_CHECKING:
    from llm_engineering.feedback.served import ServedLog
    from llm_engineering.publish.chat_server import ServedModel
    from llm_engineering.recipe.recipe import Recipe
    from llm_engineering.recipe.settings import Settings
    from tools.model_versions.versions import Found

logger = logging.getLogger("llm_engineering.serve")

HOST = "127.0.0.1"
LOG_LINES_SHOWN = 15
# Time for a server to finish its answers after SIGTERM.
GRACE_S = 10.0
_POLL_S = 0.2
# Starts a program that gets SIGTERM when this process ends: PR_SET_PDEATHSIG of prctl(2), which only Linux has.
_END_WITH_PARENT = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execv(sys.argv[1], sys.argv[1:])"
_UNDER_THIS = [sys.executable, "-c", _END_WITH_PARENT] if sys.platform == "linux" else []


def serve(
    config: Config = DEFAULT_RECIPE,
    overrides: Overrides = None,
    version: Version = None,
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port on 127.0.0.1.")] = 8000,
    also: Annotated[
        str,
        typer.Option(
            "--also",
            metavar="NUMBERS",
            help="Other versions with the same base model, as `3 5`. vLLM serves all adapters and the base model side by side.",
        ),
    ] = "",
) -> int:
    """Serve a model with an OpenAI-compatible API on this machine until Ctrl-C.

    The server is vLLM if it is installed and this machine has a CUDA card. Otherwise, and with `serving.log_requests`, it is
    `transformers serve`, behind a server that translates requests for chat completions, and refuses those that it cannot
    answer as OpenAI's API does.

    With `--also`, the model's adapter has the recipe's name, other versions have `name:number`, and the base model has its own.

    Example: `llm-engineering serve --port 8123`
    """
    # Every signal ends the server in the same way. SIGINT too, because a shell's background job starts with it ignored.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    recipe = load_recipe(config, overrides or ())
    listener = socket.socket()
    bind(listener, port, "serve")

    from llm_engineering.models.device import choose_device
    from llm_engineering.publish.merge import merged_device
    from llm_engineering.publish.verification import precision
    from llm_engineering.recipe.settings import Settings
    from tools.servers.vllm import adapters_command, installed_vllm, merged_command, side_by_side

    settings = Settings()
    settings.check_writable()
    device = merged_device(recipe.compute.here)
    # Only the server in front of `transformers serve` writes the log.
    vllm = installed_vllm() if device.name == "cuda" and not recipe.serving.log_requests else None
    if also and vllm is None:
        raise RequestError(
            "Only vLLM serves several versions side by side (--also). It needs a CUDA card and the package vllm, and "
            "serving.log_requests must be off. Serve one version: make serve VERSION=N"
        )
    prepare_zenml()
    from tools.model_versions.signatures import signed_model
    from tools.model_versions.versions import find_model

    found = find_model(recipe, version)
    logger.info("%s", found.described)
    adapters = side_by_side(found, also.split(), recipe, settings) if also else {}
    folder, _ = signed_model(found, recipe, settings)
    request_log = served_log(found, recipe, settings) if recipe.serving.log_requests else None
    log = settings.llm_output_dir.resolve() / f"serve-{port}.log"
    trust = recipe.model.trust_remote_code
    front: AbstractContextManager[None] = contextlib.nullcontext()
    with tempfile.TemporaryDirectory(prefix="serve-") as scratch:
        if vllm is not None:
            listener.close()
            engine = f"http://{HOST}:{port}"
            command = merged_command(vllm, folder, recipe.name, port, precision(device.dtype))
            if adapters:
                # The adapters were trained on the base model in this precision.
                dtype = precision(choose_device(recipe.compute.here).dtype)
                command = adapters_command(vllm, found.base, folder, adapters, port, dtype, settings)
            command += ["--trust-remote-code"] if trust else []
        else:
            command, engine, front = transformers_behind_chat(
                folder,
                recipe.name,
                listener,
                device.name,
                Path(scratch),
                settings,
                request_log,
                trust_remote_code=trust,
            )
        logger.info("Starting %s. Its log: %s", Path(command[0]).name, log)
        shown = f"http://{HOST}:{port}/v1, model {recipe.name}"
        try:
            run_server(command, engine, shown, Path(scratch), log, front)
        except KeyboardInterrupt:
            logger.info("The server has stopped.")
    return 0


def served_log(found: Found, recipe: Recipe, settings: Settings) -> ServedLog:
    """The log of what a version is asked, and answers."""
    from llm_engineering.feedback.people import folder_of
    from llm_engineering.feedback.served import ServedLog
    from llm_engineering.recipe.data_blocks import FEEDBACK
    from tools.model_versions.versions import ADAPTER

    adapter = found.version.get_artifact(found.name + ADAPTER)
    # `find_model` has found its files.
    assert adapter is not None
    folder = folder_of(FEEDBACK, recipe.name, settings).resolve()
    logger.info("Requests and answers are written to %s, with personal data and secrets masked.", folder)
    return ServedLog(folder, found.version.number, str(adapter.content_hash))


def transformers_behind_chat(
    folder: Path,
    name: str,
    listener: socket.socket,
    device: str,
    scratch: Path,
    settings: Settings,
    log: ServedLog | None = None,
    *,
    trust_remote_code: bool,
) -> tuple[list[str], str, AbstractContextManager[None]]:
    """The command of `transformers serve` for a model's folder, its address, and the server of OpenAI's API in front of it.

    Args:
        listener: the bound socket of the server in front.
        scratch: the folder in which the command runs.
    """
    from llm_engineering.publish.chat_server import ENGINE_MODEL, ServedModel

    port = free_port()
    engine = f"http://{HOST}:{port}"
    Path(scratch, ENGINE_MODEL).symlink_to(folder.resolve())
    command = transformers_command(ENGINE_MODEL, port, device)
    command += ["--trust-remote-code"] if trust_remote_code else []
    model = ServedModel.read(folder, name, engine, settings, trust_remote_code=trust_remote_code)
    return command, engine, serving_chat(model, listener, log)


@contextlib.contextmanager
def serving_chat(model: ServedModel, listener: socket.socket, log: ServedLog | None = None) -> Iterator[None]:
    """Serve OpenAI's API for a model of `transformers serve` on a bound socket, in a thread.

    Args:
        log: where requests, answers and feedback are written; None writes nothing.
    """
    import uvicorn

    from llm_engineering.publish.chat_server import build_app

    # log_config=None: otherwise uvicorn would add its own handlers for the terminal.
    app = build_app(model, log, is_local=listener.getsockname()[0] == HOST)
    config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(_POLL_S / 10)
        yield
    finally:
        server.should_exit = True
        thread.join()


def dashboard(
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port on 127.0.0.1.")] = 8237,
) -> int:
    """Serve ZenML's dashboard on this machine until Ctrl-C.

    The dashboard shows the runs of the local store. If ZenML is connected to a server, the command only prints the
    address of that server.

    Example: `llm-engineering dashboard --port 8300`
    """
    # `zenml login --local` is not used: it points the client configuration at a daemon, and when that daemon has died,
    # every later run fails. This runs the same server in the foreground and does not change the configuration.
    url = f"http://{HOST}:{port}"

    # Both signals end the server in the same way. SIGINT too, because a shell's background job starts with it ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    # Set before the first import of zenml, which reads the variables only once.
    os.environ.update(server_environment(url))
    try:
        from zenml.config.global_config import GlobalConfiguration
        from zenml.enums import StoreType

        configuration = GlobalConfiguration()
        store = configuration.store_configuration
        if store.type == StoreType.REST:
            print(f"Dashboard: {store.url} (the runs are on this ZenML server)")
            return 0

        with socket.socket() as listener:
            bind(listener, port, "dashboard")
            log = Path(configuration.config_directory) / "dashboard.log"
            log.parent.mkdir(parents=True, exist_ok=True)
            logging.basicConfig(filename=log, filemode="w", level=logging.WARNING, force=True)
            try:
                _skip_onboarding_survey()
                from zenml.zen_server.zen_server_api import app

                serve_app(app, listener, f"Dashboard: {url}/projects/default/runs")
            except (Exception, SystemExit) as error:
                # When uvicorn raises SystemExit, it has already logged the cause. A traceback after it would push the
                # cause out of the last lines, which are printed.
                if not isinstance(error, SystemExit):
                    logging.exception("The dashboard's server failed.")
                tail = log.read_text().splitlines()[-LOG_LINES_SHOWN:]
                print(f"The dashboard's server failed. The last lines of {log}:", *tail, sep="\n", file=sys.stderr)
                return 1
    except KeyboardInterrupt:
        pass
    return 0


def free_port() -> int:
    """A port of this machine that no server uses."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
    return port


def bind(listener: socket.socket, port: int, command: str) -> None:
    """Bind a socket to a port of this machine.

    Raises:
        RequestError: no server can listen on the port.
    """
    # This server may use the port although connections of an earlier server are still in TIME_WAIT.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
    except OSError as error:
        raise RequestError(
            f"Port {port} cannot be used: {error.strerror}. Choose another port: make {command} ARGS='--port N'."
        ) from error


def transformers_command(model: str, port: int, device: str) -> list[str]:
    """The command of `transformers serve` in this environment. It serves only this model, a folder."""
    program = Path(sys.executable).with_name("transformers")
    return [str(program), "serve", model, "--device", device, "--host", HOST, "--port", str(port)]


def run_server(
    command: Sequence[str],
    url: str,
    shown: str,
    folder: Path,
    log: Path,
    front: AbstractContextManager[None] = contextlib.nullcontext(),  # noqa: B008 - it has no state
) -> None:
    """Start a server in a folder, wait until it answers, and then for a signal or for the server's end.

    The server and its child processes end when this function ends. On Linux the server also ends if this process is
    killed with SIGKILL.

    Args:
        url: the server's own address.
        shown: the address and the model for requests, which is printed when they can be sent.
        front: entered while the server answers.

    Raises:
        KeyboardInterrupt: a signal ended the server.
        WorkError: the server stopped without a signal; the message has the last lines of its log.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with log.open("w", encoding="utf-8") as output:
        # In its own session, so that Ctrl-C reaches only this process, which then stops the server cleanly.
        server = subprocess.Popen(
            [*_UNDER_THIS, *command],
            cwd=folder,
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
            with front:
                print(f"Serving: {shown} (Ctrl-C ends it)", flush=True)
                server.wait()
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES_SHOWN:])
        raise WorkError(f"The server stopped with exit code {server.returncode}. The last lines of {log}:\n{tail}")
    finally:
        _end(server)


def _answers(url: str) -> bool:
    try:
        # The environment may name a proxy, which cannot reach this machine's loopback.
        return httpx.get(url, timeout=5, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def _end(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    try:
        server.wait(GRACE_S)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        # The server took too long, or the user pressed Ctrl-C again.
        server.kill()
        server.wait()
    # Child processes of the server that are still running.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)


def server_environment(url: str) -> dict[str, str]:
    """The environment variables that make ZenML a local server without logins."""
    return {
        # This also stops ZenML from writing its configuration file.
        "ZENML_SERVER": "true",
        "ZENML_SERVER_AUTH_SCHEME": "NO_AUTH",
        "ZENML_SERVER_AUTO_ACTIVATE": "true",
        "ZENML_SERVER_DEPLOYMENT_TYPE": "local",
        "ZENML_SERVER_ALLOW_LOCAL_FILE_ACCESS": "true",
        # ZenML's default allows every origin. Without logins, any web site in the user's browser could read the runs.
        "ZENML_SERVER_CORS_ALLOW_ORIGINS": url,
        "ZENML_SERVER_DISPLAY_ANNOUNCEMENTS": "false",
        "ZENML_SERVER_DISPLAY_UPDATES": "false",
        "ZENML_ANALYTICS_OPT_IN": "false",
        "ZENML_LOGGING_VERBOSITY": "WARNING",
    }


def _skip_onboarding_survey() -> None:
    """Mark ZenML's onboarding survey as done. Otherwise, it covers every page of the dashboard."""
    from zenml.config.global_config import GlobalConfiguration
    from zenml.constants import DEFAULT_USERNAME, FINISHED_ONBOARDING_SURVEY_KEY
    from zenml.models import UserUpdate

    store = GlobalConfiguration().zen_store
    user = store.get_user(DEFAULT_USERNAME)
    if user.email_opted_in is None or not user.user_metadata.get(FINISHED_ONBOARDING_SURVEY_KEY):
        metadata = {**user.user_metadata, FINISHED_ONBOARDING_SURVEY_KEY: True}
        update = UserUpdate(email_opted_in=bool(user.email_opted_in), user_metadata=metadata)
        store.update_user(user.id, update)


def serve_app(app: Any, listener: socket.socket, shown: str, **settings: Any) -> None:
    """Serve an application on a bound socket until a signal ends it, and print `shown` when it answers.

    Raises:
        KeyboardInterrupt: SIGINT or SIGTERM ended the server.
        SystemExit: the server did not start; its log has the cause.
    """
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            print(f"{shown} (Ctrl-C ends it)", flush=True)

    # log_config=None: otherwise uvicorn would add its own handlers for the terminal.
    config = uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=2, **settings)
    Server(config).run(sockets=[listener])
