"""The comparison with a peer, run with a fake peer: its input, and the rates computed from its time."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import peer_preprocessing
from tests.conftest import ROOT

# Prints the same JSON as the driver, and marks its cache folder as used.
FAKE = """
import json, os, sys
from pathlib import Path
folder, tokenizer, workers, max_length = sys.argv[1:]
cache = Path(os.environ["HF_HOME"])
fresh = not any(cache.iterdir())
(cache / "used").touch()
rows = [json.loads(line) for line in (Path(folder) / "rows.jsonl").open()]
print("some log line")
print(json.dumps({"seconds": 2.0 / int(workers), "rows_out": len(rows), "tokens": 7, "fresh": fresh}))
"""


@pytest.fixture
def fake_driver(monkeypatch, tmp_path):
    driver = tmp_path / "driver.py"
    driver.write_text(FAKE)
    monkeypatch.setattr(peer_preprocessing, "DRIVER", driver)
    monkeypatch.setattr(peer_preprocessing, "_peer_python", lambda environment: Path(sys.executable))
    return driver


def test_both_sides_get_the_same_rows(fake_driver, tmp_path):
    read = []

    def ours(rows: Path) -> float:
        read.extend(json.loads(line) for line in rows.open())
        return 4.0

    result = peer_preprocessing.compare(1000, 0, [1, 2], 1024, tmp_path, ours)
    assert [timed["rows_per_s"] for timed in result["workers"].values()] == [500.0, 1000.0]
    assert all(timed["rows_out"] == 1000 and timed["fresh"] for timed in result["workers"].values())
    assert result["ours"] == {"seconds": 4.0, "rows_per_s": 250.0}
    assert len(read) == 1000
    assert result["rows"]["exact_duplicate"] == 50


def test_error_of_the_peer_is_quoted(fake_driver, tmp_path):
    fake_driver.write_text("raise SystemExit('no such template')")
    with pytest.raises(RuntimeError, match="ended with 1:\nno such template"):
        peer_preprocessing.compare(100, 0, [1], 1024, tmp_path)


def test_the_driver_does_not_import_this_project():
    """It runs with the peer's Python, where this project is not installed."""
    driver = (ROOT / "benchmarks" / "llamafactory_driver.py").read_text()
    assert peer_preprocessing.DRIVER.name == "llamafactory_driver.py"
    assert "llm_engineering" not in driver
    assert "from benchmarks" not in driver
