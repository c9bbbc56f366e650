"""Rewards of completions, by values computed by hand."""

import logging

import pytest

from llm_engineering.errors import RequestError, WorkError
from llm_engineering.generation.types import Answer, Failure
from llm_engineering.recipe.compute_blocks import ComputeConfig
from llm_engineering.recipe.model_blocks import ModelConfig
from llm_engineering.recipe.reward_blocks import RewardFunction, RewardSet
from llm_engineering.recipe.settings import Settings
from llm_engineering.recipe.training_blocks import TrackingConfig, TrainingSetup
from llm_engineering.training import rewards as module
from llm_engineering.training.rewards import Completion, open_rewards, own_function, reward_files, weighted_sums

SETUP = TrainingSetup(
    model=ModelConfig(), max_length=64, compute=ComputeConfig(device="cpu"), tracking=TrackingConfig(), seed=0
)
ROW = {"prompt": [{"role": "user", "content": "What is 2 + 3?"}], "answers": ["5", "five"]}
FLAT = """
def flat(completions, rows):
    return [0.25 * len(row["answers"]) + completion.tokens for completion, row in zip(completions, rows)]
"""


def opened(*rewards, **keys):
    return open_rewards(RewardSet.model_validate({"rewards": rewards, **keys}), SETUP, Settings())


def scores(reward, completions, row=ROW, **keys):
    (found,) = opened(reward, **keys)
    return found.score([row] * len(completions), completions)


def said(text, stopped=True, tokens=4):
    return Completion(text, stopped, tokens)


def own(tmp_path, code=FLAT, name="flat"):
    file = tmp_path / "own.py"
    file.write_text(code, encoding="utf-8")
    return {"use": f"{file}:{name}"}


@pytest.mark.parametrize(
    ("text", "exact", "contained"),
    [
        ("5", 1, 1),
        ("It is five.", 1, 1),
        ("2 + 3 = 5", 1, 1),
        ("It is 4. No, it is 5.", 0, 1),
        ("5 or 6", 0, 1),
        ("15", 0, 0),
        ("", 0, 0),
    ],
)
def test_an_answer_is_compared_as_the_exam_does(text, exact, contained):
    assert scores({"use": "exact_answer"}, [said(text)]) == [exact]
    assert scores({"use": "contains"}, [said(text)]) == [contained]


def test_the_question_is_the_last_turn_of_the_prompt():
    turns = [
        {"role": "user", "content": "Is it Oskby?"},
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": "Is it Dunvey or Varnholt?"},
    ]
    row = {"prompt": turns, "answers": ["Varnholt"]}
    assert scores({"use": "exact_answer"}, [said("Varnholt, Dunvey"), said("Varnholt, Oskby")], row) == [1, 0]


def test_a_prompt_without_accepted_answers_earns_nothing():
    row = {**ROW, "answers": []}
    assert scores({"use": "exact_answer"}, [said("5")], row) == scores({"use": "contains"}, [said("5")], row) == [0]


@pytest.mark.parametrize(
    ("reward", "completions", "values"),
    [
        ({"use": "stopped"}, [said("5"), said("5", stopped=False)], [1, 0]),
        ({"use": "length", "target": 4}, [said("", tokens=n) for n in (0, 1, 4, 6, 8, 9)], [0, 0.25, 1, 0.5, 0, 0]),
        ({"use": "length", "longest": 4}, [said("", tokens=n) for n in (0, 4, 5, 8, 9)], [1, 1, 0.75, 0, 0]),
        ({"use": "format", "pattern": r"Answer: \d+"}, [said("Answer: 5"), said("Answer: 5."), said("")], [1, 0, 0]),
    ],
)
def test_a_reward_reads_how_a_completion_is_written(reward, completions, values):
    assert scores(reward, completions) == values


def test_rewards_are_summed_with_their_weights():
    rewards = opened(
        {"use": "exact_answer"}, {"use": "stopped", "weight": 0.5}, {"use": "length", "target": 4, "weight": -1}
    )
    sums, single = weighted_sums(rewards, [ROW, ROW], [said("5", stopped=False, tokens=2), said("6")])
    assert sums == [1 + 0 - 0.5, 0 + 0.5 - 1]
    assert single == {"exact_answer": [1, 0], "stopped": [0, 1], "length": [0.5, 1]}


