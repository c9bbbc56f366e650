"""Answers requests with the local model, in batches. Each finished batch is stored, and never generated again."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList, StopStringCriteria

from llm_engineering.generation.store import STORE_FILE, AnswerStore, key_of
from llm_engineering.generation.types import Answer, Messages, Reply, Sampling
from llm_engineering.models.base_model import load_model, weights_hash
from llm_engineering.models.device import choose_device
from llm_engineering.models.generate import SharedStart, batches_by_length, compute_shared_start, generate_ids
from llm_engineering.models.tokenizer import end_token_ids, load_tokenizer
from llm_engineering.progress import Progress
from llm_engineering.recipe.compute_blocks import ComputeConfig
from llm_engineering.recipe.model_blocks import ModelConfig
from llm_engineering.recipe.settings import Settings

logger = logging.getLogger(__name__)


class LocalModel:
    """A client whose model runs in this process.

    Args:
        identity: everything besides the request that the answers depend on: the model, its revision and precision,
            and the chat template if the recipe sets one.
        weights: hash of the weights if the model was trained here; None for a base model.
    """

    writes_json = False
    # Greedy decoding: the same passage gives the same question in every run.
    temperature: float | None = 0.0

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        identity: str,
        store: AnswerStore,
        batch_size: int,
        weights: str | None = None,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.identity = identity
        self.store = store
        self.batch_size = batch_size
        self.weights = weights

    @classmethod
    def load(
        cls,
        model: ModelConfig,
        compute: ComputeConfig,
        batch_size: int,
        settings: Settings,
        chat_template: str | None = None,
        trained: Path | None = None,
    ) -> LocalModel:
        """Load a model on this machine, with the answers stored by earlier runs.

        Args:
            trained: folder of an adapter or a full model that was trained from the base model; None for the base model.
        """
        device = choose_device(compute)
        tokenizer = load_tokenizer(model, settings, chat_template)
        identity = f"{model.name_or_path}@{model.revision} in {str(device.dtype).removeprefix('torch.')}"
        if model.added_tokens:
            identity += f", new tokens {model.added_tokens}"
        if chat_template is not None:
            identity += f", chat template {hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()[:12]}"
        store = AnswerStore(settings.llm_output_dir / STORE_FILE)
        if trained is None:
            return cls(load_model(model, settings, device), tokenizer, identity, store, batch_size)
        weights = weights_hash(trained)
        identity += f", trained {weights[:12]}"
        if (trained / "adapter_config.json").is_file():
            adapted = PeftModel.from_pretrained(load_model(model, settings, device), str(trained))
            return cls(adapted.merge_and_unload(), tokenizer, identity, store, batch_size, weights)
        full = ModelConfig(name_or_path=str(trained), trust_remote_code=model.trust_remote_code)
        return cls(load_model(full, settings, device), tokenizer, identity, store, batch_size, weights)

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
        without = {key: self._first_tokens(own) for key, own in zip(keys, words, strict=True)}
        answers = self._stored(keys, texts, sampling, what, without)
        return [Answer(_until(answer.text, sampling.stop)) for answer in answers]

    def _key(self, sampling: Sampling, request: Messages | str, banned: Sequence[str] = ()) -> str:
        """The key of a request's answer in the store: a hash of everything that the answer depends on."""
        # Greedy answers do not depend on the seed.
        seed = sampling.seed if sampling.temperature else 0
        settings = [self.identity, sampling.max_new_tokens, list(sampling.stop), sampling.temperature, seed, *banned]
        digest = hashlib.sha256(json.dumps([settings, request]).encode()).hexdigest()[:24]
        return key_of(digest, self.weights)

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
        without: Mapping[str, list[int]] | None = None,
    ) -> list[Answer]:
        """The answer to each text from the store; missing ones are generated and stored first.

        Args:
            without: tokens that are not generated, by the key of the text. None if the texts are not completions, and
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
        start = (
            compute_shared_start(self.model, self._ids([prompts[key] for key in order]))
            if without is not None and missing
            else None
        )
        with self.store:
            for batch in missing:
                tokens = [without[key] for key in batch] if without else []
                new = self._generate(
                    [prompts[key] for key in batch], sampling, int(batch[0].partition("-")[0], 16), start, tokens
                )
                self.store.add(dict(zip(batch, new, strict=True)))
                progress.advance(len(batch))
        replies = [self.store.answers[key] for key in keys]
        return [Answer(reply.text, is_cut=reply.finish == "length") for reply in replies]

    def _ids(self, prompts: list[str]) -> list[list[int]]:
        # The prompts hold their special tokens as text.
        return list(self.tokenizer(prompts, add_special_tokens=False)["input_ids"])

    def _generate(
        self,
        prompts: list[str],
        sampling: Sampling,
        seed: int,
        start: SharedStart | None = None,
        without: Sequence[list[int]] = (),
    ) -> list[Reply]:
        # top_k 0 and top_p 1 sample from the whole distribution, whatever the model's generation config says.
        sampled = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
        stop = [StopStringCriteria(self.tokenizer, list(sampling.stop))] if sampling.stop else []
        with torch.inference_mode(), torch.random.fork_rng():
            # Each batch has its own seed, from its first request, so stored batches do not change the others' samples.
            torch.manual_seed(seed % 2**63)
            new = generate_ids(
                self.model,
                self.tokenizer,
                self._ids(prompts),
                sampling.max_new_tokens,
                start,
                without,
                **(sampled if sampling.temperature else {"do_sample": False}),
                stopping_criteria=StoppingCriteriaList(stop),
            )
        texts = [text.strip() for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]
        if sampling.stop:
            return [Reply(text) for text in texts]
        ends = end_token_ids(self.model, self.tokenizer)
        finished = ["end" if ids and ids[-1] in ends else "length" for ids in new]
        return [Reply(text, finish) for text, finish in zip(texts, finished, strict=True)]


def _until(text: str, stop: Sequence[str]) -> str:
    """The text before the first stop string."""
    for string in stop:
        text = text.partition(string)[0]
    return text.strip()
