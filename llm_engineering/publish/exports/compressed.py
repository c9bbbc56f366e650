"""Quantises a merged model with llm-compressor: FP8, or 4 bits by AWQ, for vLLM and transformers.

The files have the format of compressed-tensors. They are loaded and asked by transformers before the folder gets its name.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from llm_engineering.data.rows import Message
from llm_engineering.errors import RequestError
from llm_engineering.evaluation.measures.exam import ExamRow
from llm_engineering.formatting.render import prompt_ids
from llm_engineering.models.base_model import load_model
from llm_engineering.models.device import Device
from llm_engineering.models.generate import generate_ids
from llm_engineering.models.tokenizer import load_tokenizer
from llm_engineering.publish.merge import VERIFICATION, merged_device
from llm_engineering.publish.verification import FileCheck, HeldoutRow, compare_files, token_scores
from llm_engineering.recipe.recipe import Recipe
from llm_engineering.recipe.settings import Settings

logger = logging.getLogger(__name__)

Compressed = Literal["FP8", "AWQ"]
# Rows on which AWQ measures activations. Its paper (arXiv:2306.00978) needs no more than 192 sequences.
CALIBRATION_ROWS = 192
# Weights that share a scale, the first choice first: the sizes for which vLLM has kernels.
_GROUP_SIZES = (128, 64, 32)
_BATCH = 32


def check_compressed(quant: Compressed, device: Device) -> None:
    """Raise a RequestError if llm-compressor is missing, or needs a card."""
    if importlib.util.find_spec("llmcompressor") is None:
        raise RequestError(
            f"QUANT={quant} needs llm-compressor, which is not installed. Install it: .venv/bin/pip install -c requirements.lock "
            "-e '.[compressed]'"
        )
    if quant == "AWQ" and device.name != "cuda":
        raise RequestError(
            "QUANT=AWQ needs a CUDA card, on which llm-compressor searches the scales. QUANT=FP8 needs none, and FORMAT=gguf has "
            "kinds with 4 bits."
        )


def export_compressed(
    folder: Path,
    output: Path,
    recipe: Recipe,
    quant: Compressed,
    rows: Sequence[HeldoutRow],
    exam: Sequence[tuple[ExamRow, bool]],
    max_new_tokens: int,
    calibration: Sequence[list[int]],
    settings: Settings,
) -> FileCheck:
    """Write the quantised model to a new folder, ask it, and keep it if it loses no more than the recipe allows.

    Layers that predict tokens (`lm_head`) keep their precision, which is bfloat16.

    Args:
        rows: held-out rows to score.
        exam: questions, each with whether the trained model answered it right.
        max_new_tokens: the limit of an answer to them.
        calibration: token ids of training rows, for AWQ.

    Raises:
        RequestError: AWQ cannot divide the model's matrices into groups.
        WorkError: the model loses too much. There is no folder then.
    """
    source = recipe.model.saved_in(folder)
    device = merged_device(recipe.compute.here)
    model, tokenizer = load_model(source, settings, device).eval(), load_tokenizer(source, settings)
    expected = token_scores(model, rows)
    # It gets its name when it has passed.
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _quantise(model.to(torch.bfloat16), quant, calibration)
        weights = ("*.safetensors", "*.safetensors.index.json", "config.json", VERIFICATION)
        shutil.copytree(folder, partial, ignore=shutil.ignore_patterns(*weights))
        model.save_pretrained(partial, save_compressed=True)
        del model
        written = load_model(
            source.model_copy(update={"name_or_path": str(partial)}), settings, device._replace(dtype=torch.bfloat16)
        ).eval()
        prompts = [prompt_ids([Message(role="user", content=row.question)], tokenizer) for row, _ in exam]
        answers: list[list[int]] = []
        for start in range(0, len(prompts), _BATCH):
            batch = prompts[start : start + _BATCH]
            answers += generate_ids(written, tokenizer, batch, max_new_tokens, do_sample=False)
        texts = [str(tokenizer.decode(answer, skip_special_tokens=True)).strip() for answer in answers]
        check = FileCheck(
            computed_by="transformers",
            quant=quant,
            tensors=_stored_types(partial),
            rows=len(rows),
            **compare_files(expected, token_scores(written, rows)),
            asked=len(exam),
            right=sum(row.is_right(text) for (row, _), text in zip(exam, texts, strict=True)),
            right_before=sum(was_right for _, was_right in exam),
        )
        logger.info("Asked:       %s: %s", output.name, check.sentence)
        check.require(recipe.export)
        if output.exists():
            output.rmdir()
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return check


def _quantise(model: PreTrainedModel, quant: Compressed, calibration: Sequence[list[int]]) -> None:
    # Without this, llm-compressor adds lines of its own to the terminal and to a file.
    os.environ["LLM_COMPRESSOR_LOG_DISABLED"] = "true"
    from llmcompressor.entrypoints.oneshot import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    linear: dict[str, Any] = {"targets": ["Linear"]}
    if quant == "FP8":
        oneshot(model=model, recipe=QuantizationModifier(**linear, scheme="FP8_DYNAMIC", ignore=["lm_head"]))
        return
    weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": _group_size(model)}
    groups = QuantizationModifier(config_groups={"group_0": {**linear, "weights": weights}}, ignore=["lm_head"])
    oneshot(
        model=model,
        recipe=[AWQModifier(), groups],
        dataset=Dataset.from_dict({"input_ids": calibration}),
        num_calibration_samples=len(calibration),
        max_seq_length=max(map(len, calibration)),
    )


def _group_size(model: PreTrainedModel) -> int:
    """The largest group size that divides the rows of all matrices.

    Raises:
        RequestError: none does.
    """
    widths = {
        module.in_features
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head")
    }
    size = next((size for size in _GROUP_SIZES if all(width % size == 0 for width in widths)), None)
    if size is None:
        raise RequestError(
            f"QUANT=AWQ groups {', '.join(map(str, _GROUP_SIZES))} weights, and this model has matrices with rows of "
            f"{', '.join(map(str, sorted(widths)))}. Use QUANT=FP8."
        )
    return size


def _stored_types(folder: Path) -> dict[str, int]:
    """The number of tensors by their type in the files."""
    from safetensors import safe_open

    found: Counter[str] = Counter()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            found.update(tensors.get_slice(name).get_dtype() for name in tensors.keys())  # noqa: SIM118 - not a dict
    return dict(found)
