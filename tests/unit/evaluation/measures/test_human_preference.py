"""The share of blind comparisons that a model won, and the gate that judges by it."""

import pytest

from llm_engineering.data.storage import FEATURES, rows_dataset, to_dataset
from llm_engineering.evaluation.gate import decide
from llm_engineering.evaluation.measures.human_preference import human_win_rate, identities, trained_questions
from llm_engineering.evaluation.statistics import Bootstrap
from llm_engineering.feedback.agreement import JudgedQuestion
from llm_engineering.models.base_model import weights_hash
from llm_engineering.recipe.evaluation_blocks import PromotionConfig
from llm_engineering.recipe.model_blocks import ModelConfig
from tests.tiny_models import instruction

MODELS = {"base": "b", "sft": "s", "incumbent": "i"}
BOOTSTRAP = Bootstrap(500, 0.95, 1)
RULES = {"better_than": {"base": {"human_win_rate": 0.0}, "incumbent": {"human_win_rate": 0.0}}}
GATE = PromotionConfig.model_validate({"sft": RULES})


def won(scores, other="b"):
    """Questions on which the new model, `s`, had these scores."""
    return [JudgedQuestion(other, "s", f"question {n} {other}", 1 - score, 1) for n, score in enumerate(scores)]


def measured(judged, trained=()):
    return human_win_rate(judged, MODELS, "sft", trained, BOOTSTRAP)


def decided(measure, incumbent=None):
    report = {"newest": "sft", "measures": {"human_win_rate": measure} if measure else {}}
    return decide(report, GATE, incumbent, version=7)


def test_the_win_rate_is_the_share_of_questions_with_wilsons_interval():
    measure = measured(won([1.0] * 15 + [0.0] * 5))
    assert measure["models"]["sft"]["value"] == 0.75
    assert measure["models"]["base"]["value"] == 0.25
    difference = measure["differences"]["sft-base"]
    # Wilson (1927) for 15 of 20: 0.5313 to 0.8881.
    assert difference["value"] == 0.25
    assert difference["low"] == pytest.approx(0.0313, abs=1e-4)
    assert difference["high"] == pytest.approx(0.3881, abs=1e-4)
    assert difference["n"] == 20
    assert list(measure["differences"]) == ["sft-base"]


def test_ties_are_half_wins_and_other_models_do_not_count():
    judged = [*won([1.0, 0.5, 0.5, 0.0, 1.0]), JudgedQuestion("b", "x", "who", 1.0, 1), *won([0.0, 0.0], "i")]
    measure = measured(judged)
    assert measure["differences"]["sft-base"]["value"] == pytest.approx(0.1)
    assert measure["differences"]["sft-incumbent"]["value"] == -0.5
    assert measure["models"]["sft"]["value"] == pytest.approx(3 / 7)
    assert measured([JudgedQuestion("b", "x", "who", 1.0, 1)]) is None


@pytest.mark.parametrize("scores", [[0.5] * 10, [0.0] * 8 + [0.5] * 2, [1.0] * 9 + [0.5]])
def test_the_interval_with_ties_is_not_empty_and_lies_between_0_and_1(scores):
    share = measured(won(scores))["models"]["sft"]
    assert 0 <= share["low"] < share["value"] < share["high"] <= 1


def test_questions_that_the_model_was_trained_on_do_not_count():
    judged = won([1.0] * 10 + [0.0] * 10)
    trained = {one.question for one in judged[:10]}
    assert measured(judged, trained)["models"]["sft"] == {"value": 0.0, "low": 0.0, "high": pytest.approx(0.2775, abs=1e-4), "n": 10}  # fmt: skip
    assert measured(judged[:10], trained) is None


def test_the_questions_of_training_and_validation_are_trained_on():
    parts = {"train": [instruction(1)], "validation": [instruction(2)], "test": [instruction(3)]}
    assert list(trained_questions({n: rows_dataset(rows, "instruction") for n, rows in parts.items()})) == [
        "what is 1",
        "what is 2",
    ]
    assert list(trained_questions({"train": to_dataset([], FEATURES["text"])})) == []


def test_the_gate_judges_by_people():
    passed = decided(measured(won([1.0] * 15 + [0.0] * 5)))
    assert (passed.outcome, passed.rules[0].bound) == ("passed", 0.0)
    chance = decided(measured(won([1.0] * 12 + [0.0] * 8)))
    assert chance.outcome == "failed"
    assert "human_win_rate better than base by more than 0: 0.1000, 95% interval" in chance.reason
    assert decided(measured(won([0.5] * 20))).outcome == "failed"


def test_the_gate_says_what_to_do_if_nobody_has_compared_the_model():
    decision = decided(None, incumbent=3)
    assert decision.outcome == "failed"
    words = "compare version 7 with base by `make review`, then run the same command again"
    assert words in decision.rules[0].reason
    assert "compare version 7 with version 3 by" in decision.rules[1].reason


def test_a_model_is_told_apart_by_its_weights(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    found = identities(ModelConfig(name_or_path="some/model", revision="abc"), {"sft": tmp_path})
    assert found == {"base": "some/model@abc", "sft": weights_hash(tmp_path)}
    (tmp_path / "model.safetensors").write_bytes(b"others")
    assert identities(ModelConfig(name_or_path="some/model", revision="abc"), {"sft": tmp_path})["sft"] != found["sft"]
