"""Rewards that a recipe names, and those that are refused."""

import pytest
from pydantic import ValidationError

from llm_engineering.recipe.reward_blocks import RewardSet

JUDGE = {"use": "judge", "judge": {"client": "openai", "model": "m"}}


def read(*rewards, **keys):
    return RewardSet.model_validate({"rewards": list(rewards), **keys})


@pytest.mark.parametrize(
    ("rewards", "words"),
    [
        ([], "rewards is missing"),
        ([{"use": "stoped"}], "there is no reward stoped: did you mean stopped"),
        ([{"use": "my_file.txt:f"}], "there is no reward my_file.txt:f"),
        ([{"use": "stopped", "target": 5}], "target has no effect with the reward stopped, only with length"),
        ([{"use": "length"}], "needs either `target` or `longest`"),
        ([{"use": "length", "target": 5, "longest": 9}], "needs either `target` or `longest`"),
        ([{"use": "format"}], "needs `pattern`"),
        ([{"use": "format", "pattern": "("}], "is not a regular expression"),
        ([{"use": "judge"}], "needs the block `judge`"),
        ([{"use": "judge", "judge": {"client": "openai", "model": "m", "temperature": 1}}], "temperature 0"),
        ([{"use": "stopped", "weight": 0}, {"use": "contains", "weight": 0.0}], "no weight other than 0"),
        ([{"use": "stopped", "weight": float("inf")}], "finite"),
        ([{"use": "own.py:good"}], "whose code would run as a part of training"),
    ],
)
def test_a_reward_that_cannot_work_is_refused(rewards, words):
    with pytest.raises(ValidationError, match=words):
        read(*rewards)


def test_trust_without_code_is_refused():
    with pytest.raises(ValidationError, match="trust_reward_code has no effect"):
        read({"use": "stopped"}, trust_reward_code=True)


def test_rewards_of_one_name_get_numbers():
    rewards = read(
        {"use": "length", "target": 5},
        {"use": "own/a.py:good"},
        {"use": "length", "longest": 9},
        {"use": "b.py:good"},
        JUDGE,
        trust_reward_code=True,
    )
    assert rewards.reward_names == ["length", "good", "length_2", "good_2", "judge"]