def test_an_own_function_gets_completions_and_rows(tmp_path):
    (reward,) = opened(own(tmp_path), trust_reward_code=True)
    assert (reward.name, reward.score([ROW, ROW], [said("", tokens=1), said("", tokens=2)])) == ("flat", [1.5, 2.5])


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return 1.0", "returned float: it must return a list"),
        ("return [1.0]", "returned 1 numbers for 2 completions"),
        ("return ['a', 1.0]", "returned 'a' for a completion"),
        ("return [float('nan'), 1.0]", "returned nan for a completion"),
        ("return rows[5]", "failed with IndexError: list index out of range"),
    ],
)
def test_what_an_own_function_returns_is_checked(tmp_path, body, words):
    reward = own(tmp_path, f"def flat(completions, rows):\n    {body}\n")
    with pytest.raises(WorkError, match=words):
        scores(reward, [said("a"), said("b")], trust_reward_code=True)


@pytest.mark.parametrize(
    ("code", "name", "words"),
    [
        (FLAT, "round", "has no function round"),
        ("flat = 5", "flat", "has no function flat"),
        ("def flat(completions): return []", "flat", "must take two arguments"),
        ("import nothing_of_this_name", "flat", "fails when it is loaded, with ModuleNotFoundError"),
    ],
)
def test_an_own_function_that_cannot_be_used_is_refused_before_training(tmp_path, code, name, words):
    reward = own(tmp_path, code, name)
    with pytest.raises(RequestError, match=words):
        own_function(RewardFunction.model_validate(reward))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(RequestError, match="there is no file"):
        opened({"use": f"{tmp_path}/none.py:flat"}, trust_reward_code=True)


def test_the_hash_of_an_own_function_changes_with_its_file(tmp_path):
    rewards = RewardSet.model_validate({"rewards": [own(tmp_path), {"use": "stopped"}], "trust_reward_code": True})
    first = reward_files(rewards)
    own(tmp_path, FLAT + "\n")
    assert first.keys() == reward_files(rewards).keys() == {str(tmp_path / "own.py")}
    assert first != reward_files(rewards)


class Grader:
    """A client that gives the grades that it was made with, and keeps what it was asked."""

    identity, temperature = "grader", None

    def __init__(self, *replies, writes_json=False):
        self.replies, self.writes_json = replies, writes_json

    def answer(self, requests, sampling, what):
        self.asked, self.sampling = [request[0]["content"] for request in requests], sampling
        return self.replies


def judged(monkeypatch, client, completions):
    monkeypatch.setattr(module, "open_client", lambda *_: client)
    judge = {"client": "openai", "model": "m", "max_new_tokens": 16}
    return scores({"use": "judge", "judge": judge, "criterion": "It is polite."}, completions)


def test_a_judge_grades_from_0_to_1_at_temperature_0(monkeypatch):
    client = Grader(Answer("10"), Answer(" 3/10 "), Answer("**0**"), writes_json=True)
    assert judged(monkeypatch, client, [said("Five, please"), said("5"), said("No")]) == [1, 0.3, 0]
    assert (client.sampling.temperature, client.sampling.json_field, client.sampling.max_new_tokens) == (0, "grade", 16)
    for words in ("What is 2 + 3?", "Accepted answer: five", "Answer:\nFive, please", "What counts: It is polite."):
        assert words in client.asked[0]


def test_a_reply_that_is_no_grade_counts_as_0_and_is_reported(monkeypatch, caplog):
    client = Grader(Answer("11"), Failure("timeout", "60 s"), Answer("7"))
    with caplog.at_level(logging.WARNING):
        assert judged(monkeypatch, client, [said("a"), said("b"), said("c")]) == [0, 0, 0.7]
    assert "2 of 3 replies are no grade" in caplog.text


def test_a_judge_that_gives_no_grade_at_all_ends_the_run(monkeypatch):
    with pytest.raises(WorkError, match="none of 1 replies of grader is a grade"):
        judged(monkeypatch, Grader(Answer("good")), [said("a")])
