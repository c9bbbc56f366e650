"""Trains tiny models of many architectures, and compares what this project computes with what transformers computes.

`python -m benchmarks.architectures` takes some minutes, and writes `benchmarks/results/architectures.json`. For each architecture:

- SFT loss: the trainer's validation loss before the first step, and the loss that the plain model returns for the same batch,
  with the router's loss of a mixture of experts.
- DPO: the loss of the first step, without the router's loss. It must be ln 2, because policy and reference are the same model.
- Merge: the largest difference of a log-probability between the trained and the merged model.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import disable_progress_bars
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.machine import machine
from llm_engineering.models.device import choose_device
from llm_engineering.models.tokenizer import load_tokenizer
from llm_engineering.publish.merge import Trained, merge
from llm_engineering.publish.verification import HeldoutRow
from llm_engineering.recipe.model_blocks import LoraConfig
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.stage_blocks import DPOConfig, SFTConfig
from llm_engineering.training.processes.job import Job
from llm_engineering.training.sft import sft_trainer
from llm_engineering.training.training_run import prepare_run
from tests.tiny_models import CPU, SIZES, Kind, formatted, logged, train, training_setup, write_model

RESULTS = Path(__file__).parent / "results" / "architectures.json"
_HEAD = {"head_dim": 8}
_WINDOW = {"sliding_window": 16}
_EXPERTS = {"num_experts_per_tok": 2}
_LAYERS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_OLD = {"n_embd": 32, "n_layer": 2, "n_head": 4}
# The configuration class in transformers, and its sizes. Dropout is that of the class, or 0.1.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT-2": ("GPT2Config", {**_OLD, "n_positions": 512}),
    "OPT": ("OPTConfig", {**_LAYERS, "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 512}),
    "BLOOM": ("BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "hidden_dropout": 0.1}),
    "GPT-NeoX": ("GPTNeoXConfig", {**_LAYERS, "intermediate_size": 64, "attention_dropout": 0.1}),
    "Falcon": ("FalconConfig", {**_LAYERS, "attention_dropout": 0.1}),
    "Phi": ("PhiConfig", {**SIZES, "resid_pdrop": 0.1}),
    "Phi-3": ("Phi3Config", {**SIZES, **_WINDOW, "attention_dropout": 0.1}),
    "Llama, tied": ("LlamaConfig", {**SIZES, "tie_word_embeddings": True, "attention_dropout": 0.1}),
    "Mistral": ("MistralConfig", {**SIZES, **_WINDOW}),
    "Qwen2": ("Qwen2Config", {**SIZES, "attention_dropout": 0.1}),
    "Qwen3": ("Qwen3Config", {**SIZES, **_HEAD}),
    "Gemma": ("GemmaConfig", {**SIZES, **_HEAD}),
    "Gemma 2": ("Gemma2Config", {**SIZES, **_HEAD, **_WINDOW}),
    "Gemma 3": ("Gemma3TextConfig", {**SIZES, **_HEAD, **_WINDOW}),
    "Granite": ("GraniteConfig", {**SIZES, "logits_scaling": 8.0, "embedding_multiplier": 12.0}),
    "Cohere": ("CohereConfig", SIZES),
    "StarCoder2": ("Starcoder2Config", {**SIZES, "attention_dropout": 0.1, "residual_dropout": 0.1}),
    "OLMo 2": ("Olmo2Config", SIZES),
    "StableLM": ("StableLmConfig", {**SIZES, "hidden_dropout": 0.1}),
    "Mixtral": ("MixtralConfig", {**SIZES, **_EXPERTS, "num_local_experts": 4}),
    "Qwen3-MoE": ("Qwen3MoeConfig", {**SIZES, **_HEAD, **_EXPERTS, "num_experts": 4, "moe_intermediate_size": 16}),
    "gpt-oss": ("GptOssConfig", {**SIZES, **_HEAD, **_EXPERTS, **_WINDOW, "num_local_experts": 4}),
    "Gemma 3, with images": (
        "Gemma3Config",
        {
            "text_config": {**SIZES, **_HEAD, **_WINDOW, "vocab_size": 300},
            "vision_config": {**_LAYERS, "intermediate_size": 32, "image_size": 28, "patch_size": 14},
            "mm_tokens_per_image": 4,
            **{"image_token_index": 3, "boi_token_index": 4, "eoi_token_index": 5},
        },
    ),
}
_STEPS: dict[str, Any] = {
    "learning_rate": 1e-2, "num_train_epochs": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1,
    "eval_steps": 100, "save_steps": 100,
}  # fmt: skip
SFT = SFTConfig(**_STEPS, packing=False, lora=LoraConfig(r=4))
DPO = DPOConfig(**_STEPS)


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Train and merge one architecture, in an empty folder.

    Returns:
        `sft_loss`, `plain_loss`, `dpo_first_loss`, and `merge_difference` in nats.
    """
    class_name, shape = ARCHITECTURES[name]
    base = write_model(folder / "model", Kind(getattr(transformers, class_name), shape))
    setup = training_setup(base, compute=CPU.model_copy(update={"attn_implementation": "auto"}), chat_template="chatml")
    settings = Settings(llm_output_dir=folder / "outputs", llm_cache_dir=folder / "cache")
    tokenizer = load_tokenizer(setup.model, settings, "chatml")
    rows = formatted("instruction", 8, tokenizer, folder)

    run = prepare_run(Job(stage="sft", config=SFT.model_dump(), setup=setup), SFTConfig, rows, settings)
    torch.manual_seed(setup.seed)
    found: float = sft_trainer(run, run.load_policy(), run.config).evaluate()["eval_loss"]
    plain = plain_loss(base, rows["validation"], tokenizer.pad_token_id)

    sft = train(rows, SFT, setup, settings)
    dpo = train(formatted("preference", 8, tokenizer, folder), DPO, setup, settings, start=sft.adapter)
    config = AutoConfig.from_pretrained(base)
    router = (
        config.router_aux_loss_coef * logged(dpo, "aux_loss")[0] if hasattr(config, "router_aux_loss_coef") else 0.0
    )
    heldout = [HeldoutRow(str(i), row["input_ids"], row["labels"]) for i, row in enumerate(rows["validation"])]
    verification = merge(
        Trained(setup.model, dpo.adapter),
        heldout,
        choose_device(setup.compute),
        torch.float32,
        settings,
        folder / "merged",
    )
    return {
        "sft_loss": found,
        "plain_loss": plain,
        "dpo_first_loss": logged(dpo)[0] - router,
        "merge_difference": verification.largest_difference,
    }


