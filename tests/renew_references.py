"""Small runs whose losses stand in tests/unit/references: python -m tests.renew_references writes them anew.

Run it only after a change that is meant to change what is trained, and say in the commit why the losses moved.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from llm_engineering.models.tokenizer import load_tokenizer
from llm_engineering.recipe.compute_blocks import ComputeConfig
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.training_blocks import DPOConfig, ModelConfig, SFTConfig, TrackingConfig, TrainingSetup

from llm_engineering.training.dpo import train_dpo
from llm_engineering.training.sft import train_sft
from tests.tiny_models import formatted, write_model

FOLDER = Path(__file__).parent / "unit" / "references"
STEPS: dict[str, Any] = {
    "learning_rate": 1e-2,
    "num_train_epochs": 1,
    "gradient_accumulation_steps": 1,
    "per_device_train_batch_size": 2,
    "save_steps": 4,
    "eval_steps": 4,
}


def losses(stage: str, folder: Path, settings: Settings) -> dict[str, list[float]]:
    """Training losses of every step and validation losses of a run of `sft` or `dpo`; `dpo` with its margins."""
    setup = TrainingSetup(
        model=ModelConfig(name_or_path=str(write_model(folder / "model", "llama")), revision="test"),
        max_length=256,
        chat_template="alpaca",
        compute=ComputeConfig(device="cpu", dtype="float32", attn_implementation="sdpa"),
        tracking=TrackingConfig(comet="off"),
        seed=7,
    )
    tokenizer = load_tokenizer(setup.model, settings, setup.chat_template)
    rows = formatted("instruction", 16, tokenizer, folder)
    result = train_sft(rows, SFTConfig(**STEPS, packing=True), setup, settings)
    if stage == "dpo":
        pairs = formatted("preference", 16, tokenizer, folder)
        result = train_dpo(pairs, result.adapter, DPOConfig(**STEPS), setup, settings)
    names = ("loss", "eval_loss", "rewards/margins") if stage == "dpo" else ("loss", "eval_loss")
    return {name: [entry[name] for entry in result.summary["history"] if name in entry] for name in names}


def main() -> None:
    """Write both files."""
    FOLDER.mkdir(exist_ok=True)
    for stage in ("sft", "dpo"):
        with tempfile.TemporaryDirectory() as scratch:
            found = losses(stage, Path(scratch), Settings(llm_output_dir=Path(scratch) / "outputs"))
        text = json.dumps({name: [round(value, 6) for value in values] for name, values in found.items()}, indent=1)
        (FOLDER / f"{stage}.json").write_text(text + "\n", encoding="utf-8")
        print(f"{stage}: {found}")


if __name__ == "__main__":
    main()
