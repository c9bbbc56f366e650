"""Merges an adapter into the weight files of its base model, one file at a time.

The model in memory has the adapter, and no weights of the base model. For each file, PEFT merges the layers whose weights the
file has, and the file is written. So the memory holds the weights of one file, and every number is PEFT's own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from llm_engineering.models.base_model import hub_options, load_config, model_path
from llm_engineering.models.fit import on_meta
from llm_engineering.recipe.model_blocks import ModelConfig
from llm_engineering.recipe.settings import Settings


def weight_files(model: ModelConfig, settings: Settings) -> list[Path]:
    """The safetensors files of a model, downloaded if they are on the hub. Empty if the model has none."""

    def find(name: str) -> str | None:
        options = hub_options(model, settings)
        del options["trust_remote_code"]
        found: str | None = cached_file(
            model_path(model, settings), name, _raise_exceptions_for_missing_entries=False, **options
        )
        return found

    names = [SAFE_WEIGHTS_NAME]
    index = None if find(SAFE_WEIGHTS_NAME) else find(SAFE_WEIGHTS_INDEX_NAME)
    if index is not None:
        names = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    return [Path(found) for found in map(find, names) if found is not None]


def empty_model(model: ModelConfig, adapter: Path | None, settings: Settings) -> PreTrainedModel | PeftModel:
    """Build a model whose weights take no memory, with the weights of the adapter if there is one.

    Its weights are zeros that share one number. PEFT would move the adapter of a model of meta tensors to meta, too.
    """
    base = on_meta(load_config(model, settings), torch.float32, "eager", model.trust_remote_code)
    zeros = {id(p): nn.Parameter(torch.zeros(()).expand(p.shape), requires_grad=False) for p in base.parameters()}
    for module in base.modules():
        for name, weight in module.named_parameters(recurse=False, remove_duplicate=False):
            setattr(module, name, zeros[id(weight)])
    if adapter is None:
        return base
    # With low_cpu_mem_usage, PEFT replaces the new weights by those of the file, and writes to none of them.
    return PeftModel.from_pretrained(base, str(adapter), low_cpu_mem_usage=True, torch_device="cpu")


class ShardedMerge:
    """A merge that reads and writes one file at a time.

    Args:
        model: of `empty_model`; the merge consumes it.
        files: the weight files of the base model, or of the full model.
        dtype: the precision of the base model in training, to which its weights are rounded first.
        new_tokens: whether training has added rows to the embeddings, which the files do not have.
    """

    def __init__(
        self, model: PreTrainedModel | PeftModel, files: list[Path], dtype: torch.dtype, new_tokens: bool = False
    ) -> None:
        self.new_tokens = new_tokens
        self.plain: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        self.dtype = dtype
        self.layers = _changed_layers(self.plain)
        # The names in the model, and the files. Some files leave out the name of the inner model, e.g. `transformer.`.
        names = {name for layer, module in self.layers.items() for name in _names(layer, _base_of(module))}
        self.places: dict[str, tuple[Path, str]] = {}
        for file in files:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    full = f"{self.plain.base_model_prefix}.{name}"
                    self.places[full if full in names else name] = (file, name)
        self.missing = sorted(names - self.places.keys())

    @property
    def obstacle(self) -> str | None:
        """Why this model cannot be merged file by file, as the end of a sentence; None if it can."""
        if self.new_tokens:
            return "its embeddings have rows for new tokens"
        if not self.places:
            return "its weights are not in safetensors files"
        kept = self.plain._keep_in_fp32_modules_strict or self.plain._keep_in_fp32_modules
        if kept and self.dtype != torch.float32:
            return "transformers keeps some of its weights in float32"
        ends = [self.plain.get_input_embeddings(), self.plain.get_output_embeddings()]
        if self.plain.config.tie_word_embeddings and any(end in self.layers.values() for end in ends):
            return "the adapter changes an embedding that the input and the output share"
        if self.missing:
            return f"its files have other names or shapes than the model ({self.missing[0]})"
        return None

    def parts(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """The merged weights in float32: for each file its name and its tensors. Only one file's are in memory."""
        owners = {name: layer for layer, module in self.layers.items() for name in _names(layer, _base_of(module))}
        # Weights of layers that were merged for an earlier file, and belong into a later one.
        merged: dict[str, Tensor] = {}
        for file in sorted({file for file, _ in self.places.values()}):
            yield (
                file.name,
                {
                    own: self._weight(full, owners, merged)
                    for full, (place, own) in self.places.items()
                    if place == file
                },
            )

    def _weight(self, name: str, owners: Mapping[str, str], merged: dict[str, Tensor]) -> Tensor:
        if name not in owners:
            return self._read(name)
        if name not in merged:
            merged.update(self._merge_layer(owners[name]))
        return merged.pop(name)

    def _read(self, name: str) -> Tensor:
        """A weight of the base model as training saw it, in float32."""
        file, own = self.places[name]
        with safe_open(file, framework="pt") as opened:
            weight: Tensor = opened.get_tensor(own)
        return weight.to(self.dtype).float() if weight.is_floating_point() else weight

    def _merge_layer(self, name: str) -> dict[str, Tensor]:
        """Let PEFT merge one layer; returns its weights by their names in the model."""
        layer = self.layers[name]
        base = _base_of(layer)
        base.load_state_dict({part: self._read(f"{name}.{part}") for part in base.state_dict()}, assign=True)
        with torch.no_grad():
            if hasattr(layer, "unload_and_optionally_merge_module"):
                whole = layer.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
            else:
                layer.merge(safe_merge=True)
                whole = base
        weights = {f"{name}.{part}": weight.float() for part, weight in whole.state_dict().items()}
        for module in (base, whole):
            module.to("meta")
        return weights


def _changed_layers(plain: nn.Module) -> dict[str, Any]:
    """The layers that an adapter has changed or replaced, without those inside another one."""
    layers: dict[str, Any] = {}
    for name, module in plain.named_modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) and not name.startswith(
            tuple(f"{outer}." for outer in layers)
        ):
            layers[name] = module
    return layers


def _base_of(layer: Any) -> nn.Module:
    base: nn.Module = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer.original_module
    return base


def _names(layer: str, base: nn.Module) -> list[str]:
    return [f"{layer}.{part}" for part in base.state_dict()]


def rounded(folder: Path, dtype: torch.dtype) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The weights of a folder's files in another precision: for each file its name and its tensors."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        yield file.name, {n: w.to(dtype) if w.is_floating_point() else w.clone() for n, w in weights.items()}


def write_parts(parts: Iterable[tuple[str, dict[str, Tensor]]], folder: Path) -> None:
    """Write weight files and their index.

    Args:
        parts: for each file its name and its tensors. A file of this name in the folder is replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    places: dict[str, str] = {}
    total = 0
    for name, weights in parts:
        partial = folder / f".{name}"
        save_file({key: weight.contiguous() for key, weight in weights.items()}, partial, metadata={"format": "pt"})
        os.replace(partial, folder / name)
        places |= dict.fromkeys(weights, name)
        total += sum(weight.nbytes for weight in weights.values())
        # The next file is made before the name is bound again.
        del weights
    if len(set(places.values())) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
