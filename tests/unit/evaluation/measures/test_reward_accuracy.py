"""The measure of a reward model, its report page, and the gate on it."""

import pytest

from llm_engineering.evaluation.gate import decide
from llm_engineering.evaluation.heldout import HeldOutRow
from llm_engineering.evaluation.measures.reward_accuracy import reward_accuracy
from llm_engineering.evaluation.statistics import Bootstrap
from llm_engineering.recipe.evaluation_blocks import PromotionConfig
from llm_engineering.reports.evaluation_report import evaluation_page
from tests.tiny_models import pair

BOOTSTRAP = Bootstrap(200, 0.95, 0)
GATE = PromotionConfig.model_validate({"reward": {"better_than": {"base": {"reward_accuracy": 0.0}}}})


def measured(right: int, count: int, documents: int | None = None):
    """The measure of a model that orders the first `right` of `count` pairs rightly, in `documents` documents of equal size."""
    rows = [pair(number) for number in range(count)]
    if documents is not None:
        rows = [
            row.model_copy(update={"document": str(number * documents // count)}) for number, row in enumerate(rows)
        ]
    chosen = [1.0 if number < right else -1.0 for number in range(count)]
    return reward_accuracy("reward", [HeldOutRow(row, [], False) for row in rows], chosen, [0.0] * count, BOOTSTRAP)


def report(measure):
    return {"newest": "reward", "confidence": 0.95, "measures": {"reward_accuracy": measure}}


def test_the_accuracy_is_compared_with_chance():
    measure = measured(80, 100)
    found, above = measure["models"]["reward"], measure["differences"]["reward-base"]
    assert found["value"] == 0.8
    assert 0.70 < found["low"] < 0.72 < 0.86 < found["high"] < 0.88
    assert measure["models"]["base"]["value"] == 0.5
    assert [above[key] for key in ("value", "low", "high")] == pytest.approx(
        [found[key] - 0.5 for key in ("value", "low", "high")]
    )


def test_equal_rewards_are_not_in_order():
    rows = [HeldOutRow(pair(number), [], False) for number in range(20)]
    measure = reward_accuracy("reward", rows, [0.0] * 20, [0.0] * 20, BOOTSTRAP)
    assert measure["models"]["reward"]["value"] == 0


def test_pairs_of_a_document_count_as_fewer():
    alone, grouped = (measured(80, 100, documents)["models"]["reward"] for documents in (None, 10))
    assert grouped["high"] - grouped["low"] > 1.5 * (alone["high"] - alone["low"])


@pytest.mark.parametrize(("right", "outcome"), [(80, "passed"), (55, "failed"), (20, "failed")])
def test_the_gate_asks_for_an_interval_above_chance_and_promotes_nothing(right, outcome):
    decision = decide(report(measured(right, 100)), GATE, incumbent=None)
    assert (decision.outcome, decision.stage) == (outcome, None)
    if outcome == "passed":
        assert decision.reason.startswith("Every rule passed. A reward model answers nothing, so it is not promoted")


def test_the_page_shows_accuracy_rewards_and_pairs():
    answer = {"text": "It is <this>.", "reward": 1.25}
    data = report(measured(80, 100)) | {
        "heldout_pairs": 100,
        "rewards": {"chosen": [1.0, 2.0, 2.0], "rejected": [0.0, 0.5, 2.0]},
        "pairs": [{"prompt": "What is 3?", "chosen": answer, "rejected": answer | {"reward": -0.5}}],
    }
    page = evaluation_page(data, None)
    assert (
        "Of 100 held-out pairs, the reward model gives the chosen answer the higher reward in a share of 0.80" in page
    )
    assert "more often than by chance" in page
    assert "chosen: +1.25" in page
    assert "rejected: -0.50" in page
    assert "It is &lt;this&gt;." in page
    assert "<script" not in page
