"""Reward models: a decoder whose head gives a prompt with its answer one number, the reward (Ouyang et al. 2022,
arXiv:2203.02155, section 3.5).

The reward is read at the last token of the answer. It has no unit: only differences between answers to the same prompt mean
something.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_engineering.errors import RequestError
from llm_engineering.models.base_model import load_model
from llm_engineering.models.device import Device, choose_device
from llm_engineering.models.generate import batches_by_length
from llm_engineering.models.new_tokens import with_added_tokens
from llm_engineering.models.tokenizer import load_tokenizer
from llm_engineering.progress import Progress
from llm_engineering.recipe.compute_blocks import ComputeConfig
from llm_engineering.recipe.model_blocks import ModelConfig
from llm_engineering.recipe.settings import Settings

# The names of the head in transformers. PEFT trains a head of such a name whole.
HEADS = ("score", "classifier")
_PREFIX = "base_model.model."


class RewardModel:
    """A trained reward model, ready to score.

    Args:
        model: gives one number for each row; its adapter, if it has one, is loaded.
        pad: the token that fills shorter rows (`padding_token`).
    """

    def __init__(self, model: PreTrainedModel | PeftModel, device: Device, pad: int, batch_size: int = 8) -> None:
        self.model, self.device, self.pad, self.batch_size = model.eval(), device, pad, batch_size
        model.config.get_text_config().pad_token_id = pad

    @classmethod
    def load(
        cls,
        model: ModelConfig,
        folder: Path,
        tokenizer: PreTrainedTokenizerBase,
        compute: ComputeConfig,
        settings: Settings,
        batch_size: int = 8,
    ) -> RewardModel:
        """Load a reward model on this machine.

        Args:
            model: the base model of its training.
            folder: the adapter with the head, or the full model, as the stage `reward` has saved it. It needs no other
                folder: the adapter has the weights of the stages before it too.
            tokenizer: the tokenizer that made the rows to score.

        Raises:
            RequestError: the folder holds a model that writes text.
        """
        _check_scores(folder)
        device = choose_device(compute)
        pad = padding_token(tokenizer)
        if not (folder / "adapter_config.json").is_file():
            return cls(load_model(model.saved_in(folder), settings, device, scores=True), device, pad, batch_size)
        # transformers would warn that the base model's files have no head. The adapter has it.
        level = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()
        try:
            base = load_model(with_added_tokens(model, folder), settings, device, scores=True)
        finally:
            transformers.logging.set_verbosity(level)
        head_in_float32(base)
        return cls(PeftModel.from_pretrained(base, str(folder)), device, pad, batch_size)

    def scores(self, rows: Sequence[list[int]], title: str = "") -> list[float]:
        """The reward of each row, in the rows' order.

        Args:
            rows: token ids of a prompt and its answer, with the end token if the answer has ended.
            title: names the rows in progress lines; if it is empty, no progress is shown.
        """
        found: dict[int, float] = {}
        progress = Progress(title, len(rows) if title else 0)
        for batch in batches_by_length([len(row) for row in rows], self.batch_size):
            found |= dict(zip(batch, self._score([rows[index] for index in batch]), strict=True))
            if title:
                progress.advance(len(batch))
        return [found[index] for index in range(len(rows))]

    def _score(self, rows: Sequence[list[int]]) -> list[float]:
        """The rewards of one batch, padded on the right to shape (rows, longest)."""
        longest = max(map(len, rows))
        ids = torch.tensor([[*row, *[self.pad] * (longest - len(row))] for row in rows], device=self.model.device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=self.model.device)
        with torch.inference_mode(), self.device.autocast():
            logits: torch.Tensor = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        scores: list[float] = logits.squeeze(-1).float().tolist()
        return scores


def is_reward_model(folder: Path) -> bool:
    """Whether a folder holds a reward model: an adapter with a head, or a full model with one."""
    adapter, full = folder / "adapter_config.json", folder / "config.json"
    if adapter.is_file():
        return bool(json.loads(adapter.read_text(encoding="utf-8"))["task_type"] == "SEQ_CLS")
    names = json.loads(full.read_text(encoding="utf-8")).get("architectures") or [] if full.is_file() else []
    return any(name.endswith("ForSequenceClassification") for name in names)


def _check_scores(folder: Path) -> None:
    if not is_reward_model(folder):
        raise RequestError(f"{folder} holds no reward model: name the output of a stage `reward`.")


def check_base(model: ModelConfig, folder: Path) -> None:
    """Check that a reward model belongs to a recipe's base model. A full reward model needs no base model.

    Raises:
        RequestError: the folder holds no reward model, or one of another base model or another revision.
    """
    _check_scores(folder)
    file = folder / "adapter_config.json"
    if not file.is_file():
        return
    adapter = json.loads(file.read_text(encoding="utf-8"))
    base = (adapter["base_model_name_or_path"], adapter.get("revision"))
    if base != (model.name_or_path, model.revision):
        name, revision = base
        raise RequestError(
            f"The reward model was trained on the base model {name} (revision {revision}), and the recipe's is "
            f"{model.name_or_path} (revision {model.revision}). Name a reward model of the same base model."
        )


def check_tokens(
    folder: Path, tokenizer: PreTrainedTokenizerBase, settings: Settings, trust_remote_code: bool = False
) -> None:
    """Check that a reward model was trained with a tokenizer and its chat template.

    Raises:
        RequestError: it was trained with another one, so it cannot read answers in these tokens.
    """
    own = load_tokenizer(ModelConfig(name_or_path=str(folder), trust_remote_code=trust_remote_code), settings)
    if own.chat_template != tokenizer.chat_template or own.get_vocab() != tokenizer.get_vocab():
        raise RequestError(
            "The reward model was trained with another tokenizer or chat template than the models that answer, so it cannot "
            "read their answers. Name a reward model of the same base model and formatting.chat_template."
        )


def padding_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that fills shorter rows: the tokenizer's pad token, if it is not the token that ends an answer.

    transformers reads the reward at the last token that is not this one. With the end token, it would read it one token too
    early, where an answer that has ended looks like one that goes on. Any other token does, because no other token ends a row.
    """
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    if pad is not None and pad != end:
        return int(pad)
    return next(token for token in (0, 1) if token != end)


