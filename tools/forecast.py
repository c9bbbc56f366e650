"""Estimates the memory and the time of training before it starts."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from llm_engineering.errors import RequestError
from llm_engineering.models.device import Device, choose_device
from llm_engineering.recipe.online_blocks import OnlineConfig
from llm_engineering.recipe.recipe import Recipe
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.stages import STAGES
from llm_engineering.recipe.training_blocks import TrainConfig
from llm_engineering.training.estimate import (
    UTILISATION,
    Memory,
    Shapes,
    batch_shape,
    flops_per_token,
    free_memory,
    matmul_rate,
    peak_memory,
    remedy,
    shapes,
)
from tools.expected_rows import CHARACTERS_PER_TOKEN, TEXT_OF_KIND, Source, pair_rows
from tools.recipe_checks import checked_device, remembered

logger = logging.getLogger("llm_engineering.run")

# Tokens that a chat template adds around a question and an answer.
TEMPLATE_TOKENS = 30
# File formats in which the number of bytes is about the number of characters: they are not compressed.
_PLAIN = (".json", ".jsonl", ".csv")
GIB = 2**30


def estimate_lines(recipe: Recipe, stages: Sequence[str], source: Source | None = None) -> list[str]:
    """An estimate of training's memory and time, as lines of text. Only the model's configuration is downloaded."""
    if not stages:
        return []
    lines: list[str] = []
    try:
        device = _other_device(recipe) if recipe.compute.target != "local" else _device(recipe)
    except RequestError as error:
        lines.append(f"This machine cannot train this recipe: {error}")
        device = _other_device(recipe)
    try:
        found = {stage: _shapes(recipe, stage, device) for stage in stages}
    except (OSError, ValueError) as error:
        reason = f"the configuration of {recipe.model.name_or_path} cannot be read ({first_line(error)})"
        return [*lines, f"No estimate: {reason}."]
    here = not lines and recipe.compute.target == "local"
    where = "On this machine" if here else "On another machine"
    if recipe.compute.sagemaker is not None:
        where = f"On {recipe.compute.sagemaker.instance_type}"
    lines.append(f"{where} ({device.name}, {str(device.dtype).removeprefix('torch.')}, {device.backend}):")
    # Measured for 0.1 s, the rate is as steady as for half a second.
    rate = matmul_rate(device, seconds=0.1) if here else 0.0
    each = " in each process" if recipe.compute.num_processes > 1 else ""
    for stage in stages:
        config = recipe.block(stage)
        memory = _memory(recipe, config, found[stage], device)
        free = f"; {free_memory(device) / GIB:.1f} GiB are free" if here else ""
        lines.append(f"{stage}: about {memory} at its peak{each}, with rows of max_length{free}")
        if here:
            warning = _warning(recipe, stage, config, memory, device)
            lines += [f"WARNING: {warning}"] if warning else []
            lines.append(f"{stage}: {_time(recipe, stage, config, found[stage], rate, device, source)}")
    if recipe.compute.backend == "unsloth" or device.backend == "unsloth":
        lines.append("This estimate is for transformers. unsloth should need less memory and time.")
    return lines


def warn_of_memory(recipe: Recipe, stages: Sequence[str]) -> None:
    """Log a warning for each stage that may need more memory than is free. Jobs on other machines are not checked.

    Raises:
        RequestError: this machine cannot train the recipe.
    """
    if recipe.compute.target != "local":
        return
    device = _device(recipe)
    for stage in stages:
        config = recipe.block(stage)
        try:
            found = _shapes(recipe, stage, device)
        except (OSError, ValueError) as error:
            logger.warning("The memory that %s needs cannot be estimated: %s", stage, first_line(error))
            continue
        warning = _warning(recipe, stage, config, _memory(recipe, config, found, device), device)
        if warning:
            logger.warning("%s", warning)


def tokens_of(
    recipe: Recipe, stage: str, shares_prompts: bool = False, source: Source | None = None
) -> tuple[float, str] | None:
    """The number of tokens that an epoch is expected to compute, and its source; None if it is unknown before the data is prepared."""
    source = source or Source(recipe)
    kind = STAGES[stage].rows
    split = recipe.data.split
    share = 1 - split.validation_fraction - split.test_fraction
    if kind == "text":
        by_sentence = recipe.documents.unit == "sentence"
        parts = source.passages[0] if by_sentence else source.documents[0]
        tokens = share * sum(len(part.text) for part in parts) / CHARACTERS_PER_TOKEN
        tokens *= 1 + sum(TEXT_OF_KIND[kind] for kind in recipe.generation.rewritings)
        if recipe.knowledge is not None:
            tokens = min(tokens, recipe.knowledge.tokens / recipe.block(stage).num_train_epochs)
        replayed = recipe.data.replay.share if recipe.data.replay is not None else 0.0
        beside = ["the rewritings"] if recipe.generation.rewritings else []
        beside += ["the replay"] if replayed else []
        return tokens / (1 - replayed), " and ".join(
            [f"the size of {len(parts)} {'sentences' if by_sentence else 'documents'}", *beside]
        )
    own = recipe.data.own(kind)
    if own is not None:
        return _own_tokens(own, share)
    if recipe.data.file("instruction") is not None:
        return None
    writing = recipe.generation
    passages, _ = source.passages
    answers = [len(passage.text) / CHARACTERS_PER_TOKEN for passage in passages]
    if writing.answers == "model" and writing.answer_max_new_tokens is not None:
        answers = [float(writing.answer_max_new_tokens)] * len(passages)
    prompt = writing.question_max_new_tokens + TEMPLATE_TOKENS
    expected = source.instructions
    if kind in ("preference", "labelled"):
        prompts = prompt if shares_prompts else 2 * prompt
        answers = [prompts + answer + writing.rejected_max_new_tokens for answer in answers]
        expected = pair_rows(writing, expected)
    else:
        answers = [min(prompt + answer, recipe.formatting.max_length) for answer in answers]
    tokens = expected.about * sum(answers) / max(1, len(answers))
    return share * tokens, f"{expected.about} rows of {len(answers)} passages, before the rules of the data"


def _own_tokens(reference: str, share: float) -> tuple[float, str] | None:
    path = Path(reference).expanduser()
    if not path.is_file() or path.suffix not in _PLAIN:
        return None
    return share * path.stat().st_size / CHARACTERS_PER_TOKEN, f"the size of {path.name}"


def _device(recipe: Recipe) -> Device:
    return checked_device(recipe, choose_device(recipe.compute))


def _other_device(recipe: Recipe) -> Device:
    """A device of another machine, for the estimate: a CUDA card, or a CPU if `compute.device` is cpu."""
    dtype = torch.bfloat16 if recipe.compute.dtype == "auto" else getattr(torch, recipe.compute.dtype)
    return Device("cpu" if recipe.compute.device == "cpu" else "cuda", dtype, "sdpa", [])


def _shapes(recipe: Recipe, stage: str, device: Device) -> Shapes:
    rows, length = batch_shape(recipe.block(stage), recipe.formatting.max_length)
    trust, scores = recipe.model.trust_remote_code, not STAGES[stage].policy

    def found() -> dict[str, float]:
        # transformers takes seconds to import.
        from llm_engineering.models.base_model import load_config

        model = load_config(recipe.model, Settings())
        return shapes(model, recipe.method, recipe.lora, device, rows, length, trust, scores=scores)._asdict()

    asked = (
        recipe.method,
        recipe.lora.model_dump(mode="json"),
        str(device.dtype),
        device.attn_implementation,
        rows,
        length,
        scores,
    )
    return Shapes(**remembered(recipe.model, asked, found))


def _memory(recipe: Recipe, config: TrainConfig, found: Shapes, device: Device) -> Memory:
    rows, length = batch_shape(config, recipe.formatting.max_length)
    return peak_memory(found, config, device, recipe.method, rows, length, recipe.compute)


def _warning(recipe: Recipe, stage: str, config: TrainConfig, memory: Memory, device: Device) -> str:
    # Processes on a CPU share the machine's memory, and each process on CUDA has a card.
    needed, free = memory.total * (recipe.compute.num_processes if device.name == "cpu" else 1), free_memory(device)
    if needed <= free:
        return ""
    where = "the card" if device.name == "cuda" else "this machine"
    return (
        f"{stage} may need {needed / GIB:.1f} GiB of memory, and {where} has {free / GIB:.1f} GiB free. "
        f"If memory runs out: {remedy(config, stage, recipe.method)}."
    )


def _time(
    recipe: Recipe,
    stage: str,
    config: TrainConfig,
    found: Shapes,
    rate: float,
    device: Device,
    documents: Source | None,
) -> str:
    rows, length = batch_shape(config, recipe.formatting.max_length)
    flops = flops_per_token(found, config, recipe.method, length)
    processes = recipe.compute.num_processes
    # Processes on a CPU share its cores.
    speed = rate * UTILISATION[device.name] / flops * (processes if device.name == "cuda" else 1)
    how = (
        f"{speed:,.0f} tokens a second, from {flops / 1e9:.2f} GFLOP a token and {UTILISATION[device.name]:.0%} of the "
        f"{rate / 1e9:,.0f} GFLOP a second that matrix products reach here"
        f"{f' in each of {processes} processes' if processes > 1 and device.name == 'cuda' else ''}"
    )
    if isinstance(config, OnlineConfig):
        how += "; generating a token takes longer than its operations"
    if config.max_steps > 0:
        # As in transformers, in place of the epochs.
        tokens = float(config.max_steps * rows * config.gradient_accumulation_steps * processes * length)
        return f"about {_duration(tokens / speed)} for at most {tokens:,.0f} tokens (max_steps): {how}"
    if isinstance(config, OnlineConfig):
        return f"about {how}; the number of completions is known only after the data is formatted"
    # As `ReferenceTrainer` does with most models.
    shares = stage == "dpo" and device.backend == "transformers" and device.attn_implementation == "sdpa"
    known = tokens_of(recipe, stage, shares, documents)
    if known is None:
        return f"about {how}; the number of tokens is known only after the data is formatted"
    epoch, source = known
    tokens = epoch * config.num_train_epochs
    return f"about {_duration(tokens / speed)} for about {tokens:,.0f} tokens ({source}): {how}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, math.ceil(seconds))} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def first_line(error: Exception) -> str:
    """The first line of an error's message, or else the name of its class."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
