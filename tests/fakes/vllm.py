"""Replaces vLLM on machines without a card: greedy decoding of single requests by transformers.

The arguments of the three classes are those of vLLM 0.33 that the project uses, with vLLM's defaults.
"""

import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str = ""


@dataclass
class SamplingParams:
    temperature: float = 1.0
    seed: int | None = None
    stop: list[str] = field(default_factory=list)
    stop_token_ids: list[int] = field(default_factory=list)
    max_tokens: int = 16
    include_stop_str_in_output: bool = False
    logit_bias: dict[int, float] | None = None


class LLM:
    """Applies an adapter only if `enable_lora` is set and its rank is at most `max_lora_rank`, as vLLM does."""

    def __init__(self, model, *, revision=None, trust_remote_code=False, hf_token=None, dtype="auto",
                 generation_config="auto", enable_lora=False, max_lora_rank=16):  # fmt: skip
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, revision=revision).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.max_lora_rank = max_lora_rank if enable_lora else 0
        assert generation_config == "vllm"

    def generate(self, prompts, sampling_params, *, use_tqdm=True, lora_request=None):
        if lora_request is not None and not isinstance(self.model, PeftModel):
            self.model = PeftModel.from_pretrained(self.model, lora_request.lora_path).eval()
            assert self.model.peft_config["default"].r <= self.max_lora_rank
        assert not use_tqdm
        pairs = zip(prompts, sampling_params, strict=True)
        return [SimpleNamespace(outputs=[self._continue(p["prompt_token_ids"], s)]) for p, s in pairs]

    @torch.inference_mode()
    def _continue(self, prompt, parameters):
        assert parameters.temperature == 0
        new = []
        while len(new) < parameters.max_tokens:
            logits = self.model(torch.tensor([prompt + new])).logits[0, -1]
            for token, bias in (parameters.logit_bias or {}).items():
                logits[token] += bias
            new.append(int(logits.argmax()))
            text = self.tokenizer.decode(new)
            if new[-1] in parameters.stop_token_ids or any(stop in text for stop in parameters.stop):
                return SimpleNamespace(token_ids=tuple(new), finish_reason="stop")
        return SimpleNamespace(token_ids=tuple(new), finish_reason="length")


def install(monkeypatch):
    """Make `import vllm` find these classes."""
    package, requests = ModuleType("vllm"), ModuleType("vllm.lora.request")
    package.LLM, package.SamplingParams, requests.LoRARequest = LLM, SamplingParams, LoRARequest
    for name, module in (("vllm", package), ("vllm.lora", ModuleType("vllm.lora")), ("vllm.lora.request", requests)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "llm_engineering.generation.clients.vllm_model", raising=False)
