"""The command line: `llm-engineering COMMAND`, which is `python -m tools.cli COMMAND`.

COMMANDS lists every command. The module of a command is imported when the command is called, so that help and the
refusal of a wrong recipe take about a second. Import this module before ZenML: it sets the variables that ZenML reads.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

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

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from llm_engineering.errors import INTERRUPTED, RequestError, WorkError

PROGRAM = "llm-engineering"
PROJECT_ROOT = Path(__file__).resolve().parent.parent
DEFAULT_RECIPE = "configs/local.yaml"
# Help texts are docstrings: Markdown joins their lines and sets code apart.
MARKUP: Literal["markdown"] = "markdown"

# Options that several commands have.
Config = Annotated[str, typer.Option("--config", metavar="FILE", help="The recipe.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one key of the recipe. May be given several times."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on the last line of stdout.")]
Version = Annotated[
    str | None,
    typer.Option("--version", metavar="N", help="A model version. Default: the one in production, else in staging."),
]
VersionNumber = Annotated[str, typer.Argument(metavar="VERSION", help="Its number, as `models list` shows it.")]
Note = Annotated[str, typer.Option("--note", metavar="TEXT", help="Why. The note is kept with the version.")]


class Entry(NamedTuple):
    """A command: its name (with its group's in front), the module and function behind it, and what it does."""

    name: str
    target: str
    line: str


GROUPS = {
    "models": "List, promote, check and hand over the versions of a recipe's model.",
    "schedule": "Retrain at fixed times, as a SageMaker job or by a timer of this machine.",
    "cloud": "Prepare an AWS account for SageMaker jobs.",
}

COMMANDS: dict[str, list[Entry]] = {
    "Run pipelines": [
        Entry("run", "run:run", "Run a pipeline: sft, dpo, retrain or datasets."),
        Entry("runs", "results:runs", "List the last runs."),
        Entry("dashboard", "serve:dashboard", "Serve ZenML's dashboard on this machine until Ctrl-C."),
    ],
    "Datasets": [
        Entry("inspect", "dataset:inspect", "Report on a dataset file without training on it."),
        Entry("push-dataset", "dataset:push_dataset", "Publish a dataset of the last run on the Hugging Face Hub."),
    ],
    "Models": [
        Entry("chat", "chat:chat", "Talk to the promoted model."),
        Entry("compare", "chat:compare", "Ask the base model and the trained models the same question."),
        Entry("serve", "serve:serve", "Serve a model OpenAI-compatibly on this machine until Ctrl-C."),
        Entry("models list", "model_stages:list_versions", "List the versions of a model."),
        Entry("models promote", "model_stages:promote", "Move a model version to production."),
        Entry("models rollback", "model_stages:rollback", "Put the former production version back."),
        Entry("models lineage", "provenance:lineage", "Show where a model version comes from, with hashes."),
        Entry("models verify", "provenance:verify", "Compare the files of a model version with what was recorded."),
        Entry("models export", "handover:export", "Merge, verify and register a model, and write its files."),
        Entry("models push", "handover:push", "Publish a merged, verified model on the Hugging Face Hub."),
    ],
    "Schedules and cloud": [
        Entry("schedule create", "schedule:create", "Make a schedule."),
        Entry("schedule list", "schedule:list_schedules", "List schedules with their next and last runs."),
        Entry("schedule change", "schedule:change", "Change the time or the recipe of a schedule."),
        Entry("schedule pause", "schedule:pause", "Pause a schedule: it fires no more."),
        Entry("schedule resume", "schedule:resume", "Resume a paused schedule."),
        Entry("schedule run", "schedule:run_now", "Start now what a schedule starts."),
        Entry("schedule remove", "schedule:remove", "Remove a schedule with everything that it made."),
        Entry("cloud preflight", "aws:preflight", "Check what a SageMaker job of a recipe needs."),
        Entry("cloud image", "aws:image", "Build the images of SageMaker jobs and push them to ECR."),
        Entry("cloud stack", "aws:stack", "Register a ZenML stack that keeps artifacts in S3."),
    ],
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code: 0 done, 1 failed work, 2 a wrong request, 130 interrupted."""
    try:
        ended = command_line()(args=arguments, prog_name=PROGRAM, standalone_mode=False)
    except typer.TyperException as error:
        # Some of Typer's messages have several lines, some a prefix of pydantic's.
        message = " ".join(error.format_message().split()).replace("Value error, ", "")
        command = getattr(getattr(error, "ctx", None), "command_path", PROGRAM)
        end = "" if message.endswith((".", "?")) else "."
        print(f"Error: {message}{end} `{command} --help` explains the options.", file=sys.stderr)
        return error.exit_code
    return ended or 0


def command_line() -> TyperGroup:
    """The commands of COMMANDS as one Typer application."""
    application = typer.Typer(
        cls=Group,
        rich_markup_mode=MARKUP,
        # The commands inherit it.
        context_settings={"help_option_names": ["--help", "-h"]},
        help="From documents to a fine-tuned, evaluated and promoted language model.\n\n"
        f"Begin with `{PROGRAM} run sft`, then ask the model with `{PROGRAM} chat`.",
    )
    application.callback()(lambda: None)
    root = get_command(application)
    assert isinstance(root, TyperGroup)
    for panel, entries in COMMANDS.items():
        for entry in entries:
            group, _, name = entry.name.rpartition(" ")
            if not group:
                root.add_command(Unloaded(name, entry, panel))
                continue
            if group not in root.commands:
                root.add_command(Group(name=group, help=GROUPS[group], rich_help_panel=panel, rich_markup_mode=MARKUP))
            parent = root.commands[group]
            assert isinstance(parent, TyperGroup)
            parent.add_command(Unloaded(name, entry, None))
    return root


class Command(TyperCommand):
    """A command with `--debug`, whose errors become a sentence and an exit code."""

    def __init__(self, name: str | None, **settings: Any) -> None:
        super().__init__(name, **settings)
        self.params.append(get_command(_DEBUG).params[0])

    def invoke(self, ctx: Any) -> int:
        """Run it."""
        debug = ctx.params.pop("debug")
        start_logging(debug)
        return exit_code(lambda: super(Command, self).invoke(ctx), debug)


class Unloaded(TyperCommand):
    """A command whose module is not imported: it has a name and one line of help."""

    def __init__(self, name: str, entry: Entry, panel: str | None) -> None:
        super().__init__(name, help=entry.line, rich_help_panel=panel, rich_markup_mode=MARKUP)
        self.target = entry.target

    def load(self) -> Any:
        """The command itself; its options are those of its function."""
        module, _, function = self.target.partition(":")
        alone = typer.Typer(add_completion=False, rich_markup_mode=MARKUP)
        alone.command(self.name, cls=Command)(getattr(importlib.import_module(f"tools.{module}"), function))
        return get_command(alone)


class Group(TyperGroup):
    """Commands that are loaded when they are called. Without a command, it shows its help."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take no command as a wish for help."""
        return super().parse_args(ctx, args if args or ctx.resilient_parsing else ["--help"])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command, and load it."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, command.load() if isinstance(command, Unloaded) else command, rest


_DEBUG = typer.Typer(add_completion=False)


@_DEBUG.command()
def _debug(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    """Holds the option that every command has."""


def start_logging(debug: bool) -> None:
    """Plain lines on stderr for this project's log, so that stdout holds results alone."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("llm_engineering")
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    logger.handlers = [handler]


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


if __name__ == "__main__":
    sys.exit(main())
