"""Serve ZenML's dashboard over the current local store until Ctrl-C.

Usage: ``python -m tools.dashboard [--port 8237]``

``zenml login --local`` is not used: it points the client configuration at a
daemon, and every later run fails once that daemon has died. This runs the same
server in the foreground and leaves the client configuration as it is.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
from pathlib import Path

from llm_engineering.errors import RequestError
from tools.cli import exit_code

HOST = "127.0.0.1"
DEFAULT_PORT = 8237
LOG_LINES_SHOWN = 15


def server_environment(url: str) -> dict[str, str]:
    """Return the variables that make ZenML a local server without logins."""
    return {
        # Also what keeps ZenML from writing its configuration file.
        "ZENML_SERVER": "true",
        "ZENML_SERVER_AUTH_SCHEME": "NO_AUTH",
        "ZENML_SERVER_AUTO_ACTIVATE": "true",
        "ZENML_SERVER_DEPLOYMENT_TYPE": "local",
        "ZENML_SERVER_ALLOW_LOCAL_FILE_ACCESS": "true",
        # ZenML's default is every origin: without logins, any web site open
        # in the user's browser could read the runs.
        "ZENML_SERVER_CORS_ALLOW_ORIGINS": url,
        "ZENML_SERVER_DISPLAY_ANNOUNCEMENTS": "false",
        "ZENML_SERVER_DISPLAY_UPDATES": "false",
        "ZENML_ANALYTICS_OPT_IN": "false",
        "ZENML_LOGGING_VERBOSITY": "WARNING",
    }


def skip_onboarding_survey() -> None:
    """Mark the survey as done, which otherwise covers every dashboard page."""
    from zenml.config.global_config import GlobalConfiguration
    from zenml.constants import DEFAULT_USERNAME, FINISHED_ONBOARDING_SURVEY_KEY
    from zenml.models import UserUpdate

    store = GlobalConfiguration().zen_store
    user = store.get_user(DEFAULT_USERNAME)
    if user.email_opted_in is None or not user.user_metadata.get(FINISHED_ONBOARDING_SURVEY_KEY):
        metadata = {**user.user_metadata, FINISHED_ONBOARDING_SURVEY_KEY: True}
        update = UserUpdate(email_opted_in=bool(user.email_opted_in), user_metadata=metadata)
        store.update_user(user.id, update)


def serve(listener: socket.socket, url: str) -> None:
    """Run the server on a bound socket until a signal ends it.

    Raises:
        KeyboardInterrupt: When SIGINT or SIGTERM ended it.
        SystemExit: When its startup failed; its log says why.
    """
    import uvicorn
    from zenml.zen_server.zen_server_api import app

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            print(f"Dashboard: {url}/projects/default/runs (Ctrl-C ends it)", flush=True)

    # log_config: uvicorn would otherwise put its own console handlers back.
    config = uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=2)
    Server(config).run(sockets=[listener])


def main() -> int:
    """Parse the command line and serve; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.dashboard",
        description="Serve ZenML's dashboard over the current local store until Ctrl-C.",
    )
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help="default: %(default)s")
    port = parser.parse_args().port
    if not 0 < port < 65536:
        parser.error(f"--port must be from 1 to 65535, not {port}")
    return exit_code(lambda: _dashboard(port), debug=False)


def _dashboard(port: int) -> int:
    url = f"http://{HOST}:{port}"

    # Both end it the same way; a shell's background job starts with SIGINT ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    # Before the first import of zenml, which reads them once.
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
            # A restart would otherwise wait for the last connections to time out.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((HOST, port))
            except OSError as error:
                raise RequestError(
                    f"Port {port} cannot be used: {error.strerror}. Choose another one: make dashboard ARGS='--port N'."
                ) from error
            log = Path(configuration.config_directory) / "dashboard.log"
            log.parent.mkdir(parents=True, exist_ok=True)
            logging.basicConfig(filename=log, filemode="w", level=logging.WARNING, force=True)
            try:
                skip_onboarding_survey()
                serve(listener, url)
            except (Exception, SystemExit) as error:
                # Before a SystemExit uvicorn has logged the cause; its own trace would push that out.
                if not isinstance(error, SystemExit):
                    logging.exception("The dashboard's server failed.")
                tail = log.read_text().splitlines()[-LOG_LINES_SHOWN:]
                print(f"The dashboard's server failed; the end of {log}:", *tail, sep="\n", file=sys.stderr)
                return 1
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
