"""The command `watch`, which shows the curves of the runs that train on this machine, until Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tools.servers.serve import HOST, bind, serve_app

if TYPE_CHECKING:
    from markupsafe import Markup
    from starlette.applications import Starlette

    from llm_engineering.training.telemetry.live import LiveRun

# Seconds after which the browser loads the page again.
REFRESH_S = 5
_SHOWN = {
    "loss": "training loss",
    "eval_loss": "validation loss",
    "reward": "reward",
    "learning_rate": "learning rate",
    "tokens_per_second": "tokens a second",
}


def watch(
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port on 127.0.0.1.")] = 8238,
) -> int:
    """Show the curves of the runs that train on this machine in the browser, until Ctrl-C.

    The page loads itself again every five seconds. It shows loss, learning rate, speed and the remaining time of each run, and
    of the last run if none trains.

    Example: `llm-engineering watch --port 8301`
    """
    # Both signals end the server in the same way. SIGINT too, because a shell's background job starts with it ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    with socket.socket() as listener:
        bind(listener, port, "watch")
        from llm_engineering.recipe.settings import Settings

        app = build_app(Settings().llm_output_dir / "training")
        with contextlib.suppress(KeyboardInterrupt):
            serve_app(app, listener, f"Watching: http://{HOST}:{port}")
    return 0


def build_app(folder: Path) -> Starlette:
    """The server of the page about the runs in a folder. It answers only requests that name this machine as their host."""
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import HTMLResponse
    from starlette.routing import Route

    drawn: dict[str, str] = {}

    # Not async: a page takes a second to draw.
    def show(_: Request) -> HTMLResponse:
        found = runs(folder)
        state = repr([(run.folder, len(run.history), run.is_training) for run in found])
        if state not in drawn:
            drawn.clear()
            drawn[state] = watch_page(found)
        return HTMLResponse(drawn[state], headers={"Cache-Control": "no-store"})

    # Otherwise a web site whose name resolves to this machine could read the page.
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    return Starlette(routes=[Route("/", show)], middleware=[hosts])


def runs(folder: Path) -> list[LiveRun]:
    """The runs that train, newest first; if none does, the last run."""
    from llm_engineering.training.telemetry.live import LIVE_FILE, read_live

    files = sorted(folder.glob(f"*/{LIVE_FILE}"), key=lambda file: file.stat().st_mtime, reverse=True)
    found = [run for file in files if (run := read_live(file)) is not None]
    return [run for run in found if run.is_training] or found[:1]


def watch_page(found: list[LiveRun]) -> str:
    """The page about these runs."""
    from markupsafe import Markup

    from llm_engineering.reports.page import Verdict, cards, page, table
    from llm_engineering.reports.training_report import all_charts

    training = [run for run in found if run.is_training]
    lead = [_progress(run, run.stage) for run in training] or ["No run trains on this machine."]
    if found and not training:
        lead.append(_progress(found[0], f"The last run was {found[0].folder.name}"))
    sections: list[tuple[str, Markup]] = []
    for run in found:
        newest: dict[str, float] = {}
        for entry in run.history:
            newest |= {name: entry[key] for key, name in _SHOWN.items() if key in entry}
        body = cards(all_charts(run.history)) if run.history else Markup("")
        sections.append((run.folder.name, table(list(newest), [list(newest.values())] if newest else []) + body))
    verdict = Verdict("Training", "good") if training else Verdict("Nothing trains", "mixed")
    return page("Training now", lead, sections, verdict=verdict, refresh=REFRESH_S)


def _progress(run: LiveRun, name: str) -> str:
    from llm_engineering.progress import duration

    step = max((entry["step"] for entry in run.history), default=0)
    left = f", about {duration(run.seconds_left)} left" if run.is_training and run.seconds_left else ""
    return f"{name}: step {step:,} of {run.max_steps:,}{left}."
