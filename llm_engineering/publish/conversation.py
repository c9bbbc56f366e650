"""Answers of a model, greedy or sampled, printed while they are written."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from llm_engineering.data.rows import Message
from llm_engineering.errors import RequestError
from llm_engineering.formatting.render import UnrenderableError, checked_text, contains_text, prompt_ids
from llm_engineering.models.base_model import load_model
from llm_engineering.models.device import Device
from llm_engineering.models.generate import context_length
from llm_engineering.models.tokenizer import end_token_ids, load_tokenizer
from llm_engineering.recipe.model_blocks import ModelConfig
from llm_engineering.recipe.settings import Settings


class ChatReply(NamedTuple):
    """An answer, and whether it ended with an end token."""

    text: str
    stopped: bool


class ChatSampling(NamedTuple):
    """How the next token is chosen.

    Attributes:
        temperature: divides the logits; 0 takes the most probable token (greedy).
        top_p: tokens are drawn from the most probable ones that together reach this probability; 1 keeps all tokens.
        seed: the same conversation with the same seed gets the same answer.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    @classmethod
    def checked(cls, temperature: float, top_p: float, seed: int | None) -> ChatSampling:
        """Check the values of the command line, and draw a seed if there is none.

        Raises:
            RequestError: a value is out of its range, or would have no effect.
        """
        # The comparisons refuse nan too.
        if not 0 <= temperature < float("inf"):
            raise RequestError(f"--temperature must be 0 (greedy) or more, not {temperature:g}.")
        if not 0 < top_p <= 1:
            raise RequestError(f"--top-p must be more than 0 and at most 1, not {top_p:g}.")
        if temperature == 0 and top_p != 1:
            raise RequestError("--top-p has no effect at temperature 0 (greedy): add --temperature, e.g. 0.7.")
        # A drawn seed is short enough to type again.
        return cls(temperature, top_p, secrets.randbelow(2**32) if seed is None else seed)

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of `generate`."""
        if self.temperature == 0:
            return {"do_sample": False}
        # 0 switches off the top_k that a model's generation_config may have.
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}


GREEDY = ChatSampling()


def has_room(
    messages: Sequence[Message], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
) -> bool:
    """Whether a conversation and an answer of `max_new_tokens` fit into the context of the model."""
    limit = context_length(model)
    return limit is None or len(prompt_ids(messages, tokenizer)) + max_new_tokens <= limit


def answer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    max_new_tokens: int,
    sampling: ChatSampling = GREEDY,
    **options: Any,
) -> ChatReply:
    """Answer the last message, with the prompt format of training; `options` are arguments of `generate`."""
    ids = prompt_ids(messages, tokenizer)
    ends = end_token_ids(model, tokenizer)
    inputs = torch.tensor([ids], device=model.device)
    # Seeded before each answer, so that it does not depend on earlier random numbers.
    torch.manual_seed(sampling.seed)
    with torch.inference_mode():
        output = model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=ends,
            **sampling.options,
            **options,
        )
    new = output[0, len(ids) :].tolist()
    return ChatReply(str(tokenizer.decode(new, skip_special_tokens=True)).strip(), bool(new) and new[-1] in ends)


def check_system(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that the chat template includes the system message that `messages` begins with.

    Raises:
        RequestError: the template refuses system messages, or leaves them out.
    """
    try:
        shown = contains_text(checked_text(tokenizer, messages, True), messages[0].content)
    except UnrenderableError:
        shown = False
    if not shown:
        raise RequestError("The model's chat template does not include system messages: run without --system.")


class Conversation:
    """A merged model that prints its answers to stdout."""

    def __init__(
        self,
        folder: Path,
        device: Device,
        settings: Settings,
        max_new_tokens: int,
        trust_remote_code: bool,
        sampling: ChatSampling = GREEDY,
    ) -> None:
        merged = ModelConfig(name_or_path=str(folder), trust_remote_code=trust_remote_code)
        self.model = load_model(merged, settings, device).eval()
        self.tokenizer = load_tokenizer(merged, settings)
        self.max_new_tokens = max_new_tokens
        self.sampling = sampling

    def has_room(self, messages: Sequence[Message]) -> bool:
        """Whether the conversation and an answer fit into the context of the model."""
        return has_room(messages, self.model, self.tokenizer, self.max_new_tokens)

    def answer(self, messages: Sequence[Message]) -> ChatReply:
        """Print the answer to the last message word by word, and return it."""
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        return answer(self.model, self.tokenizer, messages, self.max_new_tokens, self.sampling, streamer=streamer)
