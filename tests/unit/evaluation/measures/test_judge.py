"""The judge on a scripted endpoint: hand-counted verdicts, both orders, and no request sent twice."""

import json
import re

import pytest
from pydantic import ValidationError

from llm_engineering.data.rows import InstructionRow, Message
from llm_engineering.errors import RequestError
from llm_engineering.evaluation.measures.judge import judge
from llm_engineering.evaluation.requirements import check_requirements
from llm_engineering.evaluation.statistics import Bootstrap
from llm_engineering.generation.clients.open import open_client
from llm_engineering.recipe.compute_blocks import ComputeConfig
from llm_engineering.recipe.evaluation_blocks import EvaluationConfig
from llm_engineering.recipe.generation_blocks import JudgeConfig
from llm_engineering.recipe.model_blocks import ModelConfig
from tests.fakes.scripted_endpoint import ScriptedEndpoint, completion

BOOTSTRAP = Bootstrap(500, 0.95, 3)
ROWS = [
    InstructionRow(
        prompt=[Message(role="user", content=f"Question {number}?")],
        completion=[Message(role="assistant", content=f"Reference {number}.")],
        source="s",
        origin="m",
    )
    for number in range(5)
]
ANSWERS = {
    "base": [f"bad {{{number}}}" for number in range(5)],
    "sft": [f"good {{{number}}}" for number in range(5)],
}


def script(asked):
    """Verdicts by row. 0: the good answer. 1: always A. 2: a tie. 3: A, then no verdict. 4: A, then no JSON."""
    text = asked.turns[0]
    number = int(re.search(r"Question (\d)\?", text)[1])
    good_is_first = text.index("good {") < text.index("bad {")
    second = {3: '{"verdict": "Both are nice."}', 4: "A, I think"}
    if not good_is_first and number in second:
        return completion(second[number])
    verdict = {0: "A" if good_is_first else " b.", 2: "TIE"}.get(number, "A")
    return completion(json.dumps({"verdict": verdict}))


def run_judge(endpoint, settings, answers, **keys):
    config = JudgeConfig(client="openai", model="m", base_url=f"{endpoint.url}/v1", **keys)
    client = open_client(config, ModelConfig(), ComputeConfig(), settings)
    return judge(ROWS, answers, "sft", client, config.max_new_tokens, BOOTSTRAP)


def test_every_verdict_counts(settings):
    with ScriptedEndpoint(script) as endpoint:
        found, measure = run_judge(endpoint, settings, ANSWERS)
        asked = len(endpoint.requests)
        # The second run takes every verdict from the store.
        assert run_judge(endpoint, settings, ANSWERS) == (found, measure)
        assert len(endpoint.requests) == asked
    # Two orders for each of five rows, and one repair of a reply that is not JSON.
    assert asked == 11
    assert all(request.body["temperature"] == 0 for request in endpoint.requests)
    # Requests are sent side by side, so any of them may arrive first.
    first = next(request.turns[0] for request in endpoint.requests if "Reference 0." in request.turns[0])
    assert "good {0}" in first
    duel = found["duels"]["sft-base"]
    assert duel["outcomes"] == [
        ("won", "won"),
        ("won", "lost"),
        ("tie", "tie"),
        ("won", "unparsable"),
        ("won", "unparsable"),
    ]
    assert duel["verdicts"] == {"won": 5, "tie": 2, "unparsable": 2, "lost": 1}
    assert duel["unparsable"] == {"no_verdict": 1, "bad_json": 1}
    assert duel["agreement"] == pytest.approx(2 / 5)
    assert duel["win_rate"]["value"] == pytest.approx((1 + 0.5 + 0.5 + 0.75 + 0.75) / 5)
    assert measure["models"]["sft"]["value"] == pytest.approx(0.7)
    assert measure["models"]["base"]["value"] == pytest.approx(0.3)
    net = measure["differences"]["sft-base"]
    assert net["value"] == pytest.approx(0.4)
    assert net["low"] < 0.4 < net["high"]
    assert len(found["prompt_hash"]) == 12


def test_a_judge_that_always_prefers_a_finds_no_winner(settings):
    with ScriptedEndpoint(lambda asked: completion("A")) as endpoint:
        found, measure = run_judge(endpoint, settings, ANSWERS, response_format="text")
    duel = found["duels"]["sft-base"]
    assert duel["agreement"] == 0
    assert measure["differences"]["sft-base"] == {"value": 0.0, "low": 0.0, "high": 0.0, "n": 5}
    # Five ties do not prove that the share is 0.5.
    assert measure["models"]["sft"] == duel["win_rate"]
    assert 0 < duel["win_rate"]["low"] < 0.4


def test_the_newest_model_is_compared_with_every_other(settings):
    answers = {**ANSWERS, "incumbent": [f"bad {{{number}}} too" for number in range(5)]}
    with ScriptedEndpoint(lambda asked: completion("A" if asked.turns[0].index("good") < asked.turns[0].index("bad") else "B")) as endpoint:  # fmt: skip
        found, measure = run_judge(endpoint, settings, answers, response_format="text")
    assert list(found["duels"]) == ["sft-base", "sft-incumbent"]
    assert {name: estimate["value"] for name, estimate in measure["models"].items()} == {
        "base": 0.0,
        "incumbent": 0.0,
        "sft": 1.0,
    }


def test_the_judge_is_checked_before_anything_runs(settings):
    with pytest.raises(ValidationError, match="temperature has no effect"):
        JudgeConfig(client="openai", model="m", temperature=0.5)
    wrong = JudgeConfig(client="openai", model="m", base_url="http://127.0.0.1:9/v1", max_retries=0)
    with pytest.raises(RequestError, match=r"evaluation\.judge \(read generation\.\* as evaluation\.judge\.\*\)"):
        check_requirements(EvaluationConfig(judge=wrong), settings)
