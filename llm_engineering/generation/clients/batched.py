"""Answers requests in batches. Each finished batch is stored, and never generated again."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from llm_engineering.generation.store import AnswerStore
from llm_engineering.generation.types import Answer, Messages, Reply, Sampling
from llm_engineering.models.device import Device
from llm_engineering.models.generate import batches_by_length
from llm_engineering.progress import Progress
from llm_engineering.recipe.model_blocks import ModelConfig

logger = logging.getLogger(__name__)


class BatchedModel:
    """A client whose model runs on this machine. Its subclasses generate a batch with transformers or with vLLM.

    Args:
        identity: everything besides the request that the answers depend on: the model, its revision and precision,
            the chat template if the recipe sets one, and the weights if it was trained here.
    """

    writes_json = False
    # Greedy decoding: the same passage gives the same question in every run.
    temperature: float | None = 0.0

    def __init__(self, tokenizer: PreTrainedTokenizerBase, identity: str, store: AnswerStore, batch_size: int) -> None:
        self.tokenizer = tokenizer
        self.identity = identity
        self.store = store
        self.batch_size = batch_size

    def answer(self, requests: Sequence[Messages], sampling: Sampling, what: str) -> list[Answer]:
        """Answer every request, in order. No request fails. Progress lines count `what`, e.g. `questions`."""
        keys = [self._key(sampling, request) for request in requests]
        prompts = [
            str(self.tokenizer.apply_chat_template(request, add_generation_prompt=True, tokenize=False))
            for request in requests
        ]
        return self._stored(keys, prompts, sampling, what)

    def complete(
        self, prompts: Sequence[str], sampling: Sampling, what: str, banned: Sequence[Sequence[str]] = ()
    ) -> list[Answer]:
        """Continue every text, in order, without the chat template. No text fails.

        The beginning that all prompts share, e.g. examples, is computed once. A completion ends before the first of
        `sampling.stop`.

        Args:
            banned: for each text, words that its completion may not have; no text has any if it is empty.
        """
        words = [list(own) for own in banned] or [[] for _ in prompts]
        # As in the texts that the model was trained on, the BOS token comes first where the tokenizer writes one.
        bos = self.tokenizer.bos_token_id
        begin = str(self.tokenizer.bos_token) if bos is not None and self.tokenizer("a")["input_ids"][0] == bos else ""
        keys = [self._key(sampling, prompt, own) for prompt, own in zip(prompts, words, strict=True)]
        texts = [begin + prompt for prompt in prompts]
        banned_tokens = {key: self._first_tokens(own) for key, own in zip(keys, words, strict=True)}
        answers = self._stored(keys, texts, sampling, what, banned_tokens)
        return [Answer(_until(answer.text, sampling.stop)) for answer in answers]

    def _key(self, sampling: Sampling, request: Messages | str, banned: Sequence[str] = ()) -> str:
        """The key of a request's answer in the store: a hash of everything that the answer depends on."""
        # Greedy answers do not depend on the seed.
        seed = sampling.seed if sampling.temperature else 0
        settings = [self.identity, sampling.max_new_tokens, list(sampling.stop), sampling.temperature, seed, *banned]
        return hashlib.sha256(json.dumps([settings, request]).encode()).hexdigest()[:24]

    def _first_tokens(self, words: Sequence[str]) -> list[int]:
        """The first token of each word, as it stands after a space, in small letters, and with a capital."""
        spelled = {f" {form}" for word in words for form in (word, word.lower(), word.capitalize())}
        return sorted({ids[0] for ids in self._ids(sorted(spelled))}) if spelled else []

    def _stored(
        self,
        keys: Sequence[str],
        texts: Sequence[str],
        sampling: Sampling,
        what: str,
        banned_tokens: Mapping[str, list[int]] | None = None,
    ) -> list[Answer]:
        """The answer to each text from the store; missing ones are generated and stored first.

        Args:
            banned_tokens: tokens that are not generated, by the key of the text. None if the texts are not completions, and
                then they share no beginning.
        """
        prompts = dict(zip(keys, texts, strict=True))
        # Prompts of similar length share a batch, which saves padding. Batches are formed from all prompts, stored ones
        # included: rounding depends on the batch, and a run that is killed and restarted must give the same answers.
        order = sorted(prompts)
        indices = batches_by_length([len(prompts[key]) for key in order], self.batch_size)
        batches = [[order[index] for index in batch] for batch in indices]
        # Without stop strings it matters whether an answer was cut, which the records of earlier versions do not say.
        known = self.store.answers
        stored = {key for key in order if key in known and (sampling.stop or known[key].finish != "stop")}
        missing = [batch for batch in batches if not stored.issuperset(batch)]
        count = sum(map(len, missing))
        if count < len(order):
            logger.info("%d of %d %s are stored already", len(order) - count, len(order), what)
        progress = Progress(what, count)
        # As the batches, the shared beginning is that of all prompts, stored ones included.
        shares_start = banned_tokens is not None and missing
        shared_start = self._start([prompts[key] for key in order]) if shares_start else None
        with self.store:
            for batch in missing:
                tokens = [banned_tokens[key] for key in batch] if banned_tokens else []
                new = self._generate([prompts[key] for key in batch], sampling, int(batch[0], 16), shared_start, tokens)
                self.store.add(dict(zip(batch, new, strict=True)))
                progress.advance(len(batch))
        replies = [self.store.answers[key] for key in keys]
        return [Answer(reply.text, is_cut=reply.finish == "length") for reply in replies]

    def _ids(self, prompts: list[str]) -> list[list[int]]:
        # The prompts hold their special tokens as text.
        return list(self.tokenizer(prompts, add_special_tokens=False)["input_ids"])

    def _start(self, prompts: list[str]) -> Any:
        """What `_generate` needs of the beginning that all prompts share; None if it computes each prompt alone."""
        return None

    def _generate(
        self,
        prompts: list[str],
        sampling: Sampling,
        seed: int,
        shared_start: Any = None,
        banned_tokens: Sequence[list[int]] = (),
    ) -> list[Reply]:
        raise NotImplementedError


def identity_of(
    model: ModelConfig,
    device: Device,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None,
    weights: str | None,
) -> str:
    """The identity of a model on this machine.

    Args:
        chat_template: the recipe's `formatting.chat_template`.
        weights: hash of the trained weights; None for the base model.
    """
    identity = f"{model.name_or_path}@{model.revision} in {str(device.dtype).removeprefix('torch.')}"
    if model.added_tokens:
        identity += f", new tokens {model.added_tokens}"
    if chat_template is not None:
        identity += f", chat template {hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()[:12]}"
    return identity if weights is None else f"{identity}, trained {weights[:12]}"


def _until(text: str, stop: Sequence[str]) -> str:
    """The text before the first stop string."""
    for string in stop:
        text = text.partition(string)[0]
    return text.strip()