def plain_loss(base: Path, rows: Any, pad: int) -> float:
    """The loss that the model itself returns for one padded batch of all rows."""
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    if getattr(model.config, "router_aux_loss_coef", 0):
        model.config.output_router_logits = True
    longest = max(len(row["input_ids"]) for row in rows)
    padding = [longest - len(row["input_ids"]) for row in rows]

    def batch(values: list[list[int]], filler: int) -> torch.Tensor:
        return torch.tensor([ids + [filler] * more for ids, more in zip(values, padding, strict=True)])

    with torch.inference_mode():
        loss = model(
            input_ids=batch([row["input_ids"] for row in rows], pad),
            attention_mask=batch([[1] * len(row["input_ids"]) for row in rows], 0),
            labels=batch([row["labels"] for row in rows], -100),
            use_cache=False,
        ).loss
    return float(loss)


def line(name: str, found: dict[str, Any]) -> str:
    """One line of the table."""
    return (
        f"{name:20} {found['sft_loss']:9.5f} {found['plain_loss']:9.5f} {found['dpo_first_loss']:9.5f} "
        f"{found['merge_difference']:9.1e}"
    )


def main() -> None:
    """Measure the named architectures, or all of them, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="the default is all architectures")
    names = parser.parse_args().names or list(ARCHITECTURES)
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    transformers.logging.disable_progress_bar()
    disable_progress_bars()
    print(f"{'':20} {'SFT':>9} {'plain':>9} {'DPO':>9} {'merge':>9}")
    results = {}
    for name in names:
        folder = Path(tempfile.mkdtemp())
        try:
            results[name] = measure(name, folder)
            print(line(name, results[name]), flush=True)
        finally:
            shutil.rmtree(folder)
    if names == list(ARCHITECTURES):
        RESULTS.write_text(
            json.dumps({"machine": machine(), "ln_2": math.log(2), "architectures": results}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
