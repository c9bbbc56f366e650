"""Tests whether the gate rejects a model that was trained on shuffled answers:

    python -m benchmarks.shuffled [--write]

Runs `make run-sft`, and runs it again on the same rows with the answers of training and validation shuffled. The test
rows stay the same. Cached steps do not run again.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from datasets import load_from_disk

from benchmarks.machine import machine, show
from llm_engineering.recipe.settings import Settings

RESULTS = Path(__file__).parent / "results" / "shuffled.json"
# Both runs have their own model name, so that the gate does not compare them with a model in production.
NAME = "shuffled"


def main() -> None:
    """Run both and print the gate's decisions; `--write` also writes them to a file."""
    parser = argparse.ArgumentParser(description="The gate's decision on right and on shuffled answers.")
    parser.add_argument("--config", default="configs/python_reference.yaml")
    parser.add_argument("--folder", type=Path, default=Settings().llm_output_dir / "shuffled", help="for the rows")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    arguments = parser.parse_args()
    right = _run(arguments.config)
    rows, test = _shuffle(Path(right["artifacts"]["instruction_dataset"]["uri"]), arguments.folder)
    shuffled = _run(arguments.config, f"data.instructions={rows}", f"data.test_instructions={test}")
    figures = {"right": _decision(right), "shuffled": _decision(shuffled), "machine": machine()}
    show(figures, RESULTS if arguments.write else None)


def _run(config: str, *overrides: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tools.cli", "run", "sft", "--config", config, "--json", "--set", f"name={NAME}"]
    for override in overrides:
        command += ["--set", override]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _shuffle(dataset: Path, folder: Path) -> tuple[Path, Path]:
    """Write the training and validation rows with shuffled answers, and the unchanged test rows."""
    splits = load_from_disk(str(dataset / "hf_datasets"))
    rows = [
        {"prompt": row["prompt"], "completion": row["completion"]} for n in ("train", "validation") for row in splits[n]
    ]
    answers = [row["completion"] for row in rows]
    random.Random(1).shuffle(answers)
    mixed = [{**row, "completion": answer} for row, answer in zip(rows, answers, strict=True)]
    test = [{"prompt": row["prompt"], "completion": row["completion"]} for row in splits["test"]]
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in (("shuffled", mixed), ("test", test)):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return folder / "shuffled.jsonl", folder / "test.jsonl"


def _decision(run: dict[str, Any]) -> dict[str, Any]:
    """The gate's decision with each rule and its interval."""
    (file,) = Path(run["artifacts"]["promotion_decision"]["uri"]).glob("*.json")
    decision = json.loads(file.read_text(encoding="utf-8"))
    keys = ("name", "value", "low", "high", "verdict")
    return {
        "outcome": decision["outcome"],
        "rules": [{key: rule[key] for key in keys} for rule in decision["rules"] if rule["verdict"] != "skipped"],
    }


if __name__ == "__main__":
    main()
