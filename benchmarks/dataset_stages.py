"""Times reading, checking, judging and writing of made-up rows, and their memory: python -m benchmarks.dataset_stages

Each number of rows gets a fresh process, which may start child processes. The memory is the sum over these processes,
measured twice a second. With `--peer`, LLaMA-Factory's preprocessing runs on the same rows in the same run
(`benchmarks.peer_preprocessing`), and is compared with all stages of this project: read, check, judge, split, write,
tokenise.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
from datasets import DatasetDict

from benchmarks.alpaca_rows import write_rows
from benchmarks.machine import machine
from benchmarks.peer_preprocessing import compare, options
from llm_engineering.data.ledger import Ledger
from llm_engineering.data.load import load_rows
from llm_engineering.data.prepare import prepare
from llm_engineering.data.storage import work_folder
from llm_engineering.recipe.data_blocks import DataConfig, FormattingConfig
from llm_engineering.recipe.model_blocks import ModelConfig
from llm_engineering.recipe.settings import Settings

RESULTS = Path(__file__).with_suffix(".json")


class PeakMemory:
    """Context manager that measures the peak memory of this process and its children, in bytes.

    Attributes:
        resident: resident memory; pages that processes share count once for each process.
        unique: memory that would be freed if the processes ended, without mapped files and shared libraries.
    """

    def __init__(self) -> None:
        self.resident = 0
        self.unique = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        own = psutil.Process()
        while not self._stop.wait(0.5):
            resident = unique = 0
            for process in [own, *own.children(recursive=True)]:
                try:
                    memory = process.memory_full_info()
                except psutil.NoSuchProcess:
                    continue
                resident += memory.rss
                unique += memory.uss
            self.resident = max(self.resident, resident)
            self.unique = max(self.unique, unique)


def work(rows: Path, tokenised: bool, max_length: int) -> dict[str, Any]:
    """Run every stage on a file of rows, and return counts, peak memory, and the seconds of each stage.

    Args:
        tokenised: whether to format the splits for training too.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    folder = work_folder()
    ledger = Ledger()
    with PeakMemory() as memory:
        start = time.monotonic()
        loaded = load_rows(str(rows), "instruction", DataConfig(), folder / "rows.arrow", ledger)
        seconds = {"read": time.monotonic() - start}
        prepared = prepare(loaded.rows, "instruction", DataConfig(), ledger, folder)
        seconds |= prepared.seconds
        if tokenised:
            seconds["tokenise"] = _tokenise(prepared.splits, folder, ledger, max_length)
    return {
        "seconds": seconds,
        "peak_resident_bytes": memory.resident,
        "peak_unique_bytes": memory.unique,
        "kept": ledger.kept["instruction"],
        "set_aside": ledger.by_reason("instruction"),
    }


def _tokenise(splits: DatasetDict, folder: Path, ledger: Ledger, max_length: int) -> float:
    # These import torch, whose memory must not count for the other stages.
    from llm_engineering.formatting.datasets import format_splits
    from llm_engineering.models.revision import pin_revision
    from llm_engineering.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(pin_revision(ModelConfig()), Settings())
    start = time.monotonic()
    format_splits(splits, "instruction", tokenizer, FormattingConfig(max_length=max_length), folder, ledger)
    return time.monotonic() - start


def measure(lines: int, tokenised: bool, seed: int, max_length: int) -> dict[str, Any]:
    """Write rows, and run the stages on them in a fresh process."""
    with tempfile.TemporaryDirectory(prefix="bench-datasets-") as scratch:
        rows = Path(scratch) / "rows.jsonl"
        made = write_rows(rows, lines, seed)
        return {
            "rows": lines,
            "made": asdict(made),
            "bytes": rows.stat().st_size,
            **_work_in_process(rows, tokenised, max_length),
        }


def _work_in_process(rows: Path, tokenised: bool, max_length: int) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "benchmarks.dataset_stages",
        "--work-on",
        str(rows),
        "--max-length",
        str(max_length),
    ]
    command += ["--tokenise"] if tokenised else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    read = result["kept"] + sum(result["set_aside"].values())
    stages = {**result["seconds"], "all": sum(result["seconds"].values())}
    result["rows_per_s"] = {stage: round(read / seconds) for stage, seconds in stages.items()}
    return result


def _print(result: dict[str, Any]) -> None:
    rates = ", ".join(f"{stage} {rate:,}" for stage, rate in result["rows_per_s"].items())
    print(
        f"{result['rows']:,} rows: rows/s {rates}; {sum(result['seconds'].values()):.0f} s; peak memory of all "
        f"processes {result['peak_resident_bytes'] / 1e9:.2f} GB resident, {result['peak_unique_bytes'] / 1e9:.2f} GB unique"
    )


def main() -> None:
    """Print the rows per second of each stage, the peak memory, and the ratio to the peer."""
    parser: argparse.ArgumentParser = options(__doc__.splitlines()[0] if __doc__ else None)
    parser.set_defaults(rows=20_000)
    parser.add_argument(
        "--sizes", type=int, nargs="*", default=[250_000, 500_000, 1_000_000], help="(default: %(default)s)"
    )
    parser.add_argument("--peer", action="store_true", help="compare with LLaMA-Factory on --rows rows")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    parser.add_argument("--work-on", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--tokenise", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work_on:
        print(json.dumps(work(arguments.work_on, arguments.tokenise, arguments.max_length)))
        return
    result: dict[str, Any] = {"machine": machine(), "sizes": []}
    for lines in arguments.sizes:
        result["sizes"].append(measure(lines, False, arguments.seed, arguments.max_length))
        _print(result["sizes"][-1])
    if arguments.peer:
        result["peer"] = _compare(arguments)
    if arguments.write:
        RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _compare(arguments: argparse.Namespace) -> dict[str, Any]:
    ours: dict[str, Any] = {}

    def timed(rows: Path) -> float:
        ours.update(_work_in_process(rows, True, arguments.max_length))
        return float(sum(ours["seconds"].values()))

    result = compare(
        arguments.rows, arguments.seed, arguments.workers, arguments.max_length, arguments.environment, timed
    )
    best = max(worker["rows_per_s"] for worker in result["workers"].values())
    result["stages"] = ours
    result["ratio_all_stages"] = round(result["ours"]["rows_per_s"] / best, 2)
    same_work = arguments.rows / (ours["seconds"]["read"] + ours["seconds"]["tokenise"])
    result["ratio_same_work"] = round(same_work / best, 2)
    for number, worker in result["workers"].items():
        print(f"{result['peer']} with {number} workers: {worker['rows_per_s']:,.0f} rows/s")
    print(
        f"this project, all stages: {result['ours']['rows_per_s']:,.0f} rows/s, {result['ratio_all_stages']} of the peer's "
        "best rate, although the peer has no checks, duplicates, leaks and splits\n"
        f"this project, only reading and tokenising, as the peer: {same_work:,.0f} rows/s, {result['ratio_same_work']} of "
        "the peer's best rate"
    )
    return result


if __name__ == "__main__":
    main()
