"""The commands in README and manual are those of the Makefile and of the command line, with their options."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tools.cli import command_line
from tools.make import TARGETS

MAKEFILE = (ROOT / "Makefile").read_text()
PAGES = ["README.md", *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md"))]
CODE = re.compile(r"^```\w*\n(.*?)^```|`([^`]+)`", re.M | re.S)
COMMAND = re.compile(r"\bmake ([a-z][a-z-]*)((?:\s+[A-Z]+=(?:\"[^\"]*\"|'[^']*'|[^\s`]+))*)")
LINK = re.compile(r"\]\(([^)\s]+)\)|\bsrc=\"([^\"]+)\"")
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
    return COMMAND.findall(code if page.endswith(".md") else text)


@pytest.mark.parametrize("page", [*PAGES, "examples/skypilot.yaml"])
def test_commands_are_those_of_the_makefile(page):
    found = commands(page)
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
    assert called.argument or not [one for one in arguments if one.required][filled:]
    assert not called.argument or arguments[filled:]


def test_commands_are_found():
    assert len(commands("README.md")) > 10
    assert len(commands("docs/tutorial.md")) > 10


def test_readme_is_two_screens_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    for markdown, html in LINK.findall(text):
        file, _, anchor = (markdown or html).partition("#")
        assert (ROOT / file).is_file(), f"README.md links {file}, which is not there"
        if anchor:
            titles = re.findall(r"^#+ (.+)$", (ROOT / file).read_text(), re.M)
            assert anchor in [re.sub(r"[^a-z0-9]+", "-", title.lower()) for title in titles], f"{file} has no #{anchor}"


def texts_of(module: Path) -> str:
    """Every text that a module's code holds, one a line; of a text with values in it, the parts between them."""
    tree = ast.parse(module.read_text())
    return "\n".join(
        node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


def test_symptoms_are_messages_of_the_code():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    symptoms = re.findall(r"^\| `([^`|]+)` \|", page, re.M)
    assert len(symptoms) > 30
    sources = [
        file for room in ("llm_engineering", "tools", "steps", "pipelines") for file in (ROOT / room).rglob("*.py")
    ]
    said = "\n".join([MAKEFILE, *map(texts_of, sources)])
    for symptom in symptoms:
        # An ellipsis stands for a value.
        for part in symptom.split("…"):
            assert part.strip(" .:,?") in said, f"no message says {part!r} ({symptom})"
