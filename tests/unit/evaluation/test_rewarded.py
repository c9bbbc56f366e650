"""Held-out prompts, answered by every model and scored by the rewards of a stage."""

import pytest

from llm_engineering.data.ledger import Ledger
from llm_engineering.data.storage import rows_dataset
from llm_engineering.evaluation.evaluate import Rewarding, evaluate
from llm_engineering.evaluation.gate import decide
from llm_engineering.evaluation.heldout import held_out
from llm_engineering.formatting.datasets import format_splits
from llm_engineering.models.tokenizer import load_tokenizer
from llm_engineering.recipe.data_blocks import FormattingConfig
from llm_engineering.recipe.evaluation_blocks import EvaluationConfig, PromotionConfig
from llm_engineering.recipe.model_blocks import ModelConfig
from llm_engineering.recipe.reward_blocks import RewardSet
from llm_engineering.recipe.training_blocks import TrackingConfig, TrainingSetup
from llm_engineering.reports.evaluation_report import evaluation_page
from tests.tiny_models import question

LONGEST = 6


@pytest.fixture
def report(small_llama, cpu, settings, tmp_path):
    """A report of the base model alone, on eight prompts."""
    setup = TrainingSetup(
        model=ModelConfig(name_or_path=str(small_llama), revision="test"),
        max_length=256,
        chat_template="chatml",
        compute=cpu,
        tracking=TrackingConfig(comet="off"),
        seed=3,
    )
    dataset = rows_dataset([question(number) for number in range(8)], "prompt")
    ledger = Ledger()
    ledger.record("prompt", 8, 8)
    tokenizer = load_tokenizer(setup.model, settings, setup.chat_template)
    formatting = FormattingConfig(max_length=256)
    made = format_splits({"test": dataset}, "prompt", tokenizer, formatting, tmp_path, ledger)[0]["test"]
    rewards = [{"use": "stopped", "weight": -1}, {"use": "length", "target": LONGEST, "weight": 2}]
    config = EvaluationConfig(batch_size=4, sample_answers=2, generated_rows=5, bootstrap_samples=200)
    rewarding = Rewarding(RewardSet.model_validate({"rewards": rewards}), LONGEST)
    return evaluate({}, held_out({"prompt": made}, {"prompt": dataset}), config, setup, settings, rewarding=rewarding)


def test_rewards_score_the_answers_to_held_out_prompts(report):
    rows = report["rewards"]["rows"]
    assert (report["heldout_prompts"], report["heldout_rows"], len(rows)) == (5, 0, 2)
    assert report["rewards"]["weights"] == {"stopped": -1, "length": 2}
    for row in rows:
        answer = row["answers"]["base"]
        assert answer["scores"]["stopped"] == answer["stopped"]
        assert answer["reward"] == 2 * answer["scores"]["length"] - answer["scores"]["stopped"]
    measures = report["measures"]
    assert [name for name in measures if name.startswith("reward")] == ["reward", "reward_stopped", "reward_length"]
    assert [measures[name]["better"] for name in ("reward_stopped", "reward_length")] == ["lower", "higher"]
    means = {name: measures[name]["models"]["base"]["value"] for name in measures}
    assert means["reward"] == pytest.approx(2 * means["reward_length"] - means["reward_stopped"])


def test_the_page_shows_the_answers_with_their_scores(report):
    newest = {**report, "models": ["base", "grpo"], "newest": "grpo"}
    for row in newest["rewards"]["rows"]:
        row["answers"]["grpo"] = {
            "text": "It is Oskby.",
            "stopped": True,
            "reward": 1.5,
            "scores": {"stopped": 1, "length": 0.25},
        }
    difference = {"value": 0.5, "low": 0.25, "high": 0.75, "n": 5, "documents": 5}
    for measure in newest["measures"].values():
        measure["differences"]["grpo-base"] = difference
        measure["models"]["grpo"] = measure["models"]["base"]
    page = evaluation_page(newest, None)
    assert "On 5 held-out prompts, the reward of the GRPO model is better than that of the base model" in page
    assert "It is Oskby." in page
    assert "1.50" in page


def test_the_gate_judges_rewards(report):
    report["newest"] = "grpo"
    for measure, low in (("reward", 0.25), ("reward_length", -0.5)):
        report["measures"][measure]["differences"]["grpo-base"] = {"value": 0.5, "low": low, "high": 0.75}
    rules = {"better_than": {"base": {"reward": 0.2, "reward_length": 0.0}, "incumbent": {"reward": 0.0}}}
    decision = decide(report, PromotionConfig.model_validate({"grpo": rules}), None)
    assert [rule.verdict for rule in decision.rules] == ["passed", "failed", "skipped"]
