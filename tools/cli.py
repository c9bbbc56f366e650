"""What every command line tool shares: quiet libraries, plain log lines, exit codes. Import it before ZenML."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

# Before any of these libraries is imported: they read them then.
os.environ.setdefault("ZENML_ANALYTICS_OPT_IN", "false")
os.environ.setdefault("ZENML_LOGGING_VERBOSITY", "CRITICAL")
os.environ.setdefault("ZENML_ENABLE_RICH_TRACEBACK", "false")
os.environ.setdefault("COMET_DISABLE_AUTO_LOGGING", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TQDM_DISABLE", "" if sys.stderr.isatty() else "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

from llm_engineering.errors import INTERRUPTED, RequestError, WorkError

PROJECT_ROOT = Path(__file__).resolve().parent.parent


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that every tool for model versions has; the recipe says which model is meant."""
    parser.add_argument("--config", default="configs/local.yaml", help="the recipe (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")


def start_logging(debug: bool) -> None:
    """Plain lines on stderr for this project's log, so that stdout holds results alone."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("llm_engineering")
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    logger.addHandler(handler)


def prepare_zenml() -> None:
    """Tell ZenML where the sources are, and leave the terminal to this project's own log lines.

    Without the first, ZenML takes the folder of the tool that runs. ZenML's other handler, which keeps the log of
    each step for the dashboard, stays.
    """
    from zenml.logger import ZenMLConsoleHandler
    from zenml.utils.source_utils import set_custom_source_root

    set_custom_source_root(str(PROJECT_ROOT))
    root = logging.getLogger()
    for handler in [h for h in root.handlers if isinstance(h, ZenMLConsoleHandler)]:
        root.removeHandler(handler)


def exit_code(work: Callable[[], int], debug: bool) -> int:
    """Run a command; errors become a sentence on stderr and an exit code: 2 a wrong request, 1 failed work."""
    try:
        return work()
    except (RequestError, WorkError) as error:
        if debug:
            traceback.print_exc()
        print(f"Error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("Interrupted. What was finished is kept: the same command goes on from there.", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:  # The last line of defence: said aloud, with the way to see all of it.
        if debug:
            traceback.print_exc()
        hint = "" if debug else " Run again with --debug (ARGS=--debug) to see where."
        print(f"Error: {type(error).__name__}: {error}{hint}", file=sys.stderr)
        return 1
