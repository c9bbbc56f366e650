"""The commands in README and tutorial are those of the Makefile, with its variables and the tools' options."""

import re

import pytest

from tests.conftest import ROOT

MAKEFILE = (ROOT / "Makefile").read_text()
PARTS = re.findall(r"^([A-Z]+) = (.*)$", MAKEFILE, re.M)
CODE = re.compile(r"^```\w*\n(.*?)^```|`([^`]+)`", re.M | re.S)
COMMAND = re.compile(r"\bmake ([a-z][a-z-]*)((?:\s+[A-Z]+=(?:\"[^\"]*\"|'[^']*'|[^\s`]+))*)")


def recipe_of(target: str) -> str:
    found = re.search(rf"^{target}:.*\n((?:\t.*\n)*)", MAKEFILE, re.M)
    assert found, f"there is no make {target}"
    recipe = found[1]
    # The last first: a part may name those above it.
    for name, text in reversed(PARTS):
        recipe = recipe.replace(f"$({name})", text)
    return recipe


def commands(page: str) -> list[tuple[str, str]]:
    text = (ROOT / page).read_text()
    code = "\n".join(block or span for block, span in CODE.findall(text))
    return COMMAND.findall(code)


@pytest.mark.parametrize("page", ["README.md", "docs/tutorial.md"])
def test_commands_are_those_of_the_makefile(page):
    found = commands(page)
    assert len(found) > 10
    for target, given in found:
        recipe = recipe_of(target)
        used = set(re.findall(r"\$\(?(?:if \$\()?\$?([A-Z]+)", recipe))
        for variable in re.findall(r"([A-Z]+)=", re.sub(r"\"[^\"]*\"", "", given)):
            assert variable in used, f"make {target} has no {variable}"
        tools = re.findall(r"-m tools\.(\w+)", recipe)
        options = (ROOT / "tools" / "cli.py").read_text() + "".join(
            (ROOT / "tools" / f"{tool}.py").read_text() for tool in tools
        )
        for option in re.findall(r"--[a-z-]+", given):
            assert f'"{option}"' in options, f"make {target} has no {option}"
