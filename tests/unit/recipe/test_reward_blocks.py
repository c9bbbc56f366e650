"""Rewards that a recipe names, and those that are refused."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from llm_engineering.errors import RequestError
from llm_engineering.recipe.loading import load_recipe
from llm_engineering.recipe.reward_blocks import RewardSet

ARITHMETIC = Path(__file__).resolve().parents[3] / "configs" / "grpo_arithmetic.yaml"

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
        ([{"use": "a.py:stopped_2"}, {"use": "stopped"}, {"use": "stopped"}], "the name stopped_2"),
        ([{"use": "stopped", "version": 3}], "version has no effect with the reward stopped, only with reward_model"),
        ([{"use": "reward_model", "version": "last"}], "version 'last' is no version of a model"),
        ([{"use": "reward_model", "version": 0}], "version '0' is no version of a model"),
        ([{"use": "reward_model"}, {"use": "reward_model", "version": 3}], "names reward_model twice"),
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


def test_a_run_on_own_prompts_needs_no_documents_and_no_instructions():
    recipe = load_recipe(ARITHMETIC)
    assert (recipe.kinds("grpo"), recipe.reads_documents) == (["prompt"], False)
    made = load_recipe(ARITHMETIC, ["data.prompts=null"])
    assert (made.kinds("grpo"), made.reads_documents) == (["instruction", "prompt"], True)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("grpo.rewards=[{use: stopped, wieght: 2}]", "unknown key `grpo.rewards.0.wieght`. Did you mean `grpo.rewards.weight`"),
        ("promotion.grpo.better_than.base={reward_length: 0.0}", "reward_length, which .* does not measure. It measures: .*reward_exact_answer, reward_stopped"),
        ("promotion.grpo.better_than.base={heldout_loss: 0.0}", "heldout_loss, which a run that ends with grpo does not measure"),
        ("promotion.grpo.better_than.base={rewad: 0.0}", "there is no measure rewad; did you mean reward"),
        ("promotion.grpo=null", r"promotion.grpo is missing: .*{base: {reward: 0.0}"),
    ],
)  # fmt: skip
def test_a_recipe_whose_rewards_do_not_fit_is_refused(override, words):
    with pytest.raises(RequestError, match=words):
        load_recipe(ARITHMETIC, [override])


def test_a_test_split_without_prompts_is_refused():
    with pytest.raises(RequestError, match="test_prompts is set, but prompts is not"):
        load_recipe(ARITHMETIC, ["data.prompts=null", "data.test_prompts=a.jsonl"])


SCORED = ["grpo.rewards=[{use: reward_model}]", "promotion.grpo.not_worse_than.base={reward_exact_answer: null}"]
TRAINED = [
    "reward={learning_rate: 1e-4, num_train_epochs: 1, per_device_train_batch_size: 1, gradient_accumulation_steps: 1}",
    "reward.eval_strategy=epoch",
    "reward.save_strategy=epoch",
    "promotion.reward={better_than: {base: {reward_accuracy: 0.0}}}",
]


def test_a_reward_model_comes_from_a_stage_before_or_from_a_version():
    with pytest.raises(RequestError, match="chain trains no reward model before grpo: put reward before grpo"):
        load_recipe(ARITHMETIC, SCORED)
    with pytest.raises(RequestError, match="chain trains no reward model before grpo"):
        load_recipe(ARITHMETIC, [*SCORED, *TRAINED, "chain=[grpo, reward]"])
    chained = load_recipe(ARITHMETIC, [*SCORED, *TRAINED, "chain=[reward, grpo]"])
    assert chained.reward_stage("grpo") == "reward"
    for version in ("3", "other-recipe:3"):
        named = load_recipe(ARITHMETIC, [*SCORED, f"grpo.rewards=[{{use: reward_model, version: {version}}}]"])
        assert named.grpo.reward_model.version == version


@pytest.mark.parametrize("reward", ["{use: 'own.py:good'}", "{use: judge, judge: {client: openai, model: m}}"])
def test_a_job_elsewhere_has_neither_files_nor_a_judge(reward):
    trust = str("own" in reward).lower()
    job = "{instance_type: ml.g5.xlarge}"
    overrides = [
        f"grpo.rewards=[{reward}]",
        f"grpo.trust_reward_code={trust}",
        "promotion.grpo.not_worse_than.base={reward_exact_answer: null}",
    ]
    load_recipe(ARITHMETIC, overrides)
    with pytest.raises(RequestError, match="a job on another machine has neither your files nor the judge's key"):
        load_recipe(ARITHMETIC, [*overrides, "compute.target=sagemaker", f"compute.sagemaker={job}"])
