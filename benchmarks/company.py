"""Trains a recipe on the fifteen mixed files of a small company, and takes the exam about them:

    python -m benchmarks.company [--write]             # writes the files, trains, prints the exam's figures
    python -m benchmarks.company --files FOLDER        # only writes the files

The recipe is the one for a user's documents. Only the documents, the name and the exam are set, as a user sets them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.company_files import EXAM, write_files
from benchmarks.machine import machine, show
from llm_engineering.recipe.evaluation_blocks import EXAM_MEASURES
from llm_engineering.recipe.settings import Settings

RESULTS = Path(__file__).parent / "results" / "company.json"
NAME = "company"


def main() -> None:
    """Print the figures; `--write` also writes them to a file."""
    parser = argparse.ArgumentParser(description="What a model learns from the files of a small company.")
    parser.add_argument("--config", default="configs/own_documents.yaml")
    parser.add_argument("--files", type=Path, help="write the files to this folder, and do not train")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    arguments = parser.parse_args()
    if arguments.files is not None:
        for file in write_files(arguments.files):
            print(file)
        return
    folder = Settings().llm_output_dir / "company" / "files"
    write_files(folder)
    show({**_figures(_run(arguments.config, folder)), "machine": machine()}, RESULTS if arguments.write else None)


def _run(config: str, documents: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "tools.cli", "run", "retrain", "--config", config, "--json"]
    for key, value in (("name", NAME), ("documents.path", documents), ("exam.path", EXAM)):
        command += ["--set", f"{key}={value}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _figures(run: dict[str, Any]) -> dict[str, Any]:
    """Each measure of the exam for each model, with its differences, from the evaluation report."""
    (file,) = Path(run["artifacts"]["evaluation_report"]["uri"]).rglob("report.json")
    report = json.loads(file.read_text(encoding="utf-8"))
    measured = {name: report["measures"][name] for name in EXAM_MEASURES.values() if name in report["measures"]}
    return {
        "newest": report["newest"],
        **{
            name: {key: found[key] for key in ("models", "differences", "clusters")} for name, found in measured.items()
        },
    }


if __name__ == "__main__":
    main()
