"""Judges the recipe values that only the model can judge, before any work, on a model of meta tensors without weights."""

from __future__ import annotations

import inspect
import logging
import re
from typing import Any, cast

import peft
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper, get_pattern_key
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llm_engineering.errors import RequestError
from llm_engineering.models.base_model import fitting_attention
from llm_engineering.recipe.model_blocks import LoraConfig
from llm_engineering.recipe.recipe import Recipe
from llm_engineering.recipe.stage_blocks import PackedConfig
from llm_engineering.recipe.stages import STAGES


def check_fit(recipe: Recipe, config: PreTrainedConfig) -> nn.Module:
    """Check that the recipe fits the model that `config` describes; returns the model to train, of meta tensors.

    Raises:
        RequestError: the model cannot be trained as the recipe says. The message has the model's own names and sizes.
    """
    name, compute = recipe.model.name_or_path, recipe.compute
    if getattr(config, "quantization_config", None) is not None:
        raise RequestError(
            f"The weights of {name} are quantised, and an adapter cannot be merged into them. Name the model in 16 bits that "
            "they were made from; sft.method qlora quantises it when it is loaded."
        )
    wanted = compute.attn_implementation
    if wanted != "auto" and fitting_attention(config, wanted) != wanted:
        raise RequestError(
            f"compute.attn_implementation is {wanted}, which {name} ({config.model_type}) does not have. Use auto, or "
            f"{fitting_attention(config, wanted)}."
        )
    try:
        base = on_meta(config, torch.float32, "eager", recipe.model.trust_remote_code)
    except (AssertionError, ImportError, ValueError) as error:
        raise RequestError(f"{name} cannot be built as a causal language model: {error}") from error
    _check_positions(recipe, base)
    _check_scores(recipe, config)
    for stage in recipe.chain:
        block = recipe.block(stage)
        if isinstance(block, PackedConfig) and block.packing and not _takes(base.base_model, "position_ids"):
            raise RequestError(
                f"{stage}.packing is true, but {name} ({config.model_type}) takes no position ids, so packed rows would see "
                f"each other. Use --set {stage}.packing=false."
            )
        if block.gradient_checkpointing and not base.supports_gradient_checkpointing:
            raise RequestError(
                f"{stage}.gradient_checkpointing is true, and {name} ({config.model_type}) has none: remove the key."
            )
        if block.library_arguments.get("router_aux_loss_coef") and not hasattr(
            config.get_text_config(), "output_router_logits"
        ):
            raise RequestError(
                f"{stage}.router_aux_loss_coef is set, but {name} has no router of experts. Remove the key."
            )
    if recipe.method == "full":
        return base
    adapter = shape_config(recipe.lora)
    with torch.device("meta"):
        if new := len(recipe.model.added_tokens):
            rows = len(cast(torch.Tensor, base.get_input_embeddings().weight))
            base.resize_token_embeddings(rows + new, mean_resizing=False)
            train_rows(adapter, base, list(range(rows, rows + new)))
        return with_adapter(base, adapter, recipe.lora, name)


def on_meta(
    config: PreTrainedConfig, dtype: torch.dtype, attention: str, trust_remote_code: bool, *, scores: bool = False
) -> PreTrainedModel:
    """Build a model of meta tensors, which have shapes and no values; with `scores` as `load_model` does."""
    automatic: Any = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    with torch.device("meta"):
        model: PreTrainedModel = automatic.from_config(
            config, dtype=dtype, attn_implementation=attention, trust_remote_code=trust_remote_code
        )
    return model


def _check_scores(recipe: Recipe, config: PreTrainedConfig) -> None:
    """Check that transformers has a class with a head that scores, for the stages that make a reward model."""
    known = AutoModelForSequenceClassification._model_mapping
    for stage in recipe.chain:
        if not STAGES[stage].policy and type(config) not in known and not recipe.model.trust_remote_code:
            raise RequestError(
                f"{recipe.model.name_or_path} ({config.model_type}) cannot be a reward model, because transformers has no sequence "
                f"classification for it. Remove {stage} from chain, or train it on another model."
            )


def _takes(module: nn.Module, argument: str) -> bool:
    return argument in inspect.signature(module.forward).parameters


def _check_positions(recipe: Recipe, base: PreTrainedModel) -> None:
    """Refuse rows and answers beyond a table of positions. Rotary positions have no table."""
    limit = table_of_positions(base)
    if limit is None:
        return
    length, new = recipe.formatting.max_length, recipe.evaluation.max_new_tokens
    answers = any(STAGES[stage].rows != "text" for stage in recipe.chain)
    if length + (new if answers else 0) > limit:
        raise RequestError(
            f"{recipe.model.name_or_path} has {limit} positions, but formatting.max_length is {length}"
            + (f" and evaluation.max_new_tokens is {new}, together more" if answers else "")
            + f". Lower formatting.max_length to {max(1, limit - (new if answers else 0))} or less."
        )


