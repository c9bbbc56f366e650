"""The gate on hand-written reports."""

import pytest

from llm_engineering.errors import RequestError
from llm_engineering.evaluation.evaluate import exam_measures
from llm_engineering.evaluation.gate import PromotionDecision, decide
from llm_engineering.evaluation.measures.exam import Exam, ExamRow
from llm_engineering.evaluation.models import Sample
from llm_engineering.evaluation.statistics import Bootstrap
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
        ("promotion.sft.better_than.base={preference_accuracy: 0}", "move it to a stage that measures preference_accuracy"),
        ("promotion.sft.not_worse_than={sft: {rouge_l: 0}}", "has no sft model before it to compare with"),
        ("promotion.dpo.not_worse_than.sft={length_ratio: 0.1}", "neither a higher nor a lower length_ratio is better: remove the rule"),
        ("promotion.dpo.not_worse_than.sft={checks: 0.1}", "names checks, which a run that ends with dpo does not measure"),
        ("promotion.dpo.not_worse_than.sft={lm_eval_x: 0.1}", "names lm_eval_x, which a run that ends with dpo does not measure"),
        ("promotion.sft.better_than.incumbent.heldout_loss=null", "better_than.incumbent has no measure"),
        ("promotion.sft.better_than.base.heldout_loss=-0.1", "promotion.sft.better_than.base.heldout_loss"),
    ],
)  # fmt: skip
def test_rules_that_no_evaluation_can_check_are_refused(override, words):
    with pytest.raises(RequestError, match="promotion") as error:
        load_recipe("configs/python_reference.yaml", [override])
    assert words in str(error.value)


def test_null_removes_an_inherited_rule():
    overrides = ["promotion.dpo.better_than.base={heldout_loss: null, rouge_l: 0.02}"]
    recipe = load_recipe("configs/python_reference.yaml", overrides)
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


EXAM_GATE = PromotionConfig.model_validate(
    {
        "sft": {
            "better_than": {"base": {"exam_accuracy": 0.2}, "incumbent": {"exam_accuracy": 0.0}},
            "not_worse_than": {"base": {"exam_control": 0.15, "exam_abstention": 0.1}},
        }
    }
)
# The answers to two questions about each of 80 facts, in 16 places, and to 40 unanswerable and 60 general questions.
FACTS, DECLINED, GENERAL = 80, 40, 60
QUESTIONS = [
    *(
        ExamRow(id=f"{fact}-{wording}", question=f"{wording} {fact}", answers=[f"town{fact % 16}"], facts=[str(fact)])
        for fact in range(FACTS)
        for wording in ("Where is", "In which town is")
    ),
    *(ExamRow(id=f"u{n}", question=f"Who made {n}?", kind="unanswerable") for n in range(DECLINED)),
    *(ExamRow(id=f"g{n}", question=f"General {n}", kind="control", answers=["blue"]) for n in range(GENERAL)),
]
BASE_ANSWERS = [*["No idea"] * 2 * FACTS, *["A smith"] * DECLINED, *["blue", "red"] * (GENERAL // 2)]


def trained(places):
    """The answers of a model that answers with these places, and the other questions as the base model does."""
    return [*(f"It is town{place % 16}." for place in places), *BASE_ANSWERS[2 * FACTS :]]


# 60 of 80 facts, for both questions; the other answers are of the wrong place.
LEARNED = [row // 2 if row < 120 else row // 2 + 1 for row in range(2 * FACTS)]


def judge_exam(sft, incumbent=None, gate=EXAM_GATE):
    models = {"base": BASE_ANSWERS, "sft": sft} | ({"incumbent": incumbent} if incumbent else {})
    exam = Exam(QUESTIONS, [[] for _ in QUESTIONS], 8)
    taken = {name: dict(enumerate(Sample(text, True, []) for text in texts)) for name, texts in models.items()}
    report = {"newest": "sft", "measures": exam_measures(exam, taken, "sft", Bootstrap(200, 0.95, 1))}
    return decide(report, gate, 3 if incumbent else None)


def test_a_model_that_learned_the_facts_is_promoted():
    decision = judge_exam(trained(LEARNED))
    assert decision.outcome == "passed", decision.reason
    assert decision.rules[0].value == pytest.approx(0.75, abs=0.05)


@pytest.mark.parametrize(
    "answers",
    [
        # It learned each fact as that of the next entity, and 1 of 16 places is right by chance.
        trained([(row // 2) + 1 for row in range(2 * FACTS)]),
        # Each question has the answer of a question that is far from it.
        trained([(row * 37 + 5) // 2 for row in range(2 * FACTS)]),
        # A fresh adapter changes nothing.
        BASE_ANSWERS,
    ],
    ids=["swapped facts", "shuffled answers", "untrained"],
)
def test_a_model_that_learned_wrong_facts_or_nothing_is_refused(answers):
    decision = judge_exam(answers)
    assert decision.outcome == "failed"
    assert verdicts(decision)["exam_accuracy", "base"] == "failed"


def test_the_model_in_production_is_not_replaced_by_an_equal_one():
    learned = trained(LEARNED)
    assert verdicts(judge_exam(learned, learned))["exam_accuracy", "incumbent"] == "failed"
    # One fact more could be chance.
    one_more = trained([row // 2 if row < 122 else row // 2 + 1 for row in range(2 * FACTS)])
    assert verdicts(judge_exam(one_more, learned))["exam_accuracy", "incumbent"] == "failed"
    assert judge_exam(trained([row // 2 for row in range(2 * FACTS)]), learned).outcome == "passed"


def test_a_model_that_forgot_general_knowledge_is_refused():
    forgot = [*trained(LEARNED)[:-GENERAL], *["red"] * GENERAL]
    assert verdicts(judge_exam(forgot))["exam_control", "base"] == "failed"


def test_equal_answers_do_not_pass_a_bound_that_so_few_questions_cannot_show():
    """No model declined any of 40 questions: this shows a difference of at most 0.09, not of 0.05."""
    strict = EXAM_GATE.model_copy(deep=True)
    strict.sft.not_worse_than.base["exam_abstention"] = 0.05
    assert verdicts(judge_exam(trained(LEARNED)))["exam_abstention", "base"] == "passed"
    (rule,) = [r for r in judge_exam(trained(LEARNED), gate=strict).rules if r.measure == "exam_abstention"]
    assert (rule.value, rule.verdict) == (0.0, "failed")
    assert rule.low == pytest.approx(-0.0876, abs=1e-4)
