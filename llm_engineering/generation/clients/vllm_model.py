"""Answers requests with the local model, by vLLM on a CUDA card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from llm_engineering.errors import RequestError
from llm_engineering.generation.clients.batched import BatchedModel, identity_of
from llm_engineering.generation.store import STORE_FILE, AnswerStore
from llm_engineering.generation.types import Reply, Sampling
from llm_engineering.models.base_model import hub_options, model_path, weights_hash
from llm_engineering.models.device import choose_device
from llm_engineering.models.tokenizer import generation_ends, load_tokenizer
from llm_engineering.models.vllm_adapters import max_lora_rank
from llm_engineering.recipe.compute_blocks import ComputeConfig
from llm_engineering.recipe.model_blocks import ModelConfig
from llm_engineering.recipe.settings import Settings

# vLLM forms its own batches. A kill loses the answers of one call.
_REQUESTS_A_CALL = 512
# The lowest bias that vLLM takes.
_BANNED = -100.0


class VllmModel(BatchedModel):
    """A client whose model runs in vLLM. It keeps the card's memory until the object is deleted.

    Args:
        ends: ids of the tokens that end an answer.
        adapter: None for a model without an adapter.
    """

    def __init__(
        self,
        engine: LLM,
        tokenizer: PreTrainedTokenizerBase,
        identity: str,
        store: AnswerStore,
        ends: Sequence[int],
        adapter: LoRARequest | None = None,
    ) -> None:
        super().__init__(tokenizer, f"{identity}, by vLLM", store, _REQUESTS_A_CALL)
        self.engine = engine
        self.ends = list(ends)
        self.adapter = adapter

    @classmethod
    def load(
        cls,
        model: ModelConfig,
        compute: ComputeConfig,
        settings: Settings,
        chat_template: str | None = None,
        trained: Path | None = None,
    ) -> VllmModel:
        """Load a model onto the card, with the answers stored by earlier runs.

        Args:
            trained: folder of an adapter or a full model that was trained from the base model; None for the base model.

        Raises:
            RequestError: vLLM cannot apply the adapter, or the recipe adds tokens.
        """
        remedy = "Generate with transformers: --set generation.engine=transformers"
        if model.added_tokens:
            raise RequestError(f"vLLM cannot add model.new_tokens or model.new_special_tokens to a model. {remedy}")
        device = choose_device(compute)
        tokenizer = load_tokenizer(model, settings, chat_template)
        weights = None if trained is None else weights_hash(trained)
        source, adapter = model, None
        options: dict[str, Any] = {}
        if trained is not None and (trained / "adapter_config.json").is_file():
            rank = max_lora_rank(trained, f"The adapter in {trained}", remedy)
            adapter, options = LoRARequest("trained", 1, str(trained)), {"enable_lora": True, "max_lora_rank": rank}
        elif trained is not None:
            source = model.saved_in(trained)
        path, hub = model_path(source, settings), hub_options(source, settings)
        engine = LLM(
            model=path,
            revision=hub["revision"],
            trust_remote_code=hub["trust_remote_code"],
            hf_token=hub["token"],
            dtype=str(device.dtype).removeprefix("torch."),
            # Requests say how to sample, and the model's generation_config.json does not.
            generation_config="vllm",
            **options,
        )
        vocabulary = tokenizer.get_vocab()
        ends = {vocabulary[end] for end in (tokenizer.eos_token, *generation_ends(path, hub, tokenizer))}
        store = AnswerStore(settings.llm_output_dir / STORE_FILE)
        identity = identity_of(model, device, tokenizer, chat_template, weights)
        return cls(engine, tokenizer, identity, store, sorted(ends), adapter)

    def _generate(
        self,
        prompts: list[str],
        sampling: Sampling,
        seed: int,
        shared_start: Any = None,
        banned_tokens: Sequence[list[int]] = (),
    ) -> list[Reply]:
        parameters = [
            SamplingParams(
                max_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature or 0.0,
                seed=(seed + number) % 2**63,
                stop=list(sampling.stop),
                include_stop_str_in_output=True,
                stop_token_ids=self.ends,
                logit_bias=dict.fromkeys(banned, _BANNED) or None,
            )
            for number, banned in enumerate(banned_tokens or [[]] * len(prompts))
        ]
        asked = [{"prompt_token_ids": ids} for ids in self._ids(prompts)]
        outputs = self.engine.generate(asked, parameters, use_tqdm=False, lora_request=self.adapter)
        found = [output.outputs[0] for output in outputs]
        texts = self.tokenizer.batch_decode([list(one.token_ids) for one in found], skip_special_tokens=True)
        if sampling.stop:
            return [Reply(text.strip()) for text in texts]
        finished = ["end" if one.finish_reason == "stop" else "length" for one in found]
        return [Reply(text.strip(), finish) for text, finish in zip(texts, finished, strict=True)]
