"""Training counts its tokens, seconds and memory correctly."""

import resource
import sys
from types import SimpleNamespace

import pytest
import torch

from llm_engineering.training.telemetry.work import Work, peak_memory_bytes, peak_resident_bytes
from tests.conftest import ROOT


def test_rates_cover_the_work_between_two_states():
    work = Work(tokens=100, computed_tokens=100, flops=5.0)
    work.seconds.update(forward_backward=1.0, eval=9.0)
    before = work.copy()
    work.tokens, work.computed_tokens, work.flops = 160, 180, 45.0
    work.seconds["data"] += 0.5
    work.seconds["forward_backward"] += 1.0
    work.seconds["optimizer"] += 0.5
    assert work.rates(before, peak=40.0) == {"tokens_per_second": 30.0, "padding_share": 0.25, "mfu": 0.5}
    assert "mfu" not in work.rates(before, peak=None)
    assert work.rates(work.copy(), peak=None) == {}


def test_time_of_a_part_counts_even_if_it_fails():
    work = Work()
    with pytest.raises(ValueError, match="full"), work.timed("save"):
        raise ValueError("full")
    assert work.seconds["save"] > 0


def test_peak_memory_is_in_bytes_on_every_system(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=3_000_000))
    for platform, expected in (("linux", 3_000_000 * 1024), ("darwin", 3_000_000)):
        monkeypatch.setattr(sys, "platform", platform)
        assert peak_memory_bytes() == peak_resident_bytes() == expected


def test_only_the_helper_reads_the_systems_unit():
    """Other code would have to know that Linux counts in KiB and macOS in bytes."""
    packages = ("llm_engineering", "steps", "pipelines", "tools", "benchmarks")
    files = [file for package in packages for file in (ROOT / package).rglob("*.py")]
    assert [file.name for file in files if "ru_maxrss" in file.read_text(encoding="utf-8")] == ["work.py"]
