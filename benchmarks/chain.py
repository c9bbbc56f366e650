"""Compares `make run-sft` with the same work in bare scripts: python -m benchmarks.chain [--write]

First the pipeline runs as a user runs it, with a new ZenML store that is set up before the timing. Then
benchmarks/bare_chain.py does the generation, training and evaluation of that run with transformers, PEFT and torch, in
one process each. It omits reading, rules, duplicates, splits and reports.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import machine, show

RESULTS = Path(__file__).parent / "results" / "chain.json"


def main() -> None:
    """Measure and print the figures; `--write` also writes them to a file."""
    parser = argparse.ArgumentParser(description="make run-sft as a multiple of bare scripts.")
    parser.add_argument("--config", default="configs/python_reference.yaml")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(Path(scratch), arguments.config)
    show(result, RESULTS if arguments.write else None)


def measure(folder: Path, config: str) -> dict[str, Any]:
    """Time the run and each script."""
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "ZENML_CONFIG_PATH": str(folder / "zenml"),
        "ZENML_LOCAL_STORES_PATH": str(folder / "stores"),
        "LLM_OUTPUT_DIR": str(folder / "outputs"),
    }
    _timed(["-m", "tools.cli", "runs"], env)
    seconds, output = _timed(["-m", "tools.cli", "run", "sft", "--config", config, "--json"], env)
    run = json.loads(output.splitlines()[-1])
    work = folder / "work.json"
    work.write_text(json.dumps(_work(config, run, folder)), encoding="utf-8")
    bare = {
        stage: _timed(["-m", "benchmarks.bare_chain", stage, str(work)], env)[0]
        for stage in ("generate", "train", "evaluate")
    }
    return {
        "run_sft_over_bare": seconds / sum(bare.values()),
        "run_sft_seconds": seconds,
        "bare_seconds": bare,
        "metrics": run["metrics"],
        "machine": machine(),
    }


def _timed(command: Sequence[str], env: dict[str, str]) -> tuple[float, str]:
    print("running", *command, file=sys.stderr, flush=True)
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *command], env=env, stdout=subprocess.PIPE, text=True, check=True)
    return time.perf_counter() - started, done.stdout


def _work(config: str, run: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The inputs of the scripts, taken from the run: prompts as text, rows as token ids, and settings."""
    from datasets import load_from_disk

    from llm_engineering.documents.passages import cut_passages
    from llm_engineering.documents.read import read_documents
    from llm_engineering.generation.instructions import generate_instructions
    from llm_engineering.models.base_model import model_path
    from llm_engineering.models.device import choose_device
    from llm_engineering.models.revision import pin_revision
    from llm_engineering.models.tokenizer import load_tokenizer
    from llm_engineering.recipe.generation_blocks import InstructionWriting
    from llm_engineering.recipe.loading import load_recipe
    from llm_engineering.recipe.settings import Settings

    recipe, settings = load_recipe(config, []), Settings()
    model = pin_revision(recipe.model)
    tokenizer = load_tokenizer(model, settings)
    passages = cut_passages(read_documents(recipe.documents)[0], recipe.documents, recipe.seed)[0]
    recorder = _Recorder()
    generate_instructions(passages, recorder, recipe.generation.part(InstructionWriting), recipe.seed)  # type: ignore[arg-type]
    formatted: Any = load_from_disk(str(Path(run["artifacts"]["formatted_sft"]["uri"]) / "hf_datasets"))
    rows = {name: [dict(row) for row in formatted[name].select_columns(["input_ids", "labels"])] for name in formatted}
    answered = [
        tokenizer.decode([i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100])
        for row in rows["test"][: recipe.evaluation.generated_rows]
    ]
    return {
        "model": model_path(model, settings),
        "dtype": str(choose_device(recipe.compute).dtype).removeprefix("torch."),
        "questions": [
            {
                "prompts": [
                    tokenizer.apply_chat_template(request, add_generation_prompt=True, tokenize=False)
                    for request in requests
                ],
                "stop": list(sampling.stop),
                "max_new_tokens": sampling.max_new_tokens,
            }
            for requests, sampling in recorder.calls
        ],
        "generation_batch": recipe.generation.batch_size,
        **rows,
        "answered": answered,
        "answer_max_new_tokens": recipe.evaluation.max_new_tokens,
        "evaluation_batch": recipe.evaluation.batch_size,
        "lora": recipe.sft.lora.model_dump(include={"r", "lora_alpha", "target_modules"}),
        "learning_rate": recipe.sft.learning_rate,
        "max_length": recipe.formatting.max_length,
        "train_batch": recipe.sft.per_device_train_batch_size * recipe.sft.gradient_accumulation_steps,
        "eval_batch": recipe.sft.per_device_eval_batch_size,
        "eval_steps": recipe.sft.eval_steps,
        "epochs": int(recipe.sft.num_train_epochs),
        "adapter": str(folder / "bare-adapter"),
    }


class _Recorder:
    """A client that records its requests and answers none."""

    writes_json = False
    temperature = 0.0
    identity = "none"

    def __init__(self) -> None:
        self.calls: list[tuple[Sequence[Any], Any]] = []

    def answer(self, requests: Sequence[Any], sampling: Any, what: str) -> list[Any]:
        from llm_engineering.generation.types import Failure

        self.calls.append((requests, sampling))
        return [Failure("not_asked", "", "") for _ in requests]


if __name__ == "__main__":
    main()
