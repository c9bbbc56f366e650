"""Compares training with a plain TRL script and with matrix products: python -m benchmarks.training [--data FILE] [--write]

Each side runs in its own process, one after another, on the same rows and with the same seed:

- `products`: only the matrix products of forward and backward, for 2,048 tokens, with all matrices of the model and of the
  adapter, in the precision of training. Their FLOP/s are the limit of training: the model's operations for the rows
  (`TrainingFlops`), divided by the seconds of training, are shown as a share of it;
- `plain`: benchmarks/plain_trl.py;
- `ours`: `train_sft` and `train_dpo` as the steps call them, with packing.

Tokens do not include padding. The time of training includes saving, but not loading. The same code measures the
held-out loss of all adapters. The rows are passages of the Python reference in their natural lengths, or those of
`--data`. The rejected answer of a pair is the answer of another row.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import machine, show
from benchmarks.training_settings import BATCH, BETA, LEARNING_RATE, LORA, MAX_LENGTH, SEED

ROWS = {"sft": 128, "dpo": 32}
HELDOUT = 32
# Tokens of the matrix products, and passes over all matrices. The fastest pass counts.
TOKENS = 2048
PASSES = 5
RESULTS = Path(__file__).parent / "results" / "training.json"


def main() -> None:
    """Run one side, or run all sides and print the ratios."""
    parser = argparse.ArgumentParser(description="Tokens per second, peak memory and held-out loss as ratios.")
    parser.add_argument("--side", choices=("rows", "products", "sft", "dpo", "losses"), help="run one side (internal)")
    parser.add_argument("--folder", type=Path, help="folder for the files of all sides (internal)")
    parser.add_argument("--data", help="your own instruction rows")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    arguments = parser.parse_args()
    if arguments.side is not None:
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
        folder, side = arguments.folder, arguments.side
        if side == "rows":
            result = _rows(folder, arguments.data)
        elif side == "losses":
            result = _losses(folder)
        else:
            result = _products() if side == "products" else _ours(side, folder)
        print(json.dumps(result))
        return
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(Path(scratch), arguments.data)
    show(result, RESULTS if arguments.write else None)


def measure(folder: Path, data: str | None) -> dict[str, Any]:
    """Run all sides, one after another."""
    own = ["-m", "benchmarks.training", "--folder", str(folder), *(["--data", data] if data else []), "--side"]
    made = _run(*own, "rows")
    model = made.pop("model")
    sides: dict[str, Any] = {"products": _run(*own, "products")}
    for stage in ("sft", "dpo"):
        output = str(folder / f"plain-{stage}")
        plain = ["-m", "benchmarks.plain_trl", stage, "--model", model, "--output", output]
        start = ["--adapter", str(folder / "ours-sft")] if stage == "dpo" else []
        sides[f"plain_{stage}"] = _run(*plain, "--rows", str(folder / f"{stage}.jsonl"), *start)
        sides[f"ours_{stage}"] = _run(*own, stage)
        for name in (f"plain_{stage}", f"ours_{stage}"):
            sides[name]["tokens_per_second"] = made[f"{stage}_tokens"] / sides[name]["seconds"]
    for name, loss in _run(*own, "losses").items():
        sides[name]["heldout_loss"] = loss
    rate = {name: side["tokens_per_second"] for name, side in sides.items() if "tokens_per_second" in side}
    packages = ("torch", "transformers", "trl", "peft")
    return {
        "sft_real_tokens_per_second_over_plain": rate["ours_sft"] / rate["plain_sft"],
        "sft_share_of_matrix_products": _share(sides, "sft"),
        "sft_peak_memory_over_plain": _ratio(sides, "peak_memory_bytes", "sft"),
        "dpo_pairs_per_second_over_plain": sides["plain_dpo"]["seconds"] / sides["ours_dpo"]["seconds"],
        "dpo_share_of_matrix_products": _share(sides, "dpo"),
        "dpo_peak_memory_over_plain": _ratio(sides, "peak_memory_bytes", "dpo"),
        "rows": {**made, "of": Path(data).name if data else "the Python reference"},
        "sides": sides,
        "machine": machine(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def _ratio(sides: dict[str, Any], figure: str, stage: str) -> float:
    return float(sides[f"ours_{stage}"][figure] / sides[f"plain_{stage}"][figure])


def _share(sides: dict[str, Any], stage: str) -> float:
    ours = sides[f"ours_{stage}"]
    return float(ours["flops"] / ours["seconds"] / sides["products"]["flops_per_second"])


def _run(*command: str) -> dict[str, Any]:
    print("running", *command[1:], file=sys.stderr, flush=True)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, text=True, check=True, env=environment)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(result, file=sys.stderr, flush=True)
    return result


def _rows(folder: Path, data: str | None) -> dict[str, Any]:
    """Write the rows as JSON lines for the plain side, and formatted for our side."""
    import random

    from datasets import Dataset

    from llm_engineering.data.ledger import Ledger
    from llm_engineering.data.load import load_rows
    from llm_engineering.data.rows import InstructionRow, Message, PreferenceRow, instruction_row
    from llm_engineering.data.storage import rows_dataset, stream_records
    from llm_engineering.documents.passages import cut_passages
    from llm_engineering.documents.read import read_documents
    from llm_engineering.formatting.datasets import format_splits
    from llm_engineering.models.base_model import model_path
    from llm_engineering.models.revision import pin_revision
    from llm_engineering.models.tokenizer import load_tokenizer
    from llm_engineering.recipe.data_blocks import DataConfig, DocumentsConfig, FormattingConfig
    from llm_engineering.recipe.model_blocks import ModelConfig
    from llm_engineering.recipe.settings import Settings

    if data:
        path = folder / "loaded.arrow"
        rows = [
            instruction_row(row)
            for row in stream_records(load_rows(data, "instruction", DataConfig(), path, Ledger()).rows)
        ]
    else:
        cut = DocumentsConfig(passage_min_chars=100, passage_max_chars=1600)
        rows = [
            InstructionRow(
                prompt=[Message(role="user", content=f"What does the Python reference say about {passage.title}?")],
                completion=[Message(role="assistant", content=passage.text)],
                source=passage.document,
                origin="document",
            )
            for passage in cut_passages(read_documents(cut)[0], cut, SEED)[0]
        ]
    random.Random(SEED).shuffle(rows)
    settings, model = Settings(), pin_revision(ModelConfig())
    tokenizer = load_tokenizer(model, settings)
    formatting = FormattingConfig(max_length=MAX_LENGTH)

    def formatted(kind: str, split: Dataset, name: str) -> tuple[Dataset, list[int]]:
        """The formatted rows that are not too long, and their indices."""
        work = folder / name
        work.mkdir()
        splits, _ = format_splits({"train": split}, kind, tokenizer, formatting, work, Ledger())
        ids = set(splits["train"]["id"])
        return splits["train"], [index for index, row in enumerate(stream_records(split)) if row["id"] in ids]

    every, fitting = formatted("instruction", rows_dataset(rows, "instruction"), "all")
    rows = [rows[index] for index in fitting][: ROWS["sft"] + HELDOUT]
    train, heldout = rows[: ROWS["sft"]], rows[ROWS["sft"] :]
    pairs = [
        PreferenceRow(prompt=a.prompt, chosen=a.completion, rejected=b.completion, source=a.source, origin=a.origin)
        for a, b in zip(train[: ROWS["dpo"]], train[ROWS["dpo"] : 2 * ROWS["dpo"]], strict=True)
    ]
    columns = {"sft": ("prompt", "completion"), "dpo": ("prompt", "chosen", "rejected")}
    written: dict[str, list[Any]] = {"sft": train, "dpo": pairs}
    for stage, stage_rows in written.items():
        lines = [json.dumps(row.model_dump(include=set(columns[stage]))) for row in stage_rows]
        (folder / f"{stage}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    every.select(range(len(train))).save_to_disk(folder / "formatted-sft")
    every.select(range(len(train), len(rows))).save_to_disk(folder / "formatted-heldout")
    formatted_pairs, _ = formatted("preference", rows_dataset(pairs, "preference"), "pairs")
    formatted_pairs.save_to_disk(folder / "formatted-dpo")
    lengths = [len(ids) for ids in every["input_ids"][: len(train)]]
    pair_tokens = [
        2 * len(p["prompt_ids"]) + len(p["chosen_ids"]) + len(p["rejected_ids"])
        for p in stream_records(formatted_pairs)
    ]
    return {
        "model": model_path(model, settings),
        "sft_rows": len(lengths),
        "sft_tokens": sum(lengths),
        "longest_row": max(lengths),
        "dpo_pairs": len(formatted_pairs),
        "dpo_tokens": sum(pair_tokens),
        "heldout_rows": len(heldout),
    }


def _products() -> dict[str, Any]:
    """FLOP/s of the matrix products of training, with the model's matrices, and nothing between them."""
    import peft
    import torch

    from llm_engineering.models.base_model import load_model
    from llm_engineering.models.device import choose_device
    from llm_engineering.models.revision import pin_revision
    from llm_engineering.recipe.compute_blocks import ComputeConfig
    from llm_engineering.recipe.model_blocks import ModelConfig
    from llm_engineering.recipe.settings import Settings
    from llm_engineering.training.telemetry.flops import TrainingFlops

    device = choose_device(ComputeConfig())
    model = load_model(pin_revision(ModelConfig()), Settings(), device)
    policy = peft.get_peft_model(model, peft.LoraConfig(**LORA, task_type="CAUSAL_LM"))
    matrices = [module.weight for module in policy.modules() if isinstance(module, torch.nn.Linear)]
    sizes = {size for matrix in matrices for size in matrix.shape}
    states, results = (
        {size: torch.randn(TOKENS, size, dtype=device.dtype, device=device.name) for size in sizes} for _ in range(2)
    )
    seconds = []
    with torch.no_grad():
        for _ in range(PASSES):
            started = time.perf_counter()
            for matrix in matrices:
                weight, (outputs, inputs) = matrix.to(device.dtype), matrix.shape
                torch.mm(states[inputs], weight.t(), out=results[outputs])
                # The gradient of the input, and of the weights of the adapter.
                torch.mm(states[outputs], weight, out=results[inputs])
                if matrix.requires_grad:
                    torch.mm(states[outputs].t(), states[inputs])
            # On a GPU, item() waits until the results are computed.
            results[inputs][0, 0].item()
            seconds.append(time.perf_counter() - started)
    flops = TrainingFlops.of(policy)
    return {"flops_per_second": (flops.body + flops.head) * TOKENS / min(seconds)}


