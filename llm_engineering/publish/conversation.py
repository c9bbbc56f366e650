"""Greedy answers of a merged model, printed while they are written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from llm_engineering.data.rows import Message
from llm_engineering.formatting.render import prompt_ids
from llm_engineering.models.device import Device
from llm_engineering.models.loading import load_model
from llm_engineering.models.tokenizer import end_token_ids, load_tokenizer
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.training_blocks import ModelConfig


class Reply(NamedTuple):
    """An answer, and whether the model ended it by itself."""

    text: str
    stopped: bool


def has_room(
    messages: Sequence[Message], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
) -> bool:
    """Whether a conversation and an answer of so many tokens fit into what the model can read."""
    limit = getattr(model.config, "max_position_embeddings", None)
    return limit is None or len(prompt_ids(messages, tokenizer)) + max_new_tokens <= limit


class Conversation:
    """A model that answers on stdout, prompted as in training."""

    def __init__(
        self, folder: Path, device: Device, settings: Settings, max_new_tokens: int, trust_remote_code: bool
    ) -> None:
        merged = ModelConfig(name_or_path=str(folder), trust_remote_code=trust_remote_code)
        self.model = load_model(merged, settings, device).eval()
        self.tokenizer = load_tokenizer(merged, settings)
        self.max_new_tokens = max_new_tokens

    def has_room(self, messages: Sequence[Message]) -> bool:
        """Whether the conversation and an answer fit into what the model can read."""
        return has_room(messages, self.model, self.tokenizer, self.max_new_tokens)

    def answer(self, messages: Sequence[Message]) -> Reply:
        """Print the answer to the last message word by word, and return it."""
        ids = prompt_ids(messages, self.tokenizer)
        ends = end_token_ids(self.model, self.tokenizer)
        inputs = torch.tensor([ids], device=self.model.device)
        generate: Any = self.model.generate
        with torch.inference_mode():
            output = generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id,
                eos_token_id=ends,
                streamer=TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True),
            )
        new = output[0, len(ids) :].tolist()
        text = str(self.tokenizer.decode(new, skip_special_tokens=True)).strip()
        return Reply(text, bool(new) and new[-1] in ends)
