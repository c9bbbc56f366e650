"""Merges a base model and its trained adapter into one plain `transformers` model, and verifies the saved files.

The merge computes and saves in float32, because half precision loses updates smaller than half the last bit of a weight.
If the recipe names a smaller precision, the merged weights are rounded once, and the change of the
log-probabilities is measured on held-out rows.

The merge itself needs the memory of one weight file (`shards`). The comparison needs that of one model in float32.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import custom_object_save

from llm_engineering.errors import RequestError, WorkError
from llm_engineering.models.base_model import load_model
from llm_engineering.models.device import Device, choose_device
from llm_engineering.models.tokenizer import end_token_ids, load_tokenizer
from llm_engineering.progress import Progress, counted
from llm_engineering.publish.shards import (
    ShardedMerge,
    empty_model,
    rounded,
    weight_files,
    write_parts,
)
from llm_engineering.publish.verification import (
    HeldoutRow,
    TokenScores,
    Verification,
    check_same,
    precision,
    token_scores,
    verify,
)
from llm_engineering.recipe.compute_blocks import ComputeConfig
from llm_engineering.recipe.model_blocks import ModelConfig
from llm_engineering.recipe.settings import Settings
from llm_engineering.training.estimate import free_memory

logger = logging.getLogger(__name__)

VERIFICATION = "verification.json"
# Some thousands of answer tokens take seconds, and are more than enough to detect a wrong merge.
MAX_ROWS = 64
# Fields of generation_config.json that only sampling reads. transformers refuses to save them beside `do_sample: false`.
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


class Trained(NamedTuple):
    """A registered model: the base model, and the folder of an adapter or of a full model."""

    base: ModelConfig
    folder: Path

    @property
    def is_adapter(self) -> bool:
        """Whether the folder holds an adapter."""
        return (self.folder / "adapter_config.json").is_file()


def merged_device(compute: ComputeConfig) -> Device:
    """The device for a merged model. The precision of its files is `compute.dtype`, or float32 if that is `auto`."""
    if compute.dtype == "auto":
        # Flash attention has no float32 kernels. Training used it in half precision.
        attention = "sdpa" if compute.attn_implementation == "flash_attention_2" else compute.attn_implementation
        compute = compute.model_copy(update={"dtype": "float32", "attn_implementation": attention})
    return choose_device(compute)


def merge(
    trained: Trained,
    rows: Sequence[HeldoutRow],
    device: Device,
    dtype: torch.dtype,
    settings: Settings,
    target: Path,
    repetition_penalty: float = 1.0,
) -> Verification:
    """Write the merged model with tokenizer, chat template and end tokens to `target`, and verify it.

    Two things are verified: the merged model equals the trained model, and the written weights are the merged weights
    rounded to `dtype`.

    Args:
        rows: held-out rows; each is computed three or four times.
        device: with the precision of the base model in training. The rows are computed on the processor if the model does
            not fit on the card in float32.
        dtype: the precision of the written weights.
        repetition_penalty: written to generation_config.json, as the default for requests.

    Raises:
        RequestError: the memory is too small.
        WorkError: the merged model differs from the trained model, or the memory became full; `target` is then removed.
    """
    if not rows:
        raise WorkError("There is no held-out row to verify the merged model on. Give the recipe a larger test split.")
    saved = trained.base.saved_in(target)
    tokenizer = load_tokenizer(trained.base.saved_in(trained.folder), settings)
    source = trained.base if trained.is_adapter else trained.base.saved_in(trained.folder)
    # The adapter does not fit on an empty model without the rows of the new tokens.
    adapter = trained.folder if trained.is_adapter and not source.added_tokens else None
    empty = empty_model(source, adapter, settings)
    # The weights of a full model are those of training, in float32.
    read_in = device.dtype if trained.is_adapter else torch.float32
    sharded = ShardedMerge(empty, weight_files(source, settings), read_in, bool(source.added_tokens))
    device = _device_with_room(device, 4 * sum(p.numel() for p in sharded.plain.parameters()))
    if device.attn_implementation == "flash_attention_2":
        # Flash attention has no float32 kernels.
        device = device._replace(attn_implementation="sdpa")
    logger.info(
        "Merging in float32, saving in %s, and comparing the files with the trained model on %s. This is done once; later "
        "commands use the same files",
        precision(dtype),
        counted(len(rows), "held-out row"),
    )
    # The rows go through the base model, the trained one, the merged one, and the rounded one.
    progress = Progress("rows compared", len(rows) * (3 if dtype == torch.float32 else 4))
    try:
        # Score the base model and the trained one
        model, untrained = _trained_model(trained, rows, device, settings, progress)
        reference = token_scores(model, rows, progress)

        # Merge
        if sharded.obstacle is None:
            sharded.plain.generation_config = model.generation_config
            del model
            plain: PreTrainedModel = sharded.plain
            write_parts(sharded.parts(), target)
        else:
            logger.info("Merging in memory and not file by file, because %s", sharded.obstacle)
            plain = _merge_in_memory(model)
            plain.save_pretrained(target)
            del model
            plain.to("meta")  # type: ignore[arg-type]
        ends = end_token_ids(plain, tokenizer)
        _write_settings(plain, tokenizer, ends, repetition_penalty, torch.float32, target)

        # Verify the merged model, before rounding can hide an error
        written = load_model(saved, settings, device._replace(dtype=torch.float32)).eval()
        scores = token_scores(written, rows, progress)
        check_same(rows, reference, scores)

        # Round, and measure the change
        if dtype != torch.float32:
            del written
            write_parts(rounded(target, dtype), target)
            _write_settings(plain, tokenizer, ends, repetition_penalty, dtype, target)
            written = load_model(saved, settings, device._replace(dtype=dtype)).float().eval()
            scores = token_scores(written, rows, progress)
        verification = verify(rows, reference, scores, untrained, dtype)
        progress.end()
        _check_handling(written, target, tokenizer, ends)
    except (WorkError, torch.OutOfMemoryError) as error:
        shutil.rmtree(target, ignore_errors=True)
        if isinstance(error, WorkError):
            raise
        raise WorkError(
            "The memory of the card became full while the merged model was compared with the trained one in float32. Stop "
            "other programs that use the card, or compare on the processor: --set compute.device=cpu"
        ) from error
    (target / VERIFICATION).write_text(json.dumps(verification.model_dump(), indent=2) + "\n", encoding="utf-8")
    return verification


def _device_with_room(device: Device, needed: int) -> Device:
    """The device, or the processor if the card has not `needed` bytes of free memory.

    Raises:
        RequestError: the machine has not the memory either.
    """
    if device.name == "cuda" and free_memory(device) < needed:
        logger.info(
            "The merged model is compared on the processor: in float32 this takes %s, and the card has %s free",
            *(_gigabytes(needed), _gigabytes(free_memory(device))),
        )
        device = device._replace(name="cpu")
    if device.name == "cpu" and free_memory(device) < needed:
        raise RequestError(
            f"The merged model is compared with the trained one in float32, which takes {_gigabytes(needed)} of memory, and "
            f"this machine has {_gigabytes(free_memory(device))} free. Close other programs, or run this command on a "
            "machine with more memory."
        )
    return device


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def _trained_model(
    trained: Trained, rows: Sequence[HeldoutRow], device: Device, settings: Settings, progress: Progress
) -> tuple[PreTrainedModel | PeftModel, list[TokenScores]]:
    """The trained model, not merged, and the scores of its base model, both in float32."""
    # Loaded in the precision of training, and then converted to float32 without loss.
    base = load_model(trained.base, settings, device).float().eval()
    untrained = token_scores(base, rows, progress)
    if trained.is_adapter:
        return PeftModel.from_pretrained(base, str(trained.folder)).eval(), untrained
    del base
    full = trained.base.saved_in(trained.folder)
    return load_model(full, settings, device._replace(dtype=torch.float32)).eval(), untrained


def _merge_in_memory(model: Any) -> PreTrainedModel:
    """Merge the adapter of a `PeftModel`. A full model stays what it is."""
    if not isinstance(model, PeftModel):
        return model  # type: ignore[no-any-return]
    base: Any = model.get_base_model()
    ends = [base.get_input_embeddings(), base.get_output_embeddings()]
    if base.config.tie_word_embeddings and any(isinstance(end, LoraLayer) for end in ends):
        # Merging into the shared weights would change both layers, but the adapter is on one of them. With two weights,
        # PEFT notes in the config that they are not tied.
        output: Any = ends[1].get_base_layer() if isinstance(ends[1], LoraLayer) else ends[1]
        output.weight = torch.nn.Parameter(output.weight.clone())
    merged: PreTrainedModel = model.merge_and_unload(safe_merge=True)
    return merged


def _write_settings(
    plain: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ends: list[int],
    repetition_penalty: float,
    dtype: torch.dtype,
    target: Path,
) -> None:
    """Write everything except the weights: configuration, generation settings, tokenizer, and code from the hub."""
    assert plain.generation_config is not None
    for config in (plain.config, plain.generation_config):
        config.eos_token_id = ends
        config.pad_token_id = tokenizer.pad_token_id
    # The evaluation measured greedy answers. The base model's file may ask for samples.
    plain.generation_config.do_sample = False
    for name in _SAMPLING:
        setattr(plain.generation_config, name, None)
    plain.generation_config.repetition_penalty = repetition_penalty
    plain.config._name_or_path = ""
    plain.config.dtype = precision(dtype)
    plain.config.architectures = [type(plain).__name__]
    if plain.is_remote_code():
        custom_object_save(plain, target, config=plain.config)  # type: ignore[arg-type]
    plain.config.save_pretrained(target)
    plain.generation_config.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _check_handling(
    written: PreTrainedModel, target: Path, tokenizer: PreTrainedTokenizerBase, ends: list[int]
) -> None:
    """Check that the saved files have the chat template and the end tokens of training."""
    read = type(tokenizer).from_pretrained(target)
    assert written.generation_config is not None
    turn = [{"role": "user", "content": "a"}]
    prompts = [t.apply_chat_template(turn, add_generation_prompt=True, tokenize=False) for t in (read, tokenizer)]
    if prompts[0] != prompts[1] or written.generation_config.eos_token_id != ends:
        raise WorkError(
            "The model is not registered: its saved files have another chat template or other end tokens than in training "
            f"({written.generation_config.eos_token_id}, not {ends})."
        )
