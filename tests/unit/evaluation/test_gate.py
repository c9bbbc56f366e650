"""The gate on hand-written reports."""

import pytest

from llm_engineering.errors import RequestError
from llm_engineering.evaluation.gate import PromotionDecision, decide
from llm_engineering.recipe.evaluation_blocks import PromotionConfig
from llm_engineering.recipe.loading import load_recipe

GATE = PromotionConfig.model_validate(
    {
        "sft": {"better_than": {"base": {"heldout_loss": 0.1}, "incumbent": {"heldout_loss": 0.0}}},
        "dpo": {
            "better_than": {
                "base": {"heldout_loss": 0.1},
                "sft": {"preference_accuracy": 0.0},
                "incumbent": {"preference_accuracy": 0.05},
            },
            "not_worse_than": {"sft": {"heldout_loss": 0.15}},
        },
    }
)


def difference(value, low, high):
    return {"value": value, "low": low, "high": high, "n": 100}


def sft_report(loss, incumbent=None):
    differences = {"sft-base": difference(*loss)}
    if incumbent is not None:
        differences["sft-incumbent"] = difference(*incumbent)
    return {
        "newest": "sft",
        "models": ["base", "sft"] + (["incumbent"] if incumbent else []),
        "measures": {"heldout_loss": {"better": "lower", "models": {}, "differences": differences}},
    }


def dpo_report(**changed):
    """A report whose DPO model passes, except for `changed` differences, e.g. `heldout_loss__base=(-0.5, -0.6, -0.4)`."""
    differences = {
        "heldout_loss__base": (-0.5, -0.6, -0.4),
        "heldout_loss__sft": (0.05, 0.02, 0.08),
        "preference_accuracy__sft": (0.3, 0.2, 0.4),
        "preference_accuracy__incumbent": (0.2, 0.1, 0.3),
        **changed,
    }
    measures = {
        "heldout_loss": {"better": "lower", "models": {}, "differences": {}},
        "preference_accuracy": {"better": "higher", "models": {}, "differences": {}},
    }
    for key, ends in differences.items():
        measure, than = key.split("__")
        measures[measure]["differences"][f"dpo-{than}"] = difference(*ends)
    return {"newest": "dpo", "models": ["base", "sft", "dpo", "incumbent"], "measures": measures}


def verdicts(decision):
    return {(rule.measure, rule.than): rule.verdict for rule in decision.rules}


def test_a_lower_loss_is_judged_by_the_smallest_gain_of_its_interval():
    """The loss fell by 0.15, and by at least 0.11, more than 0.1. The same gain with a wider interval fails."""
    passed = decide(sft_report((-0.15, -0.19, -0.11)), GATE, None)
    (base, incumbent) = passed.rules
    assert (base.value, base.low, base.high, base.bound, base.verdict) == (0.15, 0.11, 0.19, 0.1, "passed")
    assert (incumbent.verdict, incumbent.reason) == ("skipped", "nothing is in production")
    assert (passed.outcome, passed.stage, passed.candidate) == ("passed", "staging", "sft")
    chance = decide(sft_report((-0.15, -0.25, -0.05)), GATE, None)
    assert (chance.outcome, chance.stage, chance.passed) == ("failed", None, False)
    assert "heldout_loss better than base by more than 0.1: 0.1500, 95% interval 0.0500 to 0.2500" in chance.reason


def test_a_gain_equal_to_the_bound_fails():
    assert decide(sft_report((-0.2, -0.3, -0.1)), GATE, None).outcome == "failed"


def test_an_equal_model_fails():
    """Without a model in production it fails against the base model, else against the incumbent."""
    equal = (0.0, 0.0, 0.0)
    assert decide(sft_report(equal), GATE, None).outcome == "failed"
    decision = decide(sft_report((-0.5, -0.6, -0.4), incumbent=equal), GATE, 3)
    assert verdicts(decision) == {("heldout_loss", "base"): "passed", ("heldout_loss", "incumbent"): "failed"}
    assert decision.stage is None
    assert decision.incumbent == 3
    assert decision.reason.startswith(
        "Not promoted, version 3 stays in production. Failed: heldout_loss better than inc"
    )
    assert "-0.0000" not in decision.reason


def test_dpo_is_judged_by_its_own_rules():
    decision = decide(dpo_report(), GATE, 3)
    assert decision.candidate == "dpo"
    assert set(verdicts(decision).values()) == {"passed"}
    assert len(decision.rules) == 4


@pytest.mark.parametrize(
    ("changed", "failed"),
    [
        ({"heldout_loss__base": (-0.15, -0.25, -0.05)}, ("heldout_loss", "base")),
        ({"preference_accuracy__sft": (0.1, 0.0, 0.2)}, ("preference_accuracy", "sft")),
        ({"preference_accuracy__incumbent": (0.1, 0.05, 0.2)}, ("preference_accuracy", "incumbent")),
        ({"preference_accuracy__incumbent": (-0.2, -0.3, -0.1)}, ("preference_accuracy", "incumbent")),
        # The estimate is a rise by 0.1, but the interval reaches 0.16.
        ({"heldout_loss__sft": (0.1, 0.04, 0.16)}, ("heldout_loss", "sft")),
        ({"heldout_loss__sft": (float("nan"), None, None)}, ("heldout_loss", "sft")),
    ],
)
def test_each_rule_fails_alone(changed, failed):
    decision = decide(dpo_report(**changed), GATE, 3)
    assert [key for key, verdict in verdicts(decision).items() if verdict == "failed"] == [failed]
    assert decision.stage is None
    # The decision survives JSON, including values that are not numbers.
    assert PromotionDecision.model_validate_json(decision.model_dump_json()) == decision


