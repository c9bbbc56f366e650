"""Makes a Llama with random weights, and rows to train it on, for the CUDA benchmark."""

from __future__ import annotations

import json
import math
import random
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bars
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from benchmarks.training_settings import BATCH, LORA, SEED
from llm_engineering.data.ledger import Ledger
from llm_engineering.data.rows import InstructionRow, Message
from llm_engineering.data.storage import rows_dataset, stream_records
from llm_engineering.documents.read import read_documents
from llm_engineering.errors import RequestError
from llm_engineering.formatting.datasets import format_splits
from llm_engineering.formatting.render import IGNORE_INDEX
from llm_engineering.models.fit import lora_config
from llm_engineering.models.revision import pin_revision
from llm_engineering.models.tokenizer import load_tokenizer
from llm_engineering.recipe.data_blocks import DocumentsConfig, FormattingConfig
from llm_engineering.recipe.model_blocks import LoraConfig, ModelConfig
from llm_engineering.recipe.settings import Settings
from llm_engineering.training.telemetry.flops import TrainingFlops

FACTS = "facts.json"


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama and of the rows that it is trained on.

    Attributes:
        max_length: tokens in a packed row, and in the longest row.
        rows: number of rows.
        words: median number of words in an answer. Lengths are log-normal, as in written answers.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    max_length: int
    rows: int
    words: int

    def config(self, tokenizer: PreTrainedTokenizerBase) -> LlamaConfig:
        """Make the model's config. Everything else is as in Llama-3.1."""
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=131072,
            rms_norm_eps=1e-5,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )


SHAPES = {
    # A unit test trains it on a CPU within seconds.
    "tiny": Shape(64, 128, 2, 4, 2, 49152, max_length=128, rows=16, words=15),
    "llama-3.1-8b": Shape(4096, 14336, 32, 32, 8, 128256, max_length=2048, rows=256, words=200),
}


def prepare(name: str, folder: Path) -> dict[str, Any]:
    """Write the model and the rows, unless they exist already, and return facts about them.

    Returns:
        `model`: its folder; `parameters`; `rows`, `tokens` and `trained_tokens`; `longest_row`; `max_length`;
        `packed_rows`: number of packed rows with as many tokens as a padded batch; `flops`: operations for training an
        adapter on each row once.

    Raises:
        RequestError: the disk has no space for the weights.
    """
    shape, facts = SHAPES[name], folder / FACTS
    made_from = {**asdict(shape), "lora": LORA, "batch": BATCH["sft"], "seed": SEED}
    if facts.is_file():
        existing: dict[str, Any] = json.loads(facts.read_text(encoding="utf-8"))
        if existing["made_from"] == made_from:
            return existing
        facts.unlink()
    disable_progress_bars()
    settings = Settings()
    tokenizer = load_tokenizer(pin_revision(ModelConfig()), settings)
    config = shape.config(tokenizer)
    with torch.device("meta"):
        base: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        parameters = base.num_parameters()
        policy = get_peft_model(base, lora_config(LoraConfig(**LORA)))
    assert isinstance(policy, PeftModel)
    flops = TrainingFlops.of(policy)
    _write_model(config, parameters, tokenizer, folder)
    lengths, trained = _write_rows(shape, tokenizer, folder)
    steps = shape.rows / BATCH["sft"]
    made = {
        "name": name,
        "made_from": made_from,
        "model": str(folder / "model"),
        "parameters": parameters,
        "rows": len(lengths),
        "tokens": sum(lengths),
        "trained_tokens": trained,
        "longest_row": max(lengths),
        "max_length": shape.max_length,
        "packed_rows": round(sum(lengths) / steps / shape.max_length) or 1,
        "flops": flops.step(lengths, trained),
    }
    facts.write_text(json.dumps(made, indent=1), encoding="utf-8")
    return made


def _write_model(config: LlamaConfig, parameters: int, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    needed, free = 2 * parameters * 1.1, shutil.disk_usage(folder).free
    if free < needed:
        raise RequestError(
            f"{folder} has {free / 1e9:.1f} GB free, and the weights need {needed / 1e9:.1f} GB. Name a folder on another "
            "disk with --folder."
        )
    set_seed(SEED)
    # A CPU takes minutes to draw eight billion random numbers.
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "model")
    del model
    # Leave the whole memory of the GPU to the sides.
    torch.cuda.empty_cache()
    tokenizer.save_pretrained(folder / "model")


def _write_rows(shape: Shape, tokenizer: PreTrainedTokenizerBase, folder: Path) -> tuple[list[int], int]:
    """Write the rows as JSON lines for the scripts, and formatted for our side.

    Returns:
        The length of each row in tokens, and the number of trained tokens.
    """
    words = " ".join(document.text for document in read_documents(DocumentsConfig())[0]).split()
    rng = random.Random(SEED)
    rows = []
    # Twice as many as needed, because formatting drops those that are too long.
    for _ in range(2 * shape.rows):
        count = max(8, round(rng.lognormvariate(math.log(shape.words), 0.8)))
        start = rng.randrange(8, len(words) - count)
        question = f"How does the Python reference go on after: {' '.join(words[start - 8 : start])}?"
        rows.append(
            InstructionRow(
                prompt=[Message(role="user", content=question)],
                completion=[Message(role="assistant", content=" ".join(words[start : start + count]))],
                source="python",
                origin="document",
            )
        )
    work = folder / "formatting"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    split = rows_dataset(rows, "instruction")
    formatting = FormattingConfig(max_length=shape.max_length)
    formatted = format_splits({"train": split}, "instruction", tokenizer, formatting, work, Ledger())[0]["train"]
    fitting = set(formatted["id"])
    kept = [row for row, record in zip(rows, stream_records(split), strict=True) if record["id"] in fitting]
    lines = [json.dumps(row.model_dump(include={"prompt", "completion"})) for row in kept[: shape.rows]]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    ours = formatted.select(range(shape.rows))
    shutil.rmtree(folder / "formatted", ignore_errors=True)
    ours.save_to_disk(folder / "formatted")
    trained = sum(label != IGNORE_INDEX for labels in ours["labels"] for label in labels)
    return [len(ids) for ids in ours["input_ids"]], trained