def _ours(stage: str, folder: Path) -> dict[str, Any]:
    from datasets import Dataset, DatasetDict

    from llm_engineering.models.revision import pin_revision
    from llm_engineering.recipe.compute_blocks import ComputeConfig
    from llm_engineering.recipe.model_blocks import LoraConfig, ModelConfig
    from llm_engineering.recipe.settings import Settings
    from llm_engineering.recipe.stage_blocks import DPOConfig, SFTConfig
    from llm_engineering.recipe.training_blocks import TrackingConfig, TrainingSetup
    from tests.tiny_models import train

    setup = TrainingSetup(
        model=pin_revision(ModelConfig()),
        max_length=MAX_LENGTH,
        # benchmarks/training_cuda.py measures unsloth.
        compute=ComputeConfig(backend="transformers"),
        tracking=TrackingConfig(comet="off"),
        seed=SEED,
    )
    rows = Dataset.load_from_disk(folder / f"formatted-{stage}")
    splits = DatasetDict(train=rows, validation=rows.select(range(1)))
    settings = Settings(llm_output_dir=folder / "outputs")
    common: dict[str, Any] = {
        "learning_rate": LEARNING_RATE[stage],
        "num_train_epochs": 1,
        # The defaults of transformers, as on the plain side.
        "lr_scheduler_type": "linear",
        "warmup_ratio": 0.0,
        "gradient_accumulation_steps": 1,
        "eval_steps": 10_000,
        "save_steps": 10_000,
    }
    if stage == "sft":
        tokens = sum(map(len, rows["input_ids"]))
        # The number of packed rows that gives as many optimiser steps as on the plain side.
        batch = round(tokens / (len(rows) / BATCH["sft"]) / MAX_LENGTH) or 1
        config = SFTConfig(**common, per_device_train_batch_size=batch, lora=LoraConfig(**LORA))
        result = train(splits, config, setup, settings)
    else:
        preference = DPOConfig(**common, per_device_train_batch_size=BATCH["dpo"], beta=BETA)
        result = train(splits, preference, setup, settings, start=folder / "ours-sft")
    result.adapter.rename(folder / f"ours-{stage}")
    summary = result.summary
    return {
        "seconds": summary["seconds"]["total"],
        "seconds_by_part": summary["seconds"],
        "steps": summary["steps"],
        "flops": summary["flops"],
        "peak_memory_bytes": summary["peak_memory_bytes"],
    }


