"""The command line: `llm-engineering COMMAND`, which is `python -m tools.cli COMMAND`.

COMMANDS lists every command. A command's module is imported only when the command is called, so `--help` and the error
for a wrong recipe take about a second. Import this module before ZenML: it sets the variables that ZenML reads.
"""

from __future__ import annotations

import errno
import importlib
import logging
import os
import re
import sqlite3
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

if sys.platform == "win32":
    sys.exit(
        "Error: this project does not run on Windows itself. Run it in WSL (wsl --install), where it runs as on Linux."
    )

# Set before these libraries are imported, because they read the variables during the import.
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
from llm_engineering.progress import LogHandler

PROGRAM = "llm-engineering"
PROJECT_ROOT = Path(__file__).resolve().parent.parent
DEFAULT_RECIPE = "configs/local.yaml"
# Help texts are docstrings. Markdown joins their lines and highlights code.
MARKUP: Literal["markdown"] = "markdown"

# Options that several commands have.
Config = Annotated[str, typer.Option("--config", metavar="FILE", help="The recipe file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one key of the recipe. Repeat the option for more keys."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on the last line of stdout.")]
Version = Annotated[
    str | None,
    typer.Option(
        "--version",
        metavar="N",
        help="Number of a model version. Default: the version in production; if there is none, the version in staging.",
    ),
]
VersionNumber = Annotated[
    str, typer.Argument(metavar="VERSION", help="Number of the model version, as `models list` shows it.")
]
Note = Annotated[str, typer.Option("--note", metavar="TEXT", help="The reason. It is saved with the version.")]


class Entry(NamedTuple):
    """A command: its name with the group before it, and its function as `module:function`."""

    name: str
    target: str

    @property
    def line(self) -> str:
        """The first line of the function's docstring, which is read without importing the module."""
        module, _, function = self.target.partition(":")
        source = Path(__file__).parent.joinpath(*module.split(".")).with_suffix(".py").read_text(encoding="utf-8")
        found = re.search(rf'^def {function}\(.*?^    """(.*?)$', source, re.MULTILINE | re.DOTALL)
        assert found is not None
        return found[1]


GROUPS = {
    "models": "List, promote, check, sign, delete, export, publish and deploy the versions of a recipe's model.",
    "schedule": "Retrain at fixed times, as a SageMaker job or with a timer on this machine.",
    "cloud": "Prepare an AWS account for SageMaker jobs.",
}

COMMANDS: dict[str, list[Entry]] = {
    "Run pipelines": [
        Entry("run", "run:run"),
        Entry("sweep", "sweeps.sweep:sweep"),
        Entry("runs", "results:runs"),
        Entry("dashboard", "servers.serve:dashboard"),
        Entry("watch", "servers.watch:watch"),
    ],
    "Datasets": [
        Entry("inspect", "dataset:inspect"),
        Entry("review", "servers.review:review"),
        Entry("push-dataset", "dataset:push_dataset"),
    ],
    "Models": [
        Entry("chat", "chat:chat"),
        Entry("compare", "chat:compare"),
        Entry("exam", "take_exam:exam"),
        Entry("serve", "servers.serve:serve"),
        Entry("models list", "model_versions.model_stages:list_versions"),
        Entry("models compare", "model_versions.comparison:compare"),
        Entry("models promote", "model_versions.model_stages:promote"),
        Entry("models rollback", "model_versions.model_stages:rollback"),
        Entry("models lineage", "model_versions.provenance:lineage"),
        Entry("models verify", "model_versions.provenance:verify"),
        Entry("models replay", "trust.replay:replay"),
        Entry("models evidence", "trust.evidence:evidence"),
        Entry("models sign", "model_versions.signatures:sign"),
        Entry("models delete", "model_versions.deletion:delete"),
        Entry("models export", "model_versions.handover:export"),
        Entry("models push", "model_versions.handover:push"),
        Entry("models deploy", "model_versions.deployment:deploy"),
        Entry("models undeploy", "model_versions.deployment:undeploy"),
    ],
    "Schedules and cloud": [
        Entry("schedule create", "scheduling.schedule:create"),
        Entry("schedule list", "scheduling.schedule:list_schedules"),
        Entry("schedule change", "scheduling.schedule:change"),
        Entry("schedule pause", "scheduling.schedule:pause"),
        Entry("schedule resume", "scheduling.schedule:resume"),
        Entry("schedule run", "scheduling.schedule:run_now"),
        Entry("schedule remove", "scheduling.schedule:remove"),
        Entry("cloud preflight", "aws:preflight"),
        Entry("cloud image", "aws:image"),
        Entry("cloud stack", "aws:stack"),
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
        # The commands inherit this setting.
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
    """A command with the option `--debug`. It prints an error as one sentence and returns an exit code."""

    def __init__(self, name: str | None, **settings: Any) -> None:
        super().__init__(name, **settings)
        self.params.append(get_command(_DEBUG).params[0])

    def invoke(self, ctx: Any) -> int:
        """Run the command; returns its exit code."""
        debug = ctx.params.pop("debug")
        start_logging(debug)
        return exit_code(lambda: super(Command, self).invoke(ctx), debug)


class Unloaded(TyperCommand):
    """A command before its module is imported: it has only a name and one line of help."""

    def __init__(self, name: str, entry: Entry, panel: str | None) -> None:
        super().__init__(name, help=entry.line, rich_help_panel=panel, rich_markup_mode=MARKUP)
        self.target = entry.target

    def load(self) -> Any:
        """Import the module; returns the command with the options of its function."""
        module, _, function = self.target.partition(":")
        alone = typer.Typer(add_completion=False, rich_markup_mode=MARKUP)
        alone.command(self.name, cls=Command)(getattr(importlib.import_module(f"tools.{module}"), function))
        return get_command(alone)


class Group(TyperGroup):
    """A group of commands, whose modules are imported when they are called."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Show the help if no command is given."""
        return super().parse_args(ctx, args if args or ctx.resilient_parsing else ["--help"])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command, and import its module."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, command.load() if isinstance(command, Unloaded) else command, rest


_DEBUG = typer.Typer(add_completion=False)


@_DEBUG.command()
def _debug(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    """A command with the option that `Command` adds to every command."""


def start_logging(debug: bool) -> None:
    """Write this project's log as plain lines to stderr, so that stdout contains only results."""
    handler = LogHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("llm_engineering")
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    logger.handlers = [handler]


def prepare_zenml() -> None:
    """Set ZenML's source root, and remove its log handler for the terminal.

    Without a source root, ZenML uses the folder of the script that runs. ZenML's other handler stays: it stores the
    log of each step for the dashboard.
    """
    from zenml.logger import ZenMLConsoleHandler
    from zenml.utils.source_utils import set_custom_source_root

    from tools.zenml_store import open_database

    open_database()
    set_custom_source_root(str(PROJECT_ROOT))
    root = logging.getLogger()
    for handler in [h for h in root.handlers if isinstance(h, ZenMLConsoleHandler)]:
        root.removeHandler(handler)


def exit_code(work: Callable[[], int], debug: bool) -> int:
    """Run a command, print an error as one sentence to stderr, and return the exit code."""
    try:
        return work()
    except (RequestError, WorkError) as error:
        if debug:
            traceback.print_exc()
        print(f"Error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("Interrupted. Finished work is saved: run the same command again to continue.", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:  # An unexpected error is printed with a hint how to see its traceback.
        if debug:
            traceback.print_exc()
        sentence = known_error(error)
        if sentence is not None:
            print(f"Error: {sentence}", file=sys.stderr)
            return 1
        hint = "" if debug else " Run the command again with --debug (ARGS=--debug) to see the traceback."
        print(f"Error: {type(error).__name__}: {error}{hint}", file=sys.stderr)
        return 1


_FULL = "Make room on this disk, then repeat the command: finished work is kept."
# What the system says at one of its limits, and the remedy.
_LIMITS = {
    os.strerror(errno.ENOSPC): _FULL,
    os.strerror(errno.EDQUOT): _FULL,
    os.strerror(
        errno.EMFILE
    ): "Raise the limit of open files (`ulimit -n 4096`), then repeat the command: finished work is kept.",
}
_DAMAGED = "The file is damaged. Replace it by a backup; `zenml status` names the file."
# What SQLite says of ZenML's database, and the remedy. The last one is for everything else.
_DATABASE = {
    "locked": "Another process holds it for too long. Wait until that process ends, then repeat the command.",
    "full": _FULL,
    "disk I/O": _FULL,
    "readonly": "Make the file and its folder writable for this user.",
    "malformed": _DAMAGED,
    "not a database": _DAMAGED,
    "corrupt": _DAMAGED,
    "": "Repeat the command with --debug to see where it failed; `zenml status` names the file.",
}


def known_error(error: BaseException) -> str | None:
    """A sentence for an error at a limit of the system or of ZenML's database, with the remedy; None for another error.

    The words are searched for in all causes, because libraries put them into errors of their own.
    """
    cause: BaseException | None = error
    while cause is not None:
        said, where, remedies = str(cause).rstrip("."), "", _LIMITS
        if isinstance(cause, sqlite3.Error):
            where, remedies = "ZenML's database refused a request: ", _DATABASE
        for words, remedy in remedies.items():
            if words in said:
                return f"{where}{said}. {remedy}"
        cause = cause.__cause__ or cause.__context__
    return None


if __name__ == "__main__":
    sys.exit(main())