def head_in_float32(base: PreTrainedModel) -> None:
    """Convert the head to float32, with its later copies: half-precision weights would lose small updates."""
    for name, module in base.named_children():
        if name in HEADS:
            module.float()


def with_reward_adapter(base: PreTrainedModel, config: peft.LoraConfig, trained: Path | None) -> PeftModel:
    """Add an adapter, to train it with the head of `base`.

    The adapter of the model before is trained further, as DPO does it. It fits because the decoder's layers have the same
    names under both heads. So nothing is merged or rounded, it works on a base model in 4 bits, and what is saved is one adapter
    for the unchanged base model. What the adapter has for the output layer, which `base` has not, is left out.

    Args:
        base: the base model with a head that scores (`load_model`).
        trained: the folder of the adapter of the model before; None for a fresh one.
    """
    parts = tuple(f"{name}." for name, _ in base.named_children())
    names = [name for name, _ in base.named_modules()]
    config.task_type = peft.TaskType.SEQ_CLS
    config.inference_mode = False
    if trained is None:
        return get_peft_model(base, config)
    config.modules_to_save = [
        part for part in config.modules_to_save or [] if any(name.endswith(part) for name in names)
    ] or None
    if isinstance(config.trainable_token_indices, dict):
        config.trainable_token_indices = {
            name: tokens
            for name, tokens in config.trainable_token_indices.items()
            if any(found.endswith(name) for found in names)
        }
    config.ensure_weight_tying = False
    # The weights are read below, so the start value must not change those of the base model.
    config.init_lora_weights = True
    policy = get_peft_model(base, config)
    # The head has no trained weights yet: it keeps its own.
    weights = get_peft_model_state_dict(policy) | {
        name: weight
        for name, weight in peft.load_peft_weights(str(trained), device="cpu").items()
        if name.removeprefix(_PREFIX).startswith(parts)
    }
    loaded: Any = set_peft_model_state_dict(policy, weights)
    unread: list[str] = loaded.unexpected_keys
    if unread:
        raise RequestError(f"The adapter {trained} does not fit a model that scores: it has {unread[0]}.")
    return policy
