"""Makes one plain `transformers` model of a base model and what was trained on it, and verifies the files.

Merging computes in float32: an update smaller than half the last bit of a half-precision weight would otherwise be
rounded away before it is added. The sum is rounded once, to the precision of the recipe, when it is saved.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from llm_engineering.compute.device import Device
from llm_engineering.config import ModelConfig
from llm_engineering.errors import WorkError
from llm_engineering.export.verify import HeldoutRow, TokenScores, Verification, token_scores, verify
from llm_engineering.models import end_token_ids, load_model, load_tokenizer
from llm_engineering.settings import Settings

logger = logging.getLogger(__name__)

VERIFICATION = "verification.json"
# Some thousands of answer tokens: seconds, and far more than a wrong merge needs to show.
MAX_ROWS = 64


class Trained(NamedTuple):
    """A trained model as it is registered: the base model, and the folder of an adapter or of a full model."""

    base: ModelConfig
    folder: Path

    @property
    def is_adapter(self) -> bool:
        """Whether the folder holds an adapter."""
        return (self.folder / "adapter_config.json").is_file()


def merge(
    trained: Trained, rows: Sequence[HeldoutRow], device: Device, settings: Settings, target: Path
) -> Verification:
    """Write the merged model with tokenizer, chat template and end tokens to `target`, if it passes its verification.

    It needs four bytes of memory for each parameter. What is compared with the trained model are the files as they
    were written.

    Args:
        rows: held-out ones; as many as are wanted, each is computed three times.
        device: its precision is that of the saved weights.

    Raises:
        WorkError: the merged model differs from the trained one; `target` is then not there.
    """
    if not rows:
        raise WorkError("There is no held-out row to verify the merged model on. Give the recipe a larger test split.")
    tokenizer = load_tokenizer(ModelConfig(name_or_path=str(trained.folder)), settings)
    logger.info("Merging in float32, saving in %s", str(device.dtype).removeprefix("torch."))
    reference, untrained, merged = _merged(trained, rows, device, settings)
    ends = end_token_ids(merged, tokenizer)
    _write(merged, tokenizer, ends, device.dtype, target)
    del merged
    try:
        logger.info("Verifying the saved files on %d held-out rows", len(rows))
        written = AutoModelForCausalLM.from_pretrained(
            target,
            dtype=torch.float32,
            attn_implementation=device.attn_implementation,
            trust_remote_code=trained.base.trust_remote_code,
        )
        written.eval().to(device.name)
        verification = verify(rows, reference, token_scores(written, rows), device.dtype, untrained)
        _check_handling(written, target, tokenizer, ends)
    except WorkError:
        shutil.rmtree(target)
        raise
    (target / VERIFICATION).write_text(json.dumps(verification.model_dump(), indent=2) + "\n", encoding="utf-8")
    return verification


def _merged(
    trained: Trained, rows: Sequence[HeldoutRow], device: Device, settings: Settings
) -> tuple[list[TokenScores], list[TokenScores] | None, PreTrainedModel]:
    """Scores of the trained model, those of the base model where there is an adapter, and the merged model in float32."""
    if not trained.is_adapter:
        folder = ModelConfig(name_or_path=str(trained.folder), trust_remote_code=trained.base.trust_remote_code)
        full = load_model(folder, settings, device._replace(dtype=torch.float32)).eval()
        return token_scores(full, rows), None, full
    # In the precision that was trained and measured, and from there on without loss.
    base = load_model(trained.base, settings, device).float()
    model = PeftModel.from_pretrained(base, str(trained.folder)).eval()
    reference = token_scores(model, rows)
    with model.disable_adapter():
        untrained = token_scores(model, rows)
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
    merged.config._name_or_path = ""
    merged.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _check_handling(
    written: PreTrainedModel, target: Path, tokenizer: PreTrainedTokenizerBase, ends: list[int]
) -> None:
    """Whether the files prompt and end as the trained model does."""
    read = AutoTokenizer.from_pretrained(target)
    assert written.generation_config is not None
    turn = [{"role": "user", "content": "a"}]
    same_prompt = [t.apply_chat_template(turn, add_generation_prompt=True, tokenize=False) for t in (read, tokenizer)]
    if same_prompt[0] != same_prompt[1] or written.generation_config.eos_token_id != ends:
        raise WorkError(
            "The model is not registered: its saved files prompt it with another chat template or end its answers with "
            f"other tokens than it was trained with ({written.generation_config.eos_token_id}, not {ends})."
        )