def test_not_worse_allows_a_loss_up_to_its_bound():
    assert decide(dpo_report(heldout_loss__sft=(0.1, 0.05, 0.15)), GATE, 3).outcome == "passed"
    assert decide(dpo_report(heldout_loss__sft=(0.1, 0.05, 0.1501)), GATE, 3).outcome == "failed"


def test_a_rule_fails_if_the_model_in_production_was_not_measured():
    decision = decide(sft_report((-0.5, -0.6, -0.4)), GATE, 7)
    assert decision.outcome == "failed"
    assert decision.rules[1].reason == "the report does not compare sft with version 7, which is in production"


def test_the_reason_states_the_confidence_of_the_report():
    report = {**sft_report((0.0, 0.0, 0.0)), "confidence": 0.9}
    assert "90% interval" in decide(report, GATE, None).reason


def test_only_auto_promotes_to_production():
    report = sft_report((-0.5, -0.6, -0.4))
    assert decide(report, GATE.model_copy(update={"auto": True}), None).stage == "production"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("promotion.dpo.better_than.base={heldout_los: 0.1}", "there is no measure heldout_los; did you mean heldout_loss?"),
        ("promotion.sft.better_than.base={preference_accuracy: 0}", "move the rule to promotion.dpo"),
        ("promotion.sft.not_worse_than={sft: {rouge_l: 0}}", "has no sft model before it to compare with"),
        ("promotion.dpo.not_worse_than.sft={length_ratio: 0.1}", "neither a higher nor a lower length_ratio is better: remove the rule"),
        ("promotion.dpo.not_worse_than.sft={checks: 0.1}", "names checks, which the evaluation of this recipe does not"),
        ("promotion.dpo.not_worse_than.sft={lm_eval_x: 0.1}", "names lm_eval_x, which the evaluation of this recipe"),
        ("promotion.sft.better_than.incumbent.heldout_loss=null", "better_than.incumbent has no measure"),
        ("promotion.sft.better_than.base.heldout_loss=-0.1", "promotion.sft.better_than.base.heldout_loss"),
    ],
)  # fmt: skip
def test_rules_that_no_evaluation_can_check_are_refused(override, words):
    with pytest.raises(RequestError, match="promotion") as error:
        load_recipe("configs/local.yaml", [override])
    assert words in str(error.value)


def test_null_removes_an_inherited_rule():
    overrides = ["promotion.dpo.better_than.base={heldout_loss: null, rouge_l: 0.02}"]
    recipe = load_recipe("configs/local.yaml", overrides)
    rules = [(rule.path, rule.measure) for rule in recipe.promotion.all_rules()]
    named = [rule for rule in rules if rule[0] == "dpo.better_than.base"]
    assert named == [("dpo.better_than.base", "rouge_l")]


def test_a_run_that_ends_with_cpt_is_judged_by_its_own_rules():
    gate = PromotionConfig.model_validate(
        {
            "cpt": {"better_than": {"base": {"document_loss": 0.1}, "incumbent": {"document_loss": 0.0}}},
            "sft": {
                "better_than": {
                    "base": {"heldout_loss": 0.0},
                    "cpt": {"heldout_loss": 0.1},
                    "incumbent": {"heldout_loss": 0},
                },
                "not_worse_than": {"cpt": {"document_loss": 0.2}},
            },
        }
    )
    losses = {"cpt-base": difference(-0.3, -0.4, -0.2), "cpt-incumbent": difference(0.1, 0.05, 0.2)}
    measures = {"document_loss": {"better": "lower", "models": {}, "differences": losses}}
    report = {"newest": "cpt", "models": ["base", "cpt", "incumbent"], "measures": measures}
    assert decide(report, gate, None).outcome == "passed"
    assert verdicts(decide(report, gate, 3)) == {
        ("document_loss", "base"): "passed",
        ("document_loss", "incumbent"): "failed",
    }

    heldout = {"sft-base": difference(-0.5, -0.6, -0.4), "sft-cpt": difference(-0.3, -0.4, -0.2)}
    documents = {"sft-cpt": difference(0.1, 0.05, 0.15)}
    report = {
        "newest": "sft",
        "models": ["base", "cpt", "sft"],
        "measures": {
            "heldout_loss": {"better": "lower", "models": {}, "differences": heldout},
            "document_loss": {"better": "lower", "models": {}, "differences": documents},
        },
    }
    decision = decide(report, gate, None)
    assert [(rule.measure, rule.than, rule.verdict) for rule in decision.rules] == [
        ("heldout_loss", "base", "passed"),
        ("heldout_loss", "cpt", "passed"),
        ("heldout_loss", "incumbent", "skipped"),
        ("document_loss", "cpt", "passed"),
    ]
    documents["sft-cpt"] = difference(0.1, 0.05, 0.25)
    failed = decide(report, gate, None)
    assert [rule.name for rule in failed.rules if rule.verdict == "failed"] == [
        "document_loss not worse than cpt by more than 0.2"
    ]
