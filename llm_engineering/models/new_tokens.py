"""Adds the recipe's new tokens to a tokenizer, and their rows to a model's embeddings.

The tokenizer that is saved beside a trained model names the tokens that training added to the base model, so that the base
model can be loaded again with the same rows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AddedToken, PreTrainedModel, PreTrainedTokenizerBase

from llm_engineering.errors import RequestError
from llm_engineering.recipe.model_blocks import ModelConfig

# The keys of the recipe's block `model`, and of tokenizer_config.json: tokens of ordinary text, and special tokens.
PLAIN, SPECIAL = "new_tokens", "new_special_tokens"


def add_new_tokens(tokenizer: PreTrainedTokenizerBase, model: ModelConfig) -> list[int]:
    """Add the new tokens, and note them in the tokenizer's configuration. Returns their ids.

    Raises:
        RequestError: the tokenizer has one of them already.
    """
    known = tokenizer.get_vocab()
    for key in (PLAIN, SPECIAL):
        tokens: list[str] = getattr(model, key)
        found = next((token for token in tokens if token in known), None)
        if found is not None:
            raise RequestError(
                f"model.{key} names {found}, which is a token of {model.name_or_path} already. Remove it from the list; "
                f"lora.trainable_token_indices: [{known[found]}] trains it."
            )
        # Found in the text as it was written, before a normalizer changes it.
        added = [AddedToken(token, special=key == SPECIAL, normalized=False) for token in tokens]
        tokenizer.add_tokens(added, special_tokens=key == SPECIAL)
        # A base model that was itself trained with new tokens may name those: they are no longer new.
        tokenizer.init_kwargs.pop(key, None)
        if tokens:
            tokenizer.init_kwargs[key] = tokens
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    return [vocabulary[token] for token in model.added_tokens]


def add_rows(loaded: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, model: ModelConfig) -> None:
    """Give the model's input and output embeddings a row for each new token: the mean of the rows of its pieces.

    The pieces are the tokens that spell the new token without it. An embedding that has unused rows is not enlarged.

    Args:
        tokenizer: the base model's own; the new tokens are added to it.

    Raises:
        RequestError: the tokenizer has a new token already, or no tokens that spell it.
    """
    pieces: list[list[int]] = tokenizer(model.added_tokens, add_special_tokens=False)["input_ids"]
    for token, spelt in zip(model.added_tokens, pieces, strict=True):
        if not spelt:
            raise RequestError(
                f"The tokenizer of {model.name_or_path} has no tokens that spell the new token {token}, so its row of the "
                "embedding has no start value. Use other characters."
            )
    ids = add_new_tokens(tokenizer, model)
    embedding: Any = loaded.get_input_embeddings()
    if max(ids) >= len(embedding.weight):
        # The rows that this fills with random numbers are set below.
        loaded.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    # A model that scores rows has no output embedding.
    ends = (loaded.get_input_embeddings(), loaded.get_output_embeddings())
    layers: list[Any] = [layer for layer in ends if layer is not None]
    with torch.no_grad():
        for weight in (w for layer in layers for w in (layer.weight, getattr(layer, "bias", None)) if w is not None):
            for index, spelt in zip(ids, pieces, strict=True):
                weight[index] = weight[spelt].float().mean(dim=0).to(weight.dtype)


def with_added_tokens(base: ModelConfig, trained: Path) -> ModelConfig:
    """The base model of a trained one, with the tokens that training added.

    Args:
        trained: the folder of the adapter or full model, with its tokenizer.
    """
    file = trained / "tokenizer_config.json"
    saved = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return base.model_copy(update={key: saved.get(key, []) for key in (PLAIN, SPECIAL)})
