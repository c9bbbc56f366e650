"""Which adapters vLLM can apply to a base model, as its release 0.33 does (vllm/lora/peft_helper.py, vllm/config/lora.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llm_engineering.errors import RequestError

# The values of vLLM's --max-lora-rank.
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# What vLLM's adapters do not have, with the values that change nothing.
_PLAIN_LORA: dict[str, tuple[Any, ...]] = {
    "use_dora": (False,),
    "lora_bias": (False,),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
}


def max_lora_rank(adapter: Path, name: str, remedy: str) -> int:
    """vLLM's smallest `max_lora_rank` for an adapter.

    Args:
        adapter: a folder that PEFT has saved.
        name: what the error calls it, and `remedy` the sentence after the reason.

    Raises:
        RequestError: vLLM cannot apply it.
    """
    file = adapter / "adapter_config.json"
    if not file.is_file():
        raise RequestError(f"{name} is a full model and has no adapter. {remedy}")
    config = json.loads(file.read_text(encoding="utf-8"))
    changed = next((key for key, plain in _PLAIN_LORA.items() if config.get(key, plain[0]) not in plain), None)
    rank: int = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    if changed is not None or rank > _RANKS[-1]:
        found = f"{changed} {json.dumps(config[changed])[:100]}" if changed else f"r {rank}"
        raise RequestError(f"{name} was trained with {found}, which vLLM's adapters cannot have. {remedy}")
    return next(size for size in _RANKS if size >= rank)
