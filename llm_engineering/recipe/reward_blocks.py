"""The recipe's blocks of rewards, and the keys that all stages with rewards share."""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from llm_engineering.recipe.block import Block
from llm_engineering.recipe.compute_blocks import ComputeConfig
from llm_engineering.recipe.generation_blocks import JudgeConfig
from llm_engineering.recipe.training_blocks import TrainConfig

# The rewards that come with the project, and the options of each.
REWARDS: dict[str, tuple[str, ...]] = {
    "exact_answer": (),
    "contains": (),
    "stopped": (),
    "length": ("target", "longest"),
    "format": ("pattern",),
    "judge": ("judge", "criterion"),
    "reward_model": ("version",),
}
# The rewards that compare a completion with the accepted answers of its prompt.
NEED_ANSWERS = ("exact_answer", "contains")
_OPTIONS = tuple(dict.fromkeys(option for options in REWARDS.values() for option in options))
_VERSION = re.compile(r"([a-zA-Z0-9][a-zA-Z0-9._-]*:)?[1-9]\d*")


def _version_name(value: Any) -> Any:
    """A version as text. YAML reads 3 as a number."""
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if isinstance(text, str) and not _VERSION.fullmatch(text):
        raise ValueError(
            f"version {text!r} is no version of a model: give a number, e.g. 3, or with the name of another recipe, e.g. other-recipe:3"
        )
    return text


# A version of the recipe's name, as `3`, or of another recipe, as `other-recipe:3`.
VersionName = Annotated[str, BeforeValidator(_version_name, json_schema_input_type=str | int)]

_OWN_FUNCTION = re.compile(r"(?P<file>.+\.py):(?P<function>[A-Za-z_]\w*)")


class RewardFunction(Block):
    """A reward: what it looks at, and its weight in the sum.

    `use` is a reward of the project or a function of your own, as `path/to/file.py:function`:

    - `exact_answer`: 1 if the completion's first sentence gives an accepted answer of the prompt, and nothing else, else 0.
      Answers are compared as those of the exam.
    - `contains`: 1 if an accepted answer stands anywhere in the completion as whole words, else 0.
    - `stopped`: 1 if the completion ended by itself, 0 if it reached its longest length.
    - `length`: 1 at `target` tokens, falling linearly to 0 at no token and at twice as many; or 1 up to `longest` tokens,
      falling linearly to 0 at twice as many.
    - `format`: 1 if the regular expression `pattern` matches the whole completion, else 0.
    - `judge`: the grade from 0 to 1 that the model of the block `judge` gives by the `criterion`, a sentence.
    - `reward_model`: the score of a reward model, a number without bounds. `version` is a version of the recipe's name, e.g. 3, or
      of another one, e.g. `other-recipe:3`. Without it, it is the reward model that the chain trains before this stage.
    """

    use: str
    weight: float = 1.0
    target: int | None = Field(None, ge=1)
    longest: int | None = Field(None, ge=1)
    pattern: str | None = None
    judge: JudgeConfig | None = None
    criterion: str | None = Field(None, min_length=1)
    version: VersionName | None = None

    @property
    def own_function(self) -> tuple[str, str] | None:
        """File and name of the user's own function; None for a reward of the project."""
        match = _OWN_FUNCTION.fullmatch(self.use)
        return (match["file"], match["function"]) if match else None

    @property
    def short_name(self) -> str:
        """The name in logs and reports, without the number that tells two of the same name apart."""
        return self.own_function[1] if self.own_function else self.use

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.use not in REWARDS and self.own_function is None:
            near = get_close_matches(self.use, REWARDS, n=1)
            known = f"did you mean {near[0]}" if near else f"the rewards are {', '.join(REWARDS)}"
            raise ValueError(f"there is no reward {self.use}: {known}, or name your own as path/to/file.py:function")
        own = REWARDS.get(self.use, ())
        other = next((name for name in _OPTIONS if name not in own and getattr(self, name) is not None), None)
        if other is not None:
            users = ", ".join(name for name, options in REWARDS.items() if other in options)
            raise ValueError(f"{other} has no effect with the reward {self.use}, only with {users}: remove it")
        return self

    @model_validator(mode="after")
    def _options(self) -> Self:
        if self.use == "length" and (self.target is None) == (self.longest is None):
            raise ValueError("the reward length needs either `target` or `longest`, a number of tokens")
        if self.use == "judge" and self.judge is None:
            raise ValueError("the reward judge needs the block `judge`, e.g. judge: {client: openai, model: NAME}")
        if self.use != "format":
            return self
        if self.pattern is None:
            raise ValueError("the reward format needs `pattern`, a regular expression")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"pattern {self.pattern!r} is not a regular expression: {error}") from None
        return self


