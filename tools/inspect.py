"""Reports on a dataset file without training: python -m tools.inspect FILE [--against EVAL_FILE] [--json]"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

from llm_engineering.errors import RequestError
from llm_engineering.recipe.loading import load_recipe
from tools.cli import exit_code, start_logging

logger = logging.getLogger("llm_engineering.inspect")


def main() -> int:
    """Print the report; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.inspect", description="Report on a dataset file.")
    parser.add_argument("file", help="a file, a folder that datasets saved, or a hub id; #split chooses a split")
    parser.add_argument("--against", metavar="EVAL_FILE", help="look for its rows in FILE")
    parser.add_argument("--config", default="configs/local.yaml", help="the recipe (default: %(default)s)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override one key of the recipe"
    )
    parser.add_argument("--json", action="store_true", help="end with one JSON object on stdout")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    arguments = parser.parse_args()
    start_logging(arguments.debug)
    return exit_code(lambda: _inspect(arguments), arguments.debug)


def _inspect(arguments: argparse.Namespace) -> int:
    if arguments.file in ("", "."):
        raise RequestError("There is no file to inspect. Name one: make inspect DATA=rows.jsonl")
    recipe = load_recipe(arguments.config, arguments.set)

    from llm_engineering.models.loading import pin_revision
    from llm_engineering.models.tokenizer import load_tokenizer
    from llm_engineering.recipe.settings import Settings
    from llm_engineering.reports.data_report import inspect_file

    settings = Settings()
    settings.check_writable()
    tokenizer = load_tokenizer(pin_revision(recipe.model), settings, recipe.formatting.chat_template)
    folder = settings.llm_output_dir / "inspect" / Path(arguments.file).name.partition(".")[0]
    report = inspect_file(arguments.file, arguments.against, tokenizer, recipe.data, recipe.formatting, folder)
    _print(report, folder)
    if arguments.json:
        print(json.dumps(report))
    return 0


def _print(report: dict[str, Any], folder: Path) -> None:
    logger.info("Format:            %s", report["format"])
    logger.info("Rows:              %d read, %d kept", report["rows"], report["kept"])
    for reason, count in report["quarantined"].items():
        logger.info("  set aside:       %d %s", count, reason)
    logger.info("Exact duplicates:  %d", report["exact_duplicates"])
    logger.info("Near duplicates:   %d", report["near_duplicates"])
    for rule, count in report["findings"].items():
        logger.info("  kept, but:       %d %s", count, rule)
    logger.info("Leaked into test:  %d", report["leaked_into_test"])
    logger.info("Tokens:            %s", ", ".join(f"{name} {value:g}" for name, value in report["tokens"].items()))
    logger.info("Report:            %s", folder / "report.html")
    logger.info("%s", "Fit to train on." if report["fit_to_train"] else f"Not fit to train on: {report['why']}.")


if __name__ == "__main__":
    sys.exit(main())
