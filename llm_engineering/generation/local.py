"""Answers requests with the local model, in batches. Each finished batch is stored, and never generated again."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_engineering.generation.store import STORE_FILE, AnswerStore
from llm_engineering.generation.types import Answer, Messages, Reply, Sampling
from llm_engineering.models.base_model import load_model
from llm_engineering.models.device import choose_device
from llm_engineering.models.generate import batches_by_length, generate_ids
from llm_engineering.models.tokenizer import load_tokenizer
from llm_engineering.progress import Progress
from llm_engineering.recipe.compute_blocks import ComputeConfig
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.training_blocks import ModelConfig

logger = logging.getLogger(__name__)


class LocalModel:
    """A client whose model runs in this process.

    Args:
        identity: everything besides the request that the answers depend on: the model, its revision and precision,
            and the chat template if the recipe sets one.
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
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.identity = identity
        self.store = store
        self.batch_size = batch_size

    @classmethod
    def load(
        cls,
        model: ModelConfig,
        compute: ComputeConfig,
        batch_size: int,
        settings: Settings,
        chat_template: str | None = None,
    ) -> LocalModel:
        """Load the base model on this machine, with the answers stored by earlier runs."""
        device = choose_device(compute)
        tokenizer = load_tokenizer(model, settings, chat_template)
        identity = f"{model.name_or_path}@{model.revision} in {str(device.dtype).removeprefix('torch.')}"
        if chat_template is not None:
            identity += f", chat template {hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()[:12]}"
        store = AnswerStore(settings.llm_output_dir / STORE_FILE)
        return cls(load_model(model, settings, device), tokenizer, identity, store, batch_size)

    def answer(self, requests: Sequence[Messages], sampling: Sampling, what: str) -> list[Answer]:
        """Answer every request, in order. No request fails. Progress lines count `what`, e.g. `questions`."""
        # Greedy answers do not depend on the seed.
        seed = sampling.seed if sampling.temperature else 0
        settings = [self.identity, sampling.max_new_tokens, list(sampling.stop), sampling.temperature, seed]
        keys = [hashlib.sha256(json.dumps([settings, request]).encode()).hexdigest()[:24] for request in requests]
        prompts = {
            key: str(self.tokenizer.apply_chat_template(request, add_generation_prompt=True, tokenize=False))
            for key, request in zip(keys, requests, strict=True)
        }
        # Prompts of similar length share a batch, which saves padding. Batches are formed from all prompts, stored ones
        # included: rounding depends on the batch, and a run that is killed and restarted must give the same answers.
        order = sorted(prompts)
        indices = batches_by_length([len(prompts[key]) for key in order], self.batch_size)
        batches = [[order[index] for index in batch] for batch in indices]
        missing = [batch for batch in batches if not all(key in self.store.answers for key in batch)]
        count = sum(map(len, missing))
        if count < len(order):
            logger.info("%d of %d %s are stored already", len(order) - count, len(order), what)
        progress = Progress(what, count)
        with self.store:
            for batch in missing:
                texts = self._generate([prompts[key] for key in batch], sampling, int(batch[0], 16))
                self.store.add({key: Reply(text) for key, text in zip(batch, texts, strict=True)})
                progress.advance(len(batch))
        return [Answer(self.store.answers[key].text) for key in keys]

    def _generate(self, prompts: list[str], sampling: Sampling, seed: int) -> list[str]:
        # top_k 0 and top_p 1 sample from the whole distribution, whatever the model's generation config says.
        sampled = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
        with torch.inference_mode(), torch.random.fork_rng():
            # Each batch has its own seed, from its first request, so stored batches do not change the others' samples.
            torch.manual_seed(seed % 2**63)
            new = generate_ids(
                self.model,
                self.tokenizer,
                self.tokenizer(prompts, add_special_tokens=False)["input_ids"],
                sampling.max_new_tokens,
                **(sampled if sampling.temperature else {"do_sample": False}),
                **({"stop_strings": list(sampling.stop), "tokenizer": self.tokenizer} if sampling.stop else {}),
            )
        return [text.strip() for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]
