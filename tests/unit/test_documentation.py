"""The commands in README and manual are those of the Makefile, with its variables and the tools' options."""

import ast
import re
from pathlib import Path

import pytest

from tests.conftest import ROOT

MAKEFILE = (ROOT / "Makefile").read_text()
PARTS = re.findall(r"^([A-Z]+) = (.*)$", MAKEFILE, re.M)
TOOLS = "".join(file.read_text() for file in sorted((ROOT / "tools").rglob("*.py")))
PAGES = ["README.md", *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md"))]
CODE = re.compile(r"^```\w*\n(.*?)^```|`([^`]+)`", re.M | re.S)
COMMAND = re.compile(r"\bmake ([a-z][a-z-]*)((?:\s+[A-Z]+=(?:\"[^\"]*\"|'[^']*'|[^\s`]+))*)")
LINK = re.compile(r"\]\(([^)\s]+)\)|\bsrc=\"([^\"]+)\"")


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


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_those_of_the_makefile(page):
    for target, given in commands(page):
        recipe = recipe_of(target)
        used = set(re.findall(r"\$\(?(?:if \$\()?\$?([A-Z]+)", recipe))
        for variable in re.findall(r"([A-Z]+)=", re.sub(r"\"[^\"]*\"", "", given)):
            assert variable in used, f"make {target} has no {variable}"
        for option in re.findall(r"--[a-z-]+", given):
            assert f'"{option}"' in TOOLS, f"no command has {option}"


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
