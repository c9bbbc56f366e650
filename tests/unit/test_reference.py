import subprocess
import sys

from tests.conftest import ROOT


def test_reference_pages_are_those_of_the_code():
    command = [sys.executable, "docs/reference/generate.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
