"""Merges a base model and its trained adapter into one plain `transformers` model, and verifies the saved files.

The merge computes and saves in float32, because half precision loses updates smaller than half the last bit of a weight.
If the recipe names a smaller precision, the merged weights are rounded once, and the change of the
log-probabilities is measured on held-out rows.
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

from llm_engineering.errors import WorkError
from llm_engineering.models.base_model import load_model
from llm_engineering.models.device import Device, choose_device
from llm_engineering.models.tokenizer import end_token_ids, load_tokenizer
from llm_engineering.progress import Progress, counted
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
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.training_blocks import ModelConfig

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
    rounded to `dtype`. This needs four to six bytes of memory for each parameter.

    Args:
        rows: held-out rows; each is computed three or four times.
        device: with the precision of the base model in training.
        dtype: the precision of the written weights.
        repetition_penalty: written to generation_config.json, as the default for requests.

    Raises:
        WorkError: the merged model differs from the trained model; `target` is then removed.
    """
    if not rows:
        raise WorkError("There is no held-out row to verify the merged model on. Give the recipe a larger test split.")
    trust = trained.base.trust_remote_code
    tokenizer = load_tokenizer(ModelConfig(name_or_path=str(trained.folder), trust_remote_code=trust), settings)
    if device.attn_implementation == "flash_attention_2":
        # Flash attention has no float32 kernels.
        device = device._replace(attn_implementation="sdpa")
    logger.info(
        "Merging in float32, saving in %s, and comparing the files with the trained model on %s. This is done once; later "
        "commands use the same files",
        precision(dtype),
        counted(len(rows), "held-out row"),
    )
    # The rows go through the base model, the trained one, the saved one, and before rounding the merged one.
    progress = Progress("rows compared", len(rows) * (3 if dtype == torch.float32 else 4))
    reference, untrained, merged = _merged(trained, rows, device, settings, progress)
    if dtype != torch.float32:
        # Checked before rounding, so that rounding cannot hide another error.
        check_same(rows, reference, token_scores(merged, rows, progress))
    ends = end_token_ids(merged, tokenizer)
    merged.generation_config.repetition_penalty = repetition_penalty
    _write(merged, tokenizer, ends, dtype, target)
    try:
        saved = ModelConfig(name_or_path=str(target), trust_remote_code=trained.base.trust_remote_code)
        written = load_model(saved, settings, device._replace(dtype=dtype)).eval()
        _check_weights(written, merged)
        del merged
        verification = verify(rows, reference, token_scores(written.float(), rows, progress), untrained, dtype)
        progress.end()
        _check_handling(written, target, tokenizer, ends)
    except WorkError:
        shutil.rmtree(target)
        raise
    (target / VERIFICATION).write_text(json.dumps(verification.model_dump(), indent=2) + "\n", encoding="utf-8")
    return verification


def _merged(
    trained: Trained, rows: Sequence[HeldoutRow], device: Device, settings: Settings, progress: Progress
) -> tuple[list[TokenScores], list[TokenScores], PreTrainedModel]:
    """Scores of the trained model, scores of its base model, and the merged model, all in float32."""
    # Loaded in the precision of training, and then converted to float32 without loss.
    base = load_model(trained.base, settings, device).float().eval()
    untrained = token_scores(base, rows, progress)
    if not trained.is_adapter:
        del base
        folder = ModelConfig(name_or_path=str(trained.folder), trust_remote_code=trained.base.trust_remote_code)
        full = load_model(folder, settings, device._replace(dtype=torch.float32)).eval()
        return token_scores(full, rows, progress), untrained, full
    model = PeftModel.from_pretrained(base, str(trained.folder)).eval()
    reference = token_scores(model, rows, progress)
    ends = [base.get_input_embeddings(), base.get_output_embeddings()]
    if base.config.tie_word_embeddings and any(isinstance(end, LoraLayer) for end in ends):
        # Merging into the shared weights would change both layers, but the adapter is on one of them. With two weights,
        # PEFT notes in the config that they are not tied.
        output: Any = ends[1].get_base_layer() if isinstance(ends[1], LoraLayer) else ends[1]
        output.weight = torch.nn.Parameter(output.weight.clone())
    merged: PreTrainedModel = model.merge_and_unload(safe_merge=True)
    return reference, untrained, merged


def _write(
    merged: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ends: list[int], dtype: torch.dtype, target: Path
) -> None:
    assert merged.generation_config is not None
    merged.to(dtype)  # type: ignore[arg-type]
    for config in (merged.config, merged.generation_config):
        config.eos_token_id = ends
        config.pad_token_id = tokenizer.pad_token_id
    # The evaluation measured greedy answers. The base model's file may ask for samples.
    merged.generation_config.do_sample = False
    for name in _SAMPLING:
        setattr(merged.generation_config, name, None)
    merged.config._name_or_path = ""
    merged.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _check_weights(written: PreTrainedModel, merged: PreTrainedModel) -> None:
    """Check that the files hold exactly the merged weights, as they were rounded."""
    saved, expected = written.state_dict(), merged.state_dict()
    different = [
        name
        for name in sorted(saved.keys() | expected.keys())
        if name not in saved or name not in expected or not torch.equal(saved[name].float(), expected[name].float())
    ]
    if different:
        raise WorkError(
            f"The model is not registered: the saved weights are not those of the merged model, at {different[0]} and "
            f"{len(different) - 1} others. Check the disk, and run the same command again."
        )


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