def table_of_positions(base: PreTrainedModel) -> int | None:
    """The number of positions of a model that looks them up in a table; None if it computes them.

    The table is an embedding (GPT-2; OPT's has two more rows) or a buffer of that name (GPT-J).
    """
    limit = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    inputs = base.get_input_embeddings()
    sizes = [m.num_embeddings for m in base.modules() if isinstance(m, nn.Embedding) and m is not inputs]
    sizes += [len(buffer) for name, buffer in base.named_buffers() if name.endswith("embed_positions")]
    return limit if limit is not None and any(size in (limit, limit + 2) for size in sizes) else None


def left_out(trained: nn.Module) -> list[tuple[int, str]]:
    """The kinds of layers that get no adapter, and the experts, whose weights are parameters and no layers: levels and lines of a log."""
    if not isinstance(trained, PeftModel):
        return []
    model: Any = trained.get_base_model()
    head = model.get_output_embeddings()
    layers = [
        (name, m)
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear | Conv1D | LoraLayer) and m is not head
    ]
    adapted = {_kind(name) for name, m in layers if isinstance(m, LoraLayer)}
    wrappers = LoraLayer | AuxiliaryTrainingWrapper
    inside = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, wrappers))
    without = {_kind(name) for name, m in layers if not name.startswith(inside)} - adapted
    found = []
    if without:
        found.append(
            (logging.INFO, f"lora: adapters on {', '.join(sorted(adapted))}, and none on {', '.join(sorted(without))}")
        )
    experts = {
        _kind(name)
        for name, weight in model.named_parameters()
        if _is_of_experts(name, weight) and not name.startswith(inside)
    }
    if experts:
        found.append(
            (
                logging.WARNING,
                f"lora: the experts' weights get no adapter ({', '.join(sorted(experts))}). To train them, name them in "
                "lora.target_parameters",
            )
        )
    return found


def _is_of_experts(name: str, weight: torch.Tensor) -> bool:
    return ".experts." in name and weight.dim() == 3


def _kind(name: str) -> str:
    return name.rpartition(".")[2]


def lora_config(lora: LoraConfig) -> peft.LoraConfig:
    """Translate the recipe's adapter block to PEFT's config."""
    return peft.LoraConfig(**lora.model_dump(exclude_none=True), task_type="CAUSAL_LM")


def shape_config(lora: LoraConfig) -> peft.LoraConfig:
    """PEFT's config for an adapter on meta tensors: without VeLoRA, which reads weights and changes no shape."""
    config = lora_config(lora)
    config.velora_config = None
    return config


def train_rows(config: peft.LoraConfig, base: PreTrainedModel, tokens: list[int]) -> None:
    """Let the adapter train these tokens' rows of the input and output embeddings, unless it trains both embeddings whole.

    Raises:
        RequestError: the adapter trains one of the embeddings whole and the other one not, or has a LoRA of an embedding.
    """
    ends = [base.get_input_embeddings(), base.get_output_embeddings()]
    names = [next(name for name, module in base.named_modules() if module is end) for end in ends]
    whole = [name for name in names if name.endswith(tuple(config.modules_to_save or ()))]
    if not whole:
        targets = config.target_modules if isinstance(config.target_modules, set | list) else []
        if any(name.endswith(tuple(targets)) for name in names):
            raise RequestError(
                f"lora.target_modules names an embedding, and the rows of new tokens are trained as they are. Remove it, or "
                f"train both embeddings whole with lora.modules_to_save: [{', '.join(map(_kind, names))}]."
            )
        # PEFT trains the rows of tied embeddings as one.
        trained = names[:1] if base.config.tie_word_embeddings else names
        config.trainable_token_indices = dict.fromkeys(trained, tokens)
    elif len(whole) < len(names) and not config.ensure_weight_tying:
        raise RequestError(
            f"lora.modules_to_save trains {whole[0]}, and the new tokens need both embeddings. Name "
            f"{' and '.join(map(_kind, names))} there, or none of them: then only the rows of the new tokens are trained."
        )


def with_adapter(base: PreTrainedModel, config: peft.LoraConfig, lora: LoraConfig, name: str) -> PeftModel:
    """Add a fresh adapter to a base model.

    Args:
        config: PEFT's translation of `lora`.
        name: the model's name, for messages.

    Raises:
        RequestError: the adapter does not fit the model.
    """
    _check_targets(base, lora, name)
    try:
        policy = get_peft_model(base, config)
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise RequestError(f"lora does not fit {name}: {error}") from error
    assert isinstance(policy, PeftModel)
    _check_adapter(policy, lora)
    return policy


