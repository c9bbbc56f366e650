"""The command line: help without slow imports, exit codes, and errors of one sentence."""

import importlib
import inspect
import json
import os
import subprocess
import sys

import pytest

from llm_engineering.errors import RequestError, WorkError
from tests.conftest import ROOT
from tools import cli

ENTRIES = [entry for entries in cli.COMMANDS.values() for entry in entries]
SLOW = ("torch", "transformers", "trl", "peft", "zenml", "pandas", "datasets", "matplotlib")
# Runs the command line once for each list of arguments; prints the exit codes and the imported slow libraries.
IMPORTED = f"""
import contextlib, io, json, sys
from tools.cli import main
ended = []
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ended.append(main(arguments))
print(json.dumps([ended, sorted(set({SLOW!r}) & sys.modules.keys())]))
"""


def imported_by(*calls: list[str]) -> tuple[list[int], list[str]]:
    command = [sys.executable, "-c", IMPORTED, json.dumps(calls)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return tuple(json.loads(done.stdout))


def test_no_help_imports_a_slow_library():
    calls = [
        [],
        ["--help"],
        *([*entry.name.split(), "--help"] for entry in ENTRIES),
        *([group] for group in cli.GROUPS),
    ]
    ended, imported = imported_by(*calls)
    assert ended == [0] * len(calls)
    assert imported == []


def test_a_wrong_recipe_is_refused_before_the_slow_imports():
    calls = [
        ["run", "sft", "--set", "sft.lerning_rate=1"],
        ["run", "cpt", "--set", "chain=[cpt]"],
        ["run", "sft", "--set", "chain=[sft,dpoo]"],
        ["chat", "--prompt", "Hi", "--config", "nowhere.yaml"],
        ["models", "promote", "1", "--set", "nothing=1"],
    ]
    assert imported_by(*calls) == ([2] * len(calls), [])


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_help_describes_a_command_and_shows_an_example(entry):
    module, _, function = entry.target.partition(":")
    text = inspect.getdoc(getattr(importlib.import_module(f"tools.{module}"), function))
    assert text.splitlines()[0] == entry.line
    assert f"Example: `llm-engineering {entry.name}" in text
    assert "Raises:" not in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["chatt"], "No such command 'chatt'. Did you mean 'chat'?"),
        (["models", "promot"], "Did you mean 'promote'?"),
        (
            ["run"],
            "Missing argument 'pipeline'. Choose from: cpt, sft, dpo, kto, reward, rloo, grpo, retrain, datasets.",
        ),
        (
            ["run", "sxt"],
            "'sxt' is not one of 'cpt', 'sft', 'dpo', 'kto', 'reward', 'rloo', 'grpo', 'retrain', 'datasets'.",
        ),
        (["run", "sft", "--confg", "a.yaml"], "--confg"),
        (["runs", "--limit", "0"], "--limit"),
        (["runs", "--limit", "many"], "--limit"),
        (["serve", "--port", "99999"], "--port"),
        (["compare"], "Missing option '--prompt'"),
        (["cloud", "image", "nothing"], "'nothing' is not one of 'training', 'retrain'"),
        (["run", "sft", "--scheduled", "here"], "--scheduled can only be used with retrain"),
        (["run", "retrain", "--scheduled", "here", "--dry-run"], "without --dry-run and --resume"),
        (
            ["chat", "--prompt", "Hi", "--max-new-tokens", "0"],
            "'--max-new-tokens': Input should be greater than or equal to 1",
        ),
        (["chat", "--prompt", "Hi", "--seed", "-1"], "'--seed': Input should be greater than or equal to 0"),
        (["compare", "--prompt", "Hi", "--best-of", "1"], "'--best-of': Input should be greater than or equal to 2"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_option_prints_one_line_and_exits_with_2(arguments, words, capsys):
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    assert words in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("raised", "code", "words"),
    [
        (RequestError("It is wrong."), 2, "Error: It is wrong."),
        (WorkError("It failed."), 1, "Error: It failed."),
        (KeyboardInterrupt(), 130, "run the same command again to continue"),
        (ValueError("unforeseen"), 1, "Error: ValueError: unforeseen Run the command again with --debug"),
        (
            OSError(28, "No space left on device", "a.bin"),
            1,
            "No space left on device: 'a.bin'. Make room on this disk",
        ),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 1, "Make room on this disk"),
        (OSError(24, "Too many open files"), 1, "Raise the limit of open files (`ulimit -n 4096`)"),
    ],
    ids=["request", "work", "interrupted", "unforeseen", "full", "full, wrapped", "open files"],
)
def test_exit_codes(raised, code, words, monkeypatch, capsys):
    def fail(*arguments):
        raise raised

    monkeypatch.setattr("tools.run.load_recipe", fail)
    assert cli.main(["run", "sft"]) == code
    assert words in capsys.readouterr().err
    assert cli.main(["run", "sft", "--debug"]) == code
    assert ("Traceback" in capsys.readouterr().err) is (code != 130)


def test_the_console_script_is_this_command_line():
    assert 'llm-engineering = "tools.cli:main"' in (ROOT / "pyproject.toml").read_text()
    command = [sys.executable, "-m", "tools.cli", "run", "sft", "--set", "sft.lerning_rate=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Did you mean `sft.learning_rate`?" in done.stderr


@pytest.mark.parametrize(("typed", "found"), [("models p", ["promote", "push"]), ("run ", ["sft", "dpo"])])
def test_the_shell_completes_commands_and_choices(typed, found):
    environment = os.environ | {
        "_LLM_ENGINEERING_COMPLETE": "complete_bash",
        "COMP_WORDS": f"llm-engineering {typed}",
        "COMP_CWORD": str(len(f"llm-engineering {typed}".split(" ")) - 1),
    }
    command = [sys.executable, "-m", "tools.cli"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert set(found) <= set(done.stdout.split()), done.stderr


def test_windows_is_named_at_the_start():
    code = "import sys; sys.platform = 'win32'; import tools.cli"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: this project does not run on Windows itself. Run it in WSL")
