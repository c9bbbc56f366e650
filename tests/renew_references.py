"""Rewrites the losses in tests/unit/training/trainer/references with those of small runs: python -m tests.renew_references

Run it only after an intended change of the losses, and explain the change in the commit.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from llm_engineering.models.tokenizer import load_tokenizer
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.stage_blocks import DPOConfig, SFTConfig
from tests.tiny_models import formatted, logged, train, training_setup, write_model

FOLDER = Path(__file__).parent / "unit" / "training" / "references"
STEPS: dict[str, Any] = {
    "learning_rate": 1e-2,
    "num_train_epochs": 1,
    "gradient_accumulation_steps": 1,
    "per_device_train_batch_size": 2,
    "save_steps": 4,
    "eval_steps": 4,
}


def losses(stage: str, folder: Path, settings: Settings) -> dict[str, list[float]]:
    """Training losses of each step, and validation losses, of an `sft` or `dpo` run; for `dpo` also the margins."""
    setup = training_setup(write_model(folder / "model", "llama"))
    tokenizer = load_tokenizer(setup.model, settings, setup.chat_template)
    rows = formatted("instruction", 16, tokenizer, folder)
    result = train(rows, SFTConfig(**STEPS, packing=True), setup, settings)
    if stage == "dpo":
        pairs = formatted("preference", 16, tokenizer, folder)
        result = train(pairs, DPOConfig(**STEPS), setup, settings, start=result.adapter)
    names = ("loss", "eval_loss", "rewards/margins") if stage == "dpo" else ("loss", "eval_loss")
    return {name: logged(result, name) for name in names}


def main() -> None:
    """Write the files of both stages."""
    FOLDER.mkdir(exist_ok=True)
    for stage in ("sft", "dpo"):
        with tempfile.TemporaryDirectory() as scratch:
            found = losses(stage, Path(scratch), Settings(llm_output_dir=Path(scratch) / "outputs"))
        text = json.dumps({name: [round(value, 6) for value in values] for name, values in found.items()}, indent=1)
        (FOLDER / f"{stage}.json").write_text(text + "\n", encoding="utf-8")
        print(f"{stage}: {found}")


if __name__ == "__main__":
    main()
