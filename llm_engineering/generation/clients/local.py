"""Answers requests with the local model, by transformers in this process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList, StopStringCriteria

from llm_engineering.generation.clients.batched import BatchedModel, identity_of
from llm_engineering.generation.store import STORE_FILE, AnswerStore
from llm_engineering.generation.types import Reply, Sampling
from llm_engineering.models.base_model import load_model, weights_hash
from llm_engineering.models.device import choose_device
from llm_engineering.models.generate import SharedStart, compute_shared_start, generate_ids
from llm_engineering.models.tokenizer import end_token_ids, load_tokenizer
from llm_engineering.recipe.compute_blocks import ComputeConfig
from llm_engineering.recipe.model_blocks import ModelConfig
from llm_engineering.recipe.settings import Settings


class LocalModel(BatchedModel):
    """A client whose model runs in this process. The arguments are those of `BatchedModel`."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        identity: str,
        store: AnswerStore,
        batch_size: int,
    ) -> None:
        super().__init__(tokenizer, identity, store, batch_size)
        self.model = model.eval()

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
        weights = None if trained is None else weights_hash(trained)
        identity = identity_of(model, device, tokenizer, chat_template, weights)
        store = AnswerStore(settings.llm_output_dir / STORE_FILE)
        if trained is None:
            return cls(load_model(model, settings, device), tokenizer, identity, store, batch_size)
        if (trained / "adapter_config.json").is_file():
            adapted = PeftModel.from_pretrained(load_model(model, settings, device), str(trained))
            return cls(adapted.merge_and_unload(), tokenizer, identity, store, batch_size)
        full = model.saved_in(trained)
        return cls(load_model(full, settings, device), tokenizer, identity, store, batch_size)

    def _start(self, prompts: list[str]) -> SharedStart | None:
        return compute_shared_start(self.model, self._ids(prompts))

    def _generate(
        self,
        prompts: list[str],
        sampling: Sampling,
        seed: int,
        shared_start: SharedStart | None = None,
        banned_tokens: Sequence[list[int]] = (),
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
                shared_start,
                banned_tokens,
                **(sampled if sampling.temperature else {"do_sample": False}),
                stopping_criteria=StoppingCriteriaList(stop),
            )
        texts = [text.strip() for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]
        if sampling.stop:
            return [Reply(text) for text in texts]
        ends = end_token_ids(self.model, self.tokenizer)
        finished = ["end" if ids and ids[-1] in ends else "length" for ids in new]
        return [Reply(text, finish) for text, finish in zip(texts, finished, strict=True)]
