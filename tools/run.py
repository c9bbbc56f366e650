"""Runs a pipeline: python -m tools.run {sft,dpo,retrain,datasets} [--config FILE] [--set a.b=value] ..."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from typing import TYPE_CHECKING

from llm_engineering.recipe.loading import load_recipe
from tools.cli import exit_code, prepare_zenml, start_logging

if TYPE_CHECKING:
    from tools.scheduled import Scheduled

logger = logging.getLogger("llm_engineering.run")


def main() -> int:
    """Parse the command line and run; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.run", description="Run a pipeline of the chain.")
    parser.add_argument("pipeline", choices=("sft", "dpo", "retrain", "datasets"))
    parser.add_argument("--config", default="configs/local.yaml", help="the recipe (default: %(default)s)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override one key of the recipe"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the resolved recipe and what would run")
    parser.add_argument("--resume", metavar="RUN|last", help="go on with a run that failed or was interrupted")
    parser.add_argument(
        "--attach", metavar="JOB", help="follow this SageMaker job of the training step, instead of starting one"
    )
    parser.add_argument("--no-cache", action="store_true", help="run every step, also those with a cached result")
    parser.add_argument(
        "--scheduled",
        metavar="PLACE",
        help="a run of the schedule that is kept there (retrain only): ends at once if there is nothing new",
    )
    parser.add_argument("--json", action="store_true", help="end with one JSON object on stdout")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    arguments = parser.parse_args()
    if arguments.scheduled and (arguments.pipeline != "retrain" or arguments.dry_run or arguments.resume):
        parser.error("--scheduled goes with retrain alone, without --dry-run and --resume")
    start_logging(arguments.debug)
    if arguments.scheduled:
        from tools.scheduled import Scheduled

        return exit_code(
            lambda: Scheduled(arguments.scheduled).run(lambda scheduled: _run(arguments, scheduled)), arguments.debug
        )
    return exit_code(lambda: _run(arguments, None), arguments.debug)


def _run(arguments: argparse.Namespace, scheduled: Scheduled | None) -> int:
    started = time.monotonic()
    recipe = load_recipe(arguments.config, arguments.set)
    if arguments.dry_run:
        from tools.plan import print_plan

        print_plan(arguments.pipeline, recipe)
        return 0
    # Only now the slow imports: a wrong recipe is told at once.
    from tools.estimate import stages_of, warn_of_memory
    from tools.preflight import preflight

    if arguments.attach:
        from tools.attach import check_attachable

        check_attachable(arguments.attach, recipe, stages_of(arguments.pipeline))
    recipe, inputs = preflight(recipe)
    warn_of_memory(recipe, stages_of(arguments.pipeline))
    prepare_zenml()
    from tools import launch, summary

    if scheduled is not None and not scheduled.is_new(recipe, inputs):
        return scheduled.skip("no new data")
    if arguments.resume:
        launch.check_resumable(arguments.resume, arguments.pipeline, recipe)
    runs = launch.launch(arguments.pipeline, recipe, inputs, cache=not arguments.no_cache)
    if arguments.attach:
        from tools.attach import warn_if_unused

        warn_if_unused(arguments.attach)
    result = summary.collect(runs, time.monotonic() - started)
    if scheduled is not None:
        version = runs[-1].model_version
        scheduled.judged(result.run_id, version.number if version else None, result.promotion)
    summary.print_table(result, sys.stderr if arguments.json else sys.stdout)
    if arguments.json:
        print(json.dumps(result.as_json()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
