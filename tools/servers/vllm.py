"""The commands of vLLM's server: for a merged model, and for a base model with the adapters of several versions."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from llm_engineering.errors import RequestError
from llm_engineering.models.vllm_adapters import max_lora_rank

if TYPE_CHECKING:
    from llm_engineering.recipe.model_blocks import ModelConfig
    from llm_engineering.recipe.recipe import Recipe
    from llm_engineering.recipe.settings import Settings
    from tools.model_versions.versions import Found

_ALONE = "Serve its merged model alone, without --also."
# vLLM ignores `do_sample` in a folder's generation_config.json. Without a temperature there, it would draw samples.
_GREEDY = ["--override-generation-config", '{"temperature": 0.0}']


def installed_vllm() -> str | None:
    """The path of `vllm` in this environment, or else on the PATH; None if it is not installed."""
    return shutil.which("vllm", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


def merged_command(program: str, folder: Path, name: str, port: int, dtype: str) -> list[str]:
    """The command for a merged model. Chat template and end tokens come from its folder.

    Args:
        dtype: the precision in which the model was verified. Without this option, vLLM would load float32 files in half
            precision.
    """
    return [program, "serve", str(folder), "--served-model-name", name, "--dtype", dtype, *_GREEDY, *_address(port)]


def adapters_command(
    program: str,
    base: ModelConfig,
    merged: Path,
    adapters: Mapping[str, Path],
    port: int,
    dtype: str,
    settings: Settings,
) -> list[str]:
    """The command for a base model under its own name, with each adapter under its name in `adapters`.

    Args:
        merged: a merged model of one of the adapters; all models get its chat template and end tokens.
        dtype: the precision of the base model in training.
    """
    from llm_engineering.models.base_model import hub_revision, model_path

    rank = max(max_lora_rank(folder, name, _ALONE) for name, folder in adapters.items())
    revision = hub_revision(base)
    return [
        *[program, "serve", model_path(base, settings), "--served-model-name", base.name_or_path, "--dtype", dtype],
        *(["--revision", revision] if revision else []),
        *["--tokenizer", str(merged), "--generation-config", str(merged)],
        *["--enable-lora", "--max-loras", str(len(adapters))],
        *["--max-lora-rank", str(rank)],
        *["--lora-modules", *(json.dumps({"name": name, "path": str(adapters[name])}) for name in adapters)],
        *_GREEDY,
        *_address(port),
    ]


def side_by_side(found: Found, numbers: list[str], recipe: Recipe, settings: Settings) -> dict[str, Path]:
    """The adapters of a version, under the recipe's name, and of other versions, under `name:number`.

    Raises:
        RequestError: a version does not exist, has another base model, chat template or end token, or is not signed although it must be; or vLLM cannot
            serve an adapter.
        WorkError: the signature of a version is refused.
    """
    from llm_engineering.models.tokenizer import load_tokenizer
    from tools.model_versions.signatures import VERSION, check_signature
    from tools.model_versions.versions import find_model

    if found.base.added_tokens:
        raise RequestError(
            f"Version {found.version.number} has new tokens ({', '.join(found.base.added_tokens)}), which vLLM's adapters cannot have. "
            "Serve it alone, without --also."
        )
    adapters = {recipe.name: found.folders[found.name]}
    for number in numbers:
        other = find_model(recipe, number)
        if other.base != found.base:
            one, another = (base.model_dump_json(exclude_defaults=True) for base in (found.base, other.base))
            raise RequestError(
                f"Version {number} was trained on {another}, and version {found.version.number} on {one}. Only versions with the same base "
                f"model can be served side by side. Serve it alone: make serve VERSION={number}"
            )
        templates = [load_tokenizer(one.base.saved_in(one.folders[one.name]), settings) for one in (found, other)]
        if len({(one.chat_template, one.eos_token) for one in templates}) > 1:
            raise RequestError(
                f"Version {number} has another chat template or end token than version {found.version.number}, which all models of one server "
                f"share. Serve it alone: make serve VERSION={number}"
            )
        check_signature(other.version, VERSION, settings)
        adapters[f"{recipe.name}:{number}"] = other.folders[other.name]
    for name, folder in adapters.items():
        max_lora_rank(folder, name, _ALONE)
    return adapters


def _address(port: int) -> list[str]:
    # Only on loopback, as all servers of this project.
    return ["--host", "127.0.0.1", "--port", str(port)]
