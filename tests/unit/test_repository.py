"""The version stands in pyproject.toml and whatever repeats it agrees; `.ci/release` tags nothing that is not ready."""

import datetime
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT

VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
RELEASE_FILES = (".ci/release", "pyproject.toml", "CITATION.cff", "CHANGELOG.md")


def test_citation_has_the_version_and_licence_of_the_project():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == VERSION
    assert citation["license"] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"]


def test_no_module_repeats_the_version():
    for package in ("llm_engineering", "steps", "pipelines", "tools"):
        for module in (ROOT / package).rglob("*.py"):
            assert not re.search(r"__version__\s*=", module.read_text()), f"{module} has a version of its own"


def test_changelog_begins_with_unreleased_and_lists_versions_newest_first():
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[0] == "[Unreleased]"
    releases = [re.fullmatch(r"\[(\d+)\.(\d+)\.(\d+)\] - (\d{4}-\d\d-\d\d)", heading) for heading in headings[1:]]
    assert all(releases), headings
    versions = [tuple(map(int, release.groups()[:3])) for release in releases]
    days = [datetime.date.fromisoformat(release[4]) for release in releases]
    assert versions == sorted(set(versions), reverse=True)
    assert days == sorted(days, reverse=True)


def git(clone: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=Test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", *identity, *arguments], cwd=clone, check=True, capture_output=True, text=True)
    return done.stdout


@pytest.fixture
def clone(tmp_path, monkeypatch) -> Path:
    """A clone of a repository with the files that a release reads."""
    # A person's own settings, e.g. signed tags, are not those of the test.
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "Test")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "test@example.org")
    origin = tmp_path / "origin"
    for name in RELEASE_FILES:
        (origin / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, origin / name)
    git(origin, "init", "--quiet")
    git(origin, "add", ".")
    git(origin, "commit", "--quiet", "--message", "Add the files of a release")
    git(tmp_path, "clone", "--quiet", str(origin), "clone")
    return tmp_path / "clone"


def release(clone: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", ".ci/release", *options], cwd=clone, capture_output=True, text=True)


def change(clone: Path, file: str, old: str, new: str) -> None:
    text = (clone / file).read_text()
    assert old in text
    (clone / file).write_text(text.replace(old, new))
    git(clone, "commit", "--quiet", "--all", "--message", f"Change {file}")


def test_dry_run_says_what_it_would_tag_and_tags_nothing(clone):
    done = release(clone, "--dry-run", "--skip-checks")
    assert done.returncode == 0, done.stderr
    assert f"Would tag {git(clone, 'rev-parse', '--short', 'HEAD').strip()} as v{VERSION}" in done.stdout
    assert "### Added" in done.stdout
    assert "[Unreleased]" not in done.stdout
    assert ".ci/run" not in done.stdout
    assert "Would run .ci/run." in release(clone, "--dry-run").stdout
    assert not git(clone, "tag")


def test_release_makes_an_annotated_tag_with_the_section_of_the_changelog(clone):
    done = release(clone, "--skip-checks")
    assert done.returncode == 0, done.stderr
    assert git(clone, "cat-file", "-t", f"v{VERSION}").strip() == "tag"
    message = git(clone, "tag", "--list", "--format=%(contents)", f"v{VERSION}")
    assert message.startswith(f"llm-engineering {VERSION}\n")
    assert "### Added" in message
    again = release(clone, "--skip-checks")
    assert again.returncode == 2
    assert f"tag v{VERSION} already exists" in again.stderr


def test_failed_checks_leave_no_tag(clone):
    (clone / ".ci" / "run").write_text("#!/bin/sh\nexit 3\n")
    (clone / ".ci" / "run").chmod(0o755)
    git(clone, "add", ".ci/run")
    git(clone, "commit", "--quiet", "--message", "Add checks that fail")
    done = release(clone)
    assert done.returncode == 1
    assert ".ci/run failed" in done.stderr
    assert not git(clone, "tag")


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("pyproject.toml", f'version = "{VERSION}"', 'version = "0.1"', "three numbers"),
        ("CITATION.cff", f"version: {VERSION}", "version: 9.9.9", "CITATION.cff has the version '9.9.9'"),
        ("CHANGELOG.md", f"## [{VERSION}] - ", f"## [{VERSION}] ", f"no section '## [{VERSION}] - YYYY-MM-DD'"),
        ("CHANGELOG.md", f"## [{VERSION}] - ", f"## [{VERSION}] - 2000-01-01\n\n## [0.0.1] - ", "is empty"),
    ],
)
def test_release_refuses_versions_that_do_not_agree(clone, file, old, new, message):
    change(clone, file, old, new)
    done = release(clone, "--dry-run", "--skip-checks")
    assert done.returncode == 2
    assert message in done.stderr
    assert not done.stdout


def test_release_refuses_a_tree_with_changes(clone):
    (clone / "new.txt").write_text("not committed")
    done = release(clone, "--dry-run", "--skip-checks")
    assert done.returncode == 2
    assert "uncommitted changes" in done.stderr


def test_release_refuses_an_unknown_option(clone):
    done = release(clone, "--dry-run", "--force")
    assert done.returncode == 2
    assert "--force is not an option" in done.stderr