def _losses(folder: Path) -> dict[str, float]:
    from datasets import Dataset

    from llm_engineering.evaluation.measures.observation import heldout_loss
    from llm_engineering.evaluation.models import Models, labelled_rows
    from llm_engineering.models.base_model import load_model
    from llm_engineering.models.device import choose_device
    from llm_engineering.models.revision import pin_revision
    from llm_engineering.models.tokenizer import load_tokenizer
    from llm_engineering.recipe.compute_blocks import ComputeConfig
    from llm_engineering.recipe.model_blocks import ModelConfig
    from llm_engineering.recipe.settings import Settings

    model, settings = pin_revision(ModelConfig()), Settings()
    names = ("plain_sft", "ours_sft", "plain_dpo", "ours_dpo")
    adapters = {}
    for name in names:
        side, stage = name.split("_")
        adapters[name] = folder / f"{side}-{stage}" / ("adapter" if side == "plain" else "")
    base = load_model(model, settings, choose_device(ComputeConfig()))
    models = Models(base, adapters, load_tokenizer(model, settings), batch_size=4)
    rows = labelled_rows(Dataset.load_from_disk(folder / "formatted-heldout"))
    return {name: heldout_loss(models.scores(name, rows, "held-out loss")).value for name in names}


if __name__ == "__main__":
    main()
