"""Processes killed at a file operation: a drawn sample of what the benchmark does at every one."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.integration.conftest import ROOT

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="the harness is compiled with a C compiler")


def figures(module, *arguments):
    """The figures that a module prints, its exit code and what it wrote to stderr."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", module, *arguments]
    ended = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert ended.stdout, ended.stderr
    return json.loads(ended.stdout), ended.returncode, ended.stderr


WORKS = "answers,decisions,snapshot,record,report,sft,export"


def test_a_drawn_sample_of_interruptions_loses_nothing():
    found, code, stderr = figures("benchmarks.file_kills", "--works", WORKS, "--draw", "12", "--seed", "7")
    assert (found["failures"], code) == ([], 0), stderr
    assert found["interrupted"] == found["survived"] == 12
    tried = found["interrupted_by"]
    assert {name for name in tried if name.startswith("fault")} == {
        f"fault {name}" for name in ("kill", "full", "back", "ahead")
    }
    assert len([name for name in tried if name.startswith("operation")]) >= 4
    # safetensors and the checkpoints' zip files are written by Rust and C++.
    assert found["operations_by_work_and_kind"]["sft"]["write"] > 50


def test_a_whole_run_that_is_killed_and_repeated_ends_as_if_nothing_had_happened():
    found, code, stderr = figures("benchmarks.file_kills", "--works", "run", "--draw", "3", "--seed", "7")
    assert (found["failures"], code) == ([], 0), stderr
    assert found["interrupted"] == found["survived"] == 3
    assert len([name for name in found["survived_by"] if name.startswith("operation")]) == 3
    # Arrow's files, the adapter, and the database.
    assert found["operations_by_work_and_kind"]["run"]["write"] > 1000


def test_careless_work_is_found():
    found, _, _ = figures("tests.integration.careless")
    told = {
        name: [line for line in found["failures"] if line.startswith(f"{name},")]
        for name in ("in_place", "orphan", "forgetful", "careful")
    }
    assert any("the second run fails: json.decoder.JSONDecodeError" in line for line in told["in_place"])
    assert any("other files" in line for line in told["orphan"])
    assert any("the second run repeats part" in line for line in told["forgetful"])
    assert told["careful"] == []
