"""Replaces unsloth on machines without a GPU: its two functions with the signatures of 2026.10.7, over transformers.

If unsloth is installed, `tests/unit/training/test_backend.py` compares these signatures with the real ones.
"""

from types import ModuleType

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

CALLS: list[tuple[str, dict]] = []


class FastLanguageModel:
    """Records the arguments of its calls in `CALLS`."""

    @staticmethod
    def from_pretrained(
        model_name="",
        max_seq_length=2048,
        dtype=None,
        load_in_4bit=True,
        full_finetuning=False,
        token=None,
        fix_tokenizer=True,
        trust_remote_code=False,
        use_gradient_checkpointing="unsloth",
        revision=None,
        use_exact_model_name=False,
        float32_mixed_precision=None,
        random_state=3407,
    ):
        CALLS.append(("from_pretrained", dict(locals())))
        return AutoModelForCausalLM.from_pretrained(model_name, dtype=dtype, revision=revision), None

    @staticmethod
    def get_peft_model(
        model,
        r=16,
        target_modules=(),
        lora_alpha=16,
        lora_dropout=0.0,
        bias="none",
        use_gradient_checkpointing="unsloth",
        random_state=3407,
        use_rslora=False,
    ):
        CALLS.append(("get_peft_model", {name: value for name, value in locals().items() if name != "model"}))
        config = LoraConfig(
            r=r,
            target_modules=target_modules,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            bias=bias,
            use_rslora=use_rslora,
            task_type="CAUSAL_LM",
        )
        return get_peft_model(model, config)


def module() -> ModuleType:
    """The module for `sys.modules["unsloth"]`."""
    fake = ModuleType("unsloth")
    fake.FastLanguageModel = FastLanguageModel
    CALLS.clear()
    return fake
