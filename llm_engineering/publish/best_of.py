"""Best of n: draws several answers of a model, and chooses the one with the highest reward (Nakano et al. 2021,
arXiv:2112.09332, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from llm_engineering.data.rows import Message
from llm_engineering.formatting.render import prompt_ids
from llm_engineering.models.generate import generate_ids
from llm_engineering.models.reward_model import RewardModel, check_tokens
from llm_engineering.models.tokenizer import end_token_ids
from llm_engineering.publish.conversation import ChatReply, ChatSampling
from llm_engineering.recipe.compute_blocks import ComputeConfig
from llm_engineering.recipe.model_blocks import ModelConfig
from llm_engineering.recipe.settings import Settings


class BestOf(NamedTuple):
    """Draws answers with the tokenizer of the models, and chooses with a reward model that reads the same tokens."""

    rewards: RewardModel
    tokenizer: PreTrainedTokenizerBase
    number: int

    @classmethod
    def load(
        cls,
        base: ModelConfig,
        folder: Path,
        tokenizer: PreTrainedTokenizerBase,
        compute: ComputeConfig,
        settings: Settings,
        number: int,
    ) -> BestOf:
        """Load the reward model.

        Args:
            base: the base model of the reward model.
            folder: the reward model, with its tokenizer.
            tokenizer: that of the models that answer.

        Raises:
            RequestError: the reward model was trained with other tokens, or with another chat template.
        """
        check_tokens(folder, tokenizer, settings, base.trust_remote_code)
        return cls(RewardModel.load(base, folder, tokenizer, compute, settings), tokenizer, number)

    def answer(
        self, model: Any, messages: Sequence[Message], max_new_tokens: int, sampling: ChatSampling, **options: Any
    ) -> tuple[ChatReply, list[float]]:
        """The answer with the highest reward, and the rewards of all answers. Of equal ones, the first is chosen.

        Args:
            sampling: its temperature must be above 0. The same seed draws the same answers.
            options: arguments of `generate`.
        """
        prompt = prompt_ids(messages, self.tokenizer)
        torch.manual_seed(sampling.seed)
        with torch.inference_mode():
            answers = generate_ids(
                model, self.tokenizer, [prompt] * self.number, max_new_tokens, **sampling.options, **options
            )
        rewards = self.rewards.scores([prompt + answer for answer in answers])
        best = answers[rewards.index(max(rewards))]
        text = str(self.tokenizer.decode(best, skip_special_tokens=True)).strip()
        return ChatReply(text, bool(best) and best[-1] in end_token_ids(model, self.tokenizer)), rewards
