"""A chain with a reward model, as users run it, and the commands that use or refuse its version."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.integration.conftest import Project, Run, make_project

RECIPE = """
extends: {recipe}
name: tiny-reward
chain: [sft, reward]
dpo: null
data: {{preferences: {preferences}}}
reward:
  learning_rate: 1e-2
  num_train_epochs: 2
  per_device_train_batch_size: 4
  gradient_accumulation_steps: 1
  eval_strategy: epoch
  save_strategy: epoch
grpo:
  learning_rate: 1e-3
  num_train_epochs: 1
  max_steps: 2
  per_device_train_batch_size: 4
  gradient_accumulation_steps: 1
  num_generations: 2
  max_completion_length: 4
  eval_strategy: epoch
  save_strategy: epoch
  rewards: [{{use: reward_model}}]
promotion:
  dpo: null
  grpo: {{better_than: {{base: {{reward: 0.0}}, incumbent: {{reward: 0.0}}}}}}
  reward: {{better_than: {{base: {{reward_accuracy: 0.0}}}}}}
"""


@dataclass
class Rewarded:
    """A project after `run reward`, which has trained SFT first."""

    project: Project
    run: Run

    def command(self, *words: str) -> Run:
        return self.project.command(*words, "--config", str(self.project.recipe))


@pytest.fixture(scope="module")
def rewarded(tiny_model: Path, unused: Project, tmp_path_factory: pytest.TempPathFactory) -> Rewarded:
    project = make_project(tmp_path_factory.mktemp("rewarded"), tiny_model, unused)
    recipe = project.folder / "reward.yaml"
    # The gate passes only if nearly all held-out pairs are in order. The model learns to order these pairs in one epoch.
    # It cannot always order pairs with an answer of the tiny model, which may be the beginning of the chosen answer.
    preferences = project.folder / "preferences.jsonl"
    pairs = (
        {
            "prompt": f"Where does the number {i} stand?",
            "chosen": f"The number {i} comes after {i - 1}, and {i + 1} comes after it.",
            "rejected": "Nobody has ever counted so far!",
        }
        for i in range(60)
    )
    preferences.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    recipe.write_text(RECIPE.format(recipe=project.recipe, preferences=preferences))
    project.recipe = recipe
    return Rewarded(project, project.run("reward"))


def test_the_reward_model_is_measured_by_pairs_alone_and_not_promoted(rewarded):
    run = rewarded.run
    assert run.code == 0, run.stderr
    assert "No sft model is registered: training it first" in run.stderr
    metrics = {name for name in run.json["metrics"] if name != "tokens_per_second"}
    assert metrics == {"reward_accuracy_base", "reward_accuracy_reward"}
    assert run.json["metrics"]["reward_accuracy_reward"] > 0.5
    listed = rewarded.command("models", "list", "--json").json["versions"]
    assert [(version["model"], version["gate"]) for version in listed] == [("reward", "passed"), ("sft", "passed")]
    assert [version["stage"] for version in listed] == [None, "staging"]
    report = json.loads(next(rewarded.project.folder.glob("stores/**/evaluation_report/**/report.json")).read_text())
    assert report["models"]


@pytest.mark.parametrize(
    "words",
    [
        ("chat", "--prompt", "Hi", "--version", "2"),
        ("compare", "--prompt", "Hi", "--version", "2"),
        ("serve", "--version", "2"),
        ("models", "export", "--version", "2", "--output", "x"),
        ("models", "promote", "2"),
    ],
    ids=lambda words: "-".join(words[:2]),
)
def test_a_command_that_needs_answers_refuses_a_reward_model(rewarded, words):
    refused = rewarded.command(*words)
    assert refused.code == 2
    assert "ersion 2 " in refused.stderr
    assert "holds a reward model" in refused.stderr


def test_compare_shows_the_best_of_several_answers(rewarded):
    asked = ("compare", "--prompt", "Where does the number 7 stand?", "--max-new-tokens", "4", "--seed", "5")
    best = ("--best-of", "3", "--reward-model", "2")
    first, again = (rewarded.command(*asked, *best) for _ in range(2))
    assert first.code == 0, first.stderr
    assert first.stdout.count("of 3 answers from") == 2
    assert again.stdout == first.stdout
    for wrong, words in (
        (("--best-of", "3"), "--best-of and --reward-model belong together"),
        (("--best-of", "3", "--reward-model", "1"), "Version 1 of tiny-reward has no reward model"),
        ((*best, "--temperature", "0"), "--best-of has no effect at temperature 0"),
    ):
        refused = rewarded.command(*asked, *wrong)
        assert (refused.code, words in refused.stderr) == (2, True), refused.stderr


def test_grpo_trains_on_the_reward_model_of_its_chain_or_of_a_version(rewarded):
    chained = rewarded.project.run("grpo", "--set", "chain=[sft, reward, grpo]")
    assert chained.code == 0, chained.stderr
    assert "The stage after reward starts from its adapter" in chained.stderr
    assert "training it first" not in chained.stderr
    named = rewarded.project.run(
        "grpo", "--set", "chain=[sft, grpo]", "--set", "grpo.rewards=[{use: reward_model, version: 2}]"
    )
    assert named.code == 0, named.stderr
    for run in (chained, named):
        assert {"reward_grpo", "reward_reward_model_base"} <= run.json["metrics"].keys()
    # The same model scores in both.
    assert named.json["metrics"]["reward_base"] == chained.json["metrics"]["reward_base"]
    lineage = rewarded.command("models", "lineage", "4").stdout
    assert "reward_adapter" in lineage


def test_a_reward_model_judges_the_answers_of_another_stage(rewarded):
    judged = rewarded.project.run(
        "sft",
        *("--set", "chain=[sft]", "--set", "evaluation.reward_model=2"),
        *("--set", "promotion.sft.better_than.base.reward_model_win_rate=0.0"),
    )
    assert judged.code == 0, judged.stderr
    found = (json.loads(path.read_text()) for path in rewarded.project.folder.glob("stores/**/report.json"))
    report = next(data for data in found if "reward_model_win_rate" in data.get("measures", {}))
    rewards = [{name: answer["reward"] for name, answer in row["answers"].items()} for row in report["samples"]]
    assert len(rewards) == report["generated_rows"]
    wins = [1.0 if row["sft"] > row["base"] else 0.5 if row["sft"] == row["base"] else 0.0 for row in rewards]
    share = sum(wins) / len(wins)
    assert judged.json["metrics"]["reward_model_win_rate_sft"] == pytest.approx(share)
    assert judged.json["metrics"]["reward_model_win_rate_base"] == pytest.approx(1 - share)
    net = report["measures"]["reward_model_win_rate"]["differences"]["sft-base"]
    assert net["value"] == pytest.approx(2 * share - 1)
    # The gate had a rule on it, whatever its verdict.
    assert "reward_model_win_rate" in judged.stderr


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["evaluation.reward_model=1"],
            "evaluation.reward_model, version 1: Version 1 of tiny-reward has no reward model",
        ),
        (["grpo.rewards=[{use: reward_model, version: 1}]"], "Version 1 of tiny-reward has no reward model"),
        (["grpo.rewards=[{use: reward_model, version: 77}]"], "There is no version 77 of tiny-reward"),
        (["model.name_or_path=embedded:smollm2-135m-instruct"], "was trained on the base model"),
        (["formatting.chat_template=alpaca"], "another tokenizer or chat template"),
        (["grpo.rewards=[{use: reward_model}]"], "chain trains no reward model before grpo"),
    ],
)
def test_a_reward_model_that_cannot_score_is_refused_before_any_work(rewarded, overrides, words):
    sets = ["chain=[sft, grpo]", "grpo.rewards=[{use: reward_model, version: 2}]", *overrides]
    refused = rewarded.project.run("grpo", *(word for override in sets for word in ("--set", override)))
    assert (refused.code, words in refused.stderr) == (2, True), refused.stderr
    assert "Running" not in refused.stderr
