"""Loads the model in production (the incumbent): as an adapter beside the new ones, or alone if it does not fit them."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from llm_engineering.errors import RequestError, WorkError
from llm_engineering.evaluation.models import BASE, Models
from llm_engineering.models.new_tokens import with_added_tokens
from llm_engineering.models.revision import check_unchanged
from llm_engineering.models.tokenizer import load_tokenizer
from llm_engineering.recipe.evaluation_blocks import INCUMBENT, EvaluationConfig
from llm_engineering.recipe.model_blocks import ModelConfig
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.training_blocks import TrainingSetup


def incumbent_tokenizer(folder: Path, setup: TrainingSetup, settings: Settings) -> PreTrainedTokenizerBase:
    """Load the tokenizer that was saved with the incumbent, which has the chat template of its training."""
    return load_tokenizer(setup.model.saved_in(folder), settings)


def is_compatible(
    folder: Path, own: PreTrainedTokenizerBase, ours: PreTrainedTokenizerBase, setup: TrainingSetup
) -> bool:
    """Whether the incumbent has this recipe's base model, vocabulary, chat template and end token, so that both share one base.

    Args:
        own, ours: the tokenizers of the incumbent and of this recipe.
    """
    base = _base(folder, setup)
    return (
        (base is None or (base.name_or_path, base.revision) == (setup.model.name_or_path, setup.model.revision))
        and own.chat_template == ours.chat_template
        # Templates write these tokens by name.
        and (own.eos_token, own.bos_token) == (ours.eos_token, ours.bos_token)
        and own.get_vocab() == ours.get_vocab()
    )


def load_incumbent(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    config: EvaluationConfig,
    setup: TrainingSetup,
    settings: Settings,
) -> tuple[Models, str]:
    """Load the incumbent on its own base model. Returns the models and the incumbent's name among them.

    Raises:
        WorkError: its base model cannot be loaded, or has changed since the incumbent was trained.
    """
    base = _base(folder, setup)
    if base is None:
        return Models.load(setup.model.saved_in(folder), {}, tokenizer, config, setup.compute, settings), BASE
    try:
        check_unchanged(base)
        return Models.load(base, {INCUMBENT: folder}, tokenizer, config, setup.compute, settings), INCUMBENT
    except (RequestError, OSError) as error:
        raise WorkError(
            f"The model in production cannot be measured on its base model {base.name_or_path}: {error} Or take the model out "
            "of production."
        ) from error


def _base(folder: Path, setup: TrainingSetup) -> ModelConfig | None:
    """The base model of the incumbent's adapter; None if the incumbent is a full model."""
    file = folder / "adapter_config.json"
    if not file.is_file():
        return None
    adapter = json.loads(file.read_text(encoding="utf-8"))
    base = ModelConfig(
        name_or_path=adapter["base_model_name_or_path"],
        revision=adapter.get("revision"),
        trust_remote_code=setup.model.trust_remote_code,
    )
    return with_added_tokens(base, folder)
