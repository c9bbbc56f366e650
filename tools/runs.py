"""Lists the last runs: python -m tools.runs [--limit N]"""

from __future__ import annotations

import argparse
import sys

from rich.console import Console
from rich.table import Table

from tools.cli import exit_code, prepare_zenml, start_logging


def main() -> int:
    """Print the table; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.runs", description="List the last runs.")
    parser.add_argument("--limit", type=int, default=10, help="how many (default: %(default)s)")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    arguments = parser.parse_args()
    if arguments.limit < 1:
        parser.error(f"--limit must be at least 1, not {arguments.limit}")
    start_logging(arguments.debug)
    return exit_code(lambda: _list(arguments.limit), arguments.debug)


def _list(limit: int) -> int:
    from zenml.client import Client

    prepare_zenml()
    from tools.processes import KILLED, repair_killed

    repair_killed()
    runs = Client().list_pipeline_runs(sort_by="desc:created", size=limit, hydrate=True).items
    if not runs:
        print("No run yet. `make run-sft` makes the first one.")
        return 0
    table = Table("Run", "Pipeline", "State", "Started (UTC)", "Seconds", "Model", "Id")
    for run in runs:
        killed = (run.get_body().status_reason or "").startswith(KILLED)
        # When a killed run ended is not known.
        seconds = (
            f"{(run.end_time - run.start_time).total_seconds():.0f}"
            if run.end_time and run.start_time and not killed
            else ""
        )
        version = run.model_version
        table.add_row(
            run.name,
            run.pipeline.name if run.pipeline else "",
            f"{run.status} ({KILLED})" if killed else str(run.status),
            f"{run.start_time:%Y-%m-%d %H:%M}" if run.start_time else "",
            seconds,
            f"{version.model.name} {version.number} {version.stage or ''}".strip() if version else "",
            str(run.id),
        )
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