class RewardSet(Block):
    """The rewards of a stage. The model answers the prompts, `rewards` score each answer, and the weighted sum is what
    training raises. `trust_reward_code` allows rewards of your own: their files run as a part of training and evaluation,
    so read them first.
    """

    rewards: list[RewardFunction] = Field(min_length=1)
    trust_reward_code: bool = False

    @property
    def reward_names(self) -> list[str]:
        """The names of the rewards in logs and reports. The second one of a name ends with `_2`."""
        names = [reward.short_name for reward in self.rewards]
        return [
            name if name not in names[:place] else f"{name}_{names[:place].count(name) + 1}"
            for place, name in enumerate(names)
        ]

    @property
    def reward_model(self) -> RewardFunction | None:
        """The reward `reward_model`; None if there is none."""
        return next((reward for reward in self.rewards if reward.use == "reward_model"), None)

    @model_validator(mode="before")
    @classmethod
    def _has_rewards(cls, keys: Any) -> Any:
        if isinstance(keys, dict) and not keys.get("rewards"):
            raise ValueError(
                "rewards is missing: name what answers are rewarded for, e.g. rewards: [{use: exact_answer}]"
            )
        return keys

    @model_validator(mode="after")
    def _weights(self) -> Self:
        if not any(reward.weight for reward in self.rewards):
            raise ValueError("rewards has no weight other than 0, so nothing would be learned: set one to 1")
        if [reward.use for reward in self.rewards].count("reward_model") > 1:
            raise ValueError("rewards names reward_model twice, and a stage has one reward model: remove one of them")
        names = self.reward_names
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two rewards have the name {twice} in reports: rename your function")
        own = next((reward.use for reward in self.rewards if reward.own_function is not None), None)
        if own is not None and not self.trust_reward_code:
            raise ValueError(
                f"rewards names {own}, whose code would run as a part of training: read the file, and set "
                "trust_reward_code to true"
            )
        if own is None and self.trust_reward_code:
            raise ValueError("trust_reward_code has no effect, because rewards names no file of your own: remove it")
        return self


class RewardedConfig(RewardSet, TrainConfig):
    """The keys of the stages that train on rewards."""

    @property
    def reward_set(self) -> RewardSet:
        """The rewards alone, for evaluation."""
        return RewardSet(rewards=self.rewards, trust_reward_code=self.trust_reward_code)

    def rewards_problem(self, stage: str, trained: str | None, compute: ComputeConfig) -> str:
        """Why these rewards cannot work in a recipe; empty if they can.

        Args:
            trained: the stage that trains a reward model before this one; None if there is none.
        """
        here = next((reward.use for reward in self.rewards if reward.own_function or reward.judge), None)
        if here is not None and compute.target != "local":
            return (
                f"{stage}.rewards names {here}, and a job on another machine has neither your files nor the judge's key: use "
                "compute.target local, or other rewards"
            )
        if self.reward_model is not None and self.reward_model.version is None and trained is None:
            return (
                f"{stage}.rewards names reward_model without a version, and chain trains no reward model before {stage}: put reward "
                f"before {stage}, or name a trained one, e.g. {{use: reward_model, version: 3}}"
            )
        return ""
