"""The commands in README and tutorial are those of the Makefile, with its variables and the commands' options."""

import re
from typing import Any

import pytest

from tests.conftest import ROOT
from tools.cli import command_line
from tools.make import TARGETS

MAKEFILE = (ROOT / "Makefile").read_text()
CODE = re.compile(r"^```\w*\n(.*?)^```|`([^`]+)`", re.M | re.S)
COMMAND = re.compile(r"\bmake ([a-z][a-z-]*)((?:\s+[A-Z]+=(?:\"[^\"]*\"|'[^']*'|[^\s`]+))*)")
# Read by AWS's tools, and passed on by make like every variable.
ELSEWHERE = {"ARGS", "AWS_REGION"}


def loaded(words: str) -> Any:
    """A command of the command line, its options among it."""
    found: Any = command_line()
    for word in words.split():
        if hasattr(found, "commands"):
            found = found.commands[word]
    return found.load()


def commands(page: str) -> list[tuple[str, str]]:
    text = (ROOT / page).read_text()
    code = "\n".join(block or span for block, span in CODE.findall(text))
    return COMMAND.findall(code)


@pytest.mark.parametrize("page", ["README.md", "docs/tutorial.md"])
def test_commands_are_those_of_the_makefile(page):
    found = commands(page)
    assert len(found) > 10
    for target, given in found:
        assert re.search(rf"^{target}:", MAKEFILE, re.M), f"there is no make {target}"
        if target not in TARGETS:
            assert re.sub(r"ARGS=.*|PYTHON=.*", "", given).strip() == "", f"make {target} has no variables"
            continue
        called = TARGETS[target]
        for variable in re.findall(r"([A-Z]+)=", re.sub(r"\"[^\"]*\"", "", given)):
            assert variable in {*called.options, called.argument, *ELSEWHERE}, f"make {target} has no {variable}"
        options = {option for parameter in loaded(called.command).params for option in parameter.opts}
        for option in re.findall(r"--[a-z-]+", given):
            assert option in options, f"make {target} has no {option}"


def test_each_target_has_its_line_in_the_makefile():
    named = re.search(r"^COMMANDS := (.*?)\n\n", MAKEFILE, re.M | re.S)[1].replace("\\\n", " ").split()
    assert set(named) | {"stack-aws"} == set(TARGETS)
    for target in TARGETS:
        assert re.search(rf"^{target}:.*## .+", MAKEFILE, re.M), f"make does not list {target}"


@pytest.mark.parametrize("target", TARGETS)
def test_each_target_calls_a_command_that_takes_its_variables(target):
    called = TARGETS[target]
    command = loaded(called.command)
    options = {option for parameter in command.params for option in parameter.opts}
    assert {f"--{name.lower()}" for name in called.options} <= options
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    # Those that the target's own words fill are required as well: `run sft`.
    filled = len(called.command.split()) - len(re.sub(r" (sft|dpo|retrain|datasets)$", "", called.command).split())
    assert bool(called.argument) == bool([one for one in arguments if one.required][filled:])