def _check_targets(base: PreTrainedModel, lora: LoraConfig, name: str) -> None:
    """Check that each name of a module or parameter is one of the model's. PEFT ignores those that match nothing."""
    modules = [module for module, _ in base.named_modules()]
    linear = sorted({_kind(n) for n, m in base.named_modules() if isinstance(m, nn.Linear | Conv1D)})
    parameters = [parameter for parameter, _ in base.named_parameters()]
    targets, more = lora.target_modules, lora.library_arguments
    has = f"{name} has the linear layers {', '.join(linear)}"
    if isinstance(targets, str) and targets != "all-linear":
        try:
            found = any(re.fullmatch(targets, module) for module in modules)
        except re.error as error:
            raise RequestError(f"lora.target_modules {targets} is no regular expression: {error}.") from error
        if not found:
            raise RequestError(
                f"lora.target_modules is the text {targets}, which PEFT reads as a regular expression for whole names, and it "
                f"matches no layer. Write a list of names, e.g. [{', '.join(linear[:2])}]. {has}."
            )
    for field, wanted, names in (
        ("target_modules", targets if isinstance(targets, list) else [], modules),
        ("target_parameters", more.get("target_parameters") or [], parameters),
    ):
        unknown = [part for part in wanted if not any(f".{found}".endswith(f".{part}") for found in names)]
        if unknown:
            experts = sorted({_kind(n) for n, p in base.named_parameters() if _is_of_experts(n, p)})
            raise RequestError(
                f"lora.{field}: {', '.join(unknown)} is no name of {'a module' if names is modules else 'a parameter'} of this "
                f"model. {has}" + (f", and the experts' parameters {', '.join(experts)}" if experts else "") + "."
            )
    layers = more.get("layers_to_transform")
    count = base.config.get_text_config().num_hidden_layers
    wrong = [layer for layer in ([layers] if isinstance(layers, int) else layers or []) if not 0 <= layer < count]
    if wrong:
        raise RequestError(
            f"lora.layers_to_transform: {name} has the layers 0 to {count - 1}, and no layer {wrong[0]}."
        )
    tokens = more.get("trainable_token_indices") or []
    rows = cast(torch.Tensor, base.get_input_embeddings().weight).shape[0]
    for token in [t for part in tokens.values() for t in part] if isinstance(tokens, dict) else tokens:
        if not 0 <= token < rows:
            raise RequestError(
                f"lora.trainable_token_indices: {name} has the tokens 0 to {rows - 1}, and no token {token}."
            )


def _check_adapter(policy: PeftModel, lora: LoraConfig) -> None:
    """Check what PEFT does not check, or only after training."""
    model: Any = policy.get_base_model()
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    bases = [layer.get_base_layer() for layer in layers.values()]
    more = lora.library_arguments
    for name in ("rank_pattern", "alpha_pattern"):
        for pattern in more.get(name) or {}:
            if not any(get_pattern_key([pattern], layer) == pattern for layer in layers):
                raise RequestError(
                    f"lora.{name}: {pattern} is the name of no layer with an adapter. Correct or remove it."
                )
    whole = [name for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    excluded = more.get("exclude_modules") or []
    named = {"modules_to_save": (more.get("modules_to_save") or [], whole)}
    if isinstance(excluded, list):
        named["exclude_modules"] = (excluded, [name for name, _ in model.named_modules()])
    for field, (wanted, found) in named.items():
        for part in wanted:
            if not any(name.endswith(part) for name in found):
                raise RequestError(f"lora.{field}: the model has no module {part}. Correct or remove it.")
    if more.get("lora_bias") and any(getattr(base, "bias", None) is None for base in bases):
        without = next(name for name, layer in layers.items() if getattr(layer.get_base_layer(), "bias", None) is None)
        raise RequestError(
            f"lora.lora_bias: the layer {without} has no bias that the adapter's could be merged into. Remove the key, "
            "or name layers with a bias in lora.target_modules."
        )
    if more.get("init_lora_weights") == "olora" and any(isinstance(base, Conv1D) for base in bases):
        raise RequestError(
            "lora.init_lora_weights olora: PEFT decomposes weights of the class Conv1D, as in GPT-2, in the wrong "
            "direction. Use pissa."
        )
    embeddings = [model.get_input_embeddings(), model.get_output_embeddings()]
    if lora.moves_base_weights and model.config.tie_word_embeddings and any(e in layers.values() for e in embeddings):
        raise RequestError(
            f"lora.init_lora_weights {more['init_lora_weights']} would change the output weights, which are the input "
            "embeddings too: remove both from lora.target_modules."
        )
    if more.get("ensure_weight_tying") and not model.config.tie_word_embeddings:
        raise RequestError("lora.ensure_weight_tying has no effect: the model's embeddings are not tied. Remove it.")
    for wrapper in model.modules():
        if isinstance(wrapper, TrainableTokensWrapper):
            _check_token_rows(wrapper.original_module)
    name = next(name for name, module in model.named_modules() if module is embeddings[0])
    if more.get("ensure_weight_tying") and more.get("modules_to_save") and not name.endswith("embed_tokens"):
        raise RequestError(
            f"lora.ensure_weight_tying: PEFT ties only embeddings that are named embed_tokens, and this model's are "
            f"{name}. Remove the key; the model is then merged with separate input and output embeddings."
        )


def _check_token_rows(layer: nn.Module) -> None:
    """Check that PEFT can train some rows of an embedding, for `trainable_token_indices` or new tokens."""
    if getattr(layer, "bias", None) is not None:
        raise RequestError(
            "The output layer of this model has a bias, which PEFT leaves out where it trains some rows of the layer. Train "
            "the embeddings whole with lora.modules_to_save."
        )
