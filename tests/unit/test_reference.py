import runpy
import sys

import pytest

from tests.conftest import ROOT


def test_reference_pages_are_those_of_the_code(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["generate.py", "--check"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "docs" / "reference" / "generate.py"), run_name="__main__")
    assert ended.value.code == 0
