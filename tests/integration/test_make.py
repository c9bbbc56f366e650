"""Values of make's variables reach the command unchanged: they are not expanded, split or executed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llm_engineering.errors import RequestError
from tests.conftest import ROOT
from tools.make import TARGETS, command, extra

VALUES = [
    "costs $5",
    "$(shell touch X)",
    "$$HOME $HOME ${HOME}",
    "`touch X`",
    "$(touch X)",
    '"; touch X; "',
    "'; touch X; '",
    "'",
    "a'b\"c",
    "*",
    "\\",
    "ends with \\",
    "-x",
    "--help",
    "Größe – 長さ ✓",
    "# no comment",
    "two  spaces",
    "a=b",
    "%s %",
    "",
]
VARIABLES = sorted({name for target in TARGETS.values() for name in (*target.options, target.argument) if name})
# A replacement for .venv/bin/python: writes its arguments and its environment to two files for each target.
PYTHON = '#!/bin/sh\nprintf "%s\\n" "$@" > "$RECORD/$3.arguments"\nenv -0 > "$RECORD/$3.environment"\n'


class Invocation:
    """The arguments and the environment of the command that a target of make started."""

    def __init__(self, folder: Path, target: str) -> None:
        self.arguments = (folder / f"{target}.arguments").read_text().splitlines()
        pairs = (folder / f"{target}.environment").read_bytes().decode().rstrip("\0").split("\0")
        self.environment = dict(pair.split("=", 1) for pair in pairs)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with the Makefile and a complete `.venv`."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("requirements.lock", "pyproject.toml"):
        (tmp_path / name).touch()
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
    (tmp_path / ".venv" / "ready").touch()
    (tmp_path / ".venv" / "ready-dev").touch()
    (tmp_path / "recorded").mkdir()
    return tmp_path


def make(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    names = {*VARIABLES, "ARGS", "MAKEFLAGS", "MAKELEVEL"}
    env = {name: value for name, value in os.environ.items() if name not in names}
    env |= {"RECORD": str(folder / "recorded"), **environment}
    done = subprocess.run(["make", *words], cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("value", VALUES)
def test_every_variable_of_every_target_arrives_unchanged(folder, value):
    before = sorted(folder.iterdir())
    done = make(folder, *TARGETS, *(f"{name}={value}" for name in VARIABLES))
    assert sorted(folder.iterdir()) == before
    assert done.stdout == ""
    for target, called in TARGETS.items():
        invocation = Invocation(folder / "recorded", target)
        assert invocation.arguments == ["-m", "tools.make", target]
        words = called.command.split()
        options = [f"--{name.lower()}={value}" for name in called.options]
        argument = ["--", *(value.split() if called.words else [value])] if called.argument else []
        assert command(target, invocation.environment) == [*words, *options, *argument]


@pytest.mark.parametrize("value", VALUES)
def test_args_reach_every_target_unchanged(folder, value):
    targets = [*TARGETS, "test"]
    before = sorted(folder.iterdir())
    make(folder, *targets, f"ARGS={value}")
    assert sorted(folder.iterdir()) == before
    for target in targets:
        assert Invocation(folder / "recorded", target).environment["ARGS"] == value


def test_args_are_split_as_by_a_shell_without_expansion():
    def words(text: str) -> list[str]:
        return list(extra({"MAKE_GIVEN": "ARGS", "ARGS": text}))

    assert words("--set a.b='c d' --json") == ["--set", "a.b=c d", "--json"]
    assert words('--prompt "a \\"b\\" $5 `ls` *" # c') == ["--prompt", 'a "b" $5 `ls` *', "#", "c"]
    for text in ("'", 'a "b', "a \\"):
        with pytest.raises(RequestError, match="cannot be split into words"):
            words(text)


def test_only_config_and_args_are_read_from_the_environment(folder):
    own = dict.fromkeys(VARIABLES, "of the environment") | {"CONFIG": "$(shell touch X)", "ARGS": "--json"}
    make(folder, *TARGETS, **own)
    assert not (folder / "X").exists()
    for target, called in TARGETS.items():
        config = ["--config=$(shell touch X)"] if "CONFIG" in called.options else []
        # A target that takes several words has none without its variable.
        default = called.default.split() if called.words else [called.default]
        argument = ["--", *default] if called.argument else []
        found = command(target, Invocation(folder / "recorded", target).environment)
        assert found == [*called.command.split(), *config, "--json", *argument]
    # A variable on the command line takes precedence.
    make(folder, "run-sft", "CONFIG=mine.yaml", **own)
    assert command("run-sft", Invocation(folder / "recorded", "run-sft").environment)[2:] == [
        "--config=mine.yaml",
        "--json",
    ]


def test_without_variables_the_commands_have_their_own_defaults(folder):
    make(folder, *TARGETS, CONFIG="", ARGS="")
    for target, called in TARGETS.items():
        # A target that takes several words has none without its variable.
        default = called.default.split() if called.words else [called.default]
        argument = ["--", *default] if called.argument else []
        assert command(target, Invocation(folder / "recorded", target).environment) == [
            *called.command.split(),
            *argument,
        ]


def test_make_without_a_target_lists_all_targets_by_group(folder):
    listed = make(folder).stdout
    groups = ["Run pipelines", "Datasets", "Models", "Schedules", "Cloud", "Develop"]
    assert [line for line in listed.splitlines() if line and not line.startswith(" ")] == groups
    for target in (*TARGETS, "setup", "test", "lint", "format", "docs", "bench", "lock", "clean"):
        assert f"  make {target} " in listed


def test_a_value_reaches_the_command_and_its_error_reaches_the_user(folder):
    """With the real Python, tools.make and the command line."""
    python = folder / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\ncd "{ROOT}" && exec "{sys.executable}" "$@"\n')
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    for words, message in (
        (["chat", "PROMPT= "], "The question is empty."),
        (["compare", "PROMPT=-x", "CONFIG=$(shell touch X)"], "There is no recipe file $(shell touch X)"),
        (["export", "FORMAT=`touch X`"], "'`touch X`' is not one of 'safetensors', 'gguf', 'gguf-lora'"),
        (["export", "FORMAT=gguf", "QUANT=Q4"], "'Q4' is not one of 'Q2_K', 'Q3_K_S'"),
        (["export", "QUANT=Q8_0"], "QUANT=Q8_0 needs FORMAT=gguf"),
        (["export", "QUANT=FP8"], "QUANT=FP8 is written as safetensors to a new folder"),
        (["push-dataset", "KIND=-x"], "'-x' is not one of 'instruction', 'preference'"),
        (["runs", "ARGS='"], "ARGS ' cannot be split into words: No closing quotation."),
    ):
        done = subprocess.run(["make", *words], cwd=folder, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert done.stderr.startswith("Error: ")
        assert message in done.stderr
    assert not (folder / "X").exists()
    assert not (ROOT / "X").exists()
