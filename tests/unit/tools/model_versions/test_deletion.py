"""A deletion is confirmed on the terminal."""

import io

import pytest

from llm_engineering.errors import RequestError
from tools.model_versions.deletion import _confirmed


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("typed", "confirmed"), [("y\n", True), (" YES \n", True), ("\n", False), ("no\n", False)])
def test_only_yes_confirms_a_deletion(typed, confirmed, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", Terminal(typed))
    assert _confirmed("Delete tiny version 2?") is confirmed
    assert capsys.readouterr().out == "Delete tiny version 2? [y/N] "


def test_without_a_terminal_the_option_yes_is_named(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    with pytest.raises(RequestError, match=r"Delete tiny version 2\? There is no terminal to ask on. Add --yes"):
        _confirmed("Delete tiny version 2?")
