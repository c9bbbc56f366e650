"""Held-out measures against hand-computed values."""

import json
import shutil

import pytest
import torch
from datasets import Dataset

from llm_engineering.data.rows import Message
from llm_engineering.data.storage import rows_dataset
from llm_engineering.evaluation.heldout import held_out
from llm_engineering.evaluation.measures.observation import (
    heldout_loss,
    preference_accuracy,
    preference_margin,
    question_gain,
    with_other_questions,
)
from llm_engineering.evaluation.models import AnswerScore, Models
from llm_engineering.formatting.render import prompt_ids
from llm_engineering.models.base_model import load_model
from llm_engineering.models.device import choose_device
from llm_engineering.models.generate import generate_ids
from llm_engineering.models.tokenizer import load_tokenizer
from llm_engineering.recipe.evaluation_blocks import EvaluationConfig
from llm_engineering.recipe.model_blocks import LoraConfig, ModelConfig
from llm_engineering.training.policy import new_policy, save_policy
from tests.tiny_models import pair


@pytest.fixture
def model(tiny_model):
    return ModelConfig(name_or_path=str(tiny_model), revision="test")


def test_batched_scores_equal_scores_row_by_row(model, cpu, settings):
    device = choose_device(cpu)
    base = load_model(model, settings, device)
    models = Models(base, {}, load_tokenizer(model, settings), batch_size=2)
    rows = [
        ([5, 6, 7, 8, 9, 2], [-100, -100, 7, 8, -100, 2]),
        ([11, 12, 2], [-100, -100, 2]),
        ([20, 21, 22, 23, 2], [-100, 21, 22, 23, 2]),
    ]
    for score, (ids, labels) in zip(models.scores("base", rows, "loss"), rows, strict=True):
        log_probs = torch.log_softmax(base(input_ids=torch.tensor([ids])).logits[0].double(), dim=-1)
        expected = [float(log_probs[i - 1, label]) for i, label in enumerate(labels) if label != -100]
        assert score.tokens == len(expected)
        assert score.log_prob == pytest.approx(sum(expected), abs=1e-4)


def test_answers_and_other_questions_stay_in_the_context_of_a_short_model(base_model, cpu, settings, caplog):
    own = ModelConfig(name_or_path=str(base_model))
    base = load_model(own, settings, choose_device(cpu))
    models = Models(base, {}, load_tokenizer(own, settings, "alpaca"), batch_size=4)
    context = base.config.n_positions
    overhead = len(prompt_ids([Message(role="user", content="")], models.tokenizer))
    sizes = (context - overhead - 5, 10, context)
    prompts = [[Message(role="user", content="#" * size)] for size in sizes]
    lengths = [len(prompt_ids(prompt, models.tokenizer)) for prompt in prompts]
    assert lengths[0] < context <= lengths[2]
    with caplog.at_level("WARNING"):
        answers = models.answers("base", prompts, 20)
    assert len(answers[0].ids) <= context - lengths[0]
    assert answers[1].ids
    assert answers[2] == ("", False, [])
    assert "1 prompts fill the context of 512 tokens" in caplog.text

    rows = [([5] * 500 + [7, 8], [-100] * 500 + [7, 8]), ([6, 7] * 200, [-100] + [7] * 399), ([9, 7], [-100, 7])]
    combined = with_other_questions(rows, context)
    assert {len(ids) <= context and len(ids) == len(labels) for rows in combined for ids, labels in rows} == {True}
    assert models.scores("base", combined[0], "loss")[1].tokens == 399


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own_llama"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_a_full_model_with_its_own_code_is_measured(tiny_model, cpu, settings, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = shutil.copytree(tiny_model, tmp_path / "own")
    (folder / "modeling_own.py").write_text(CODE)
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config |= {"model_type": "own_llama", "architectures": ["OwnForCausalLM"], "auto_map": classes}
    (folder / "config.json").write_text(json.dumps(config))
    own = ModelConfig(name_or_path=str(folder), trust_remote_code=True)
    device = choose_device(cpu)
    policy = new_policy(own, LoraConfig(), settings, device, "full")
    policy.lm_head.weight.data.mul_(3)
    save_policy(policy, own, tmp_path / "full")

    tokenizer = load_tokenizer(own, settings)
    models = Models(load_model(own, settings, device), {"sft": tmp_path / "full"}, tokenizer, batch_size=2)
    rows = [([5, 6, 7, 8, 2], [-100, -100, 7, 8, 2])]
    with torch.inference_mode():
        log_probs = policy(torch.tensor([rows[0][0]])).logits[0].double().log_softmax(dim=-1)
    expected = sum(float(log_probs[i - 1, token]) for i, token in enumerate(rows[0][0]) if i > 1)
    assert models.scores("sft", rows, "loss")[0].log_prob == pytest.approx(expected, abs=1e-4)


def test_question_gain_equals_its_formula_row_by_row(model, cpu, settings):
    base = load_model(model, settings, choose_device(cpu))
    models = Models(base, {}, load_tokenizer(model, settings), batch_size=2)
    rows = [
        ([5, 6, 7, 8, 2], [-100, -100, 7, 8, 2]),
        ([11, 12, 13, 2], [-100, 12, 13, 2]),
        ([20, 21, 22, 23, 24, 2], [-100, -100, -100, 23, -100, 2]),
        ([30, 31, 2], [-100, 31, 2]),
    ]

    def log_prob(question, answer, labels):
        log_probs = torch.log_softmax(base(input_ids=torch.tensor([question + answer])).logits[0].double(), dim=-1)
        places = [len(question) + i for i, label in enumerate(labels) if label != -100]
        return sum(float(log_probs[place - 1, (question + answer)[place]]) for place in places)

    borders = [2, 1, 3, 1]
    total = 0.0
    for index, ((ids, labels), border) in enumerate(zip(rows, borders, strict=True)):
        after = [log_prob(rows[other][0][: borders[other]], ids[border:], labels[border:]) for other in range(4)]
        total += after[index] - sum(after[other] for other in range(4) if other != index) / 3
    scores = models.scores("base", rows, "own")
    found = question_gain(scores, [models.scores("base", moved, "others") for moved in with_other_questions(rows)])
    assert found.value == pytest.approx(total / (3 + 3 + 2 + 2), abs=1e-4)
    assert with_other_questions(rows[:1]) == []


def test_each_adapter_has_its_own_scores(model, cpu, settings, tmp_path):
    device = choose_device(cpu)
    for name, size in (("sft", 0.5), ("dpo", 1.0)):
        policy = new_policy(model, LoraConfig(r=2), settings, device)
        for key, parameter in policy.named_parameters():
            if "lora_B" in key:
                torch.nn.init.constant_(parameter, size)
        save_policy(policy, model, tmp_path / name)
    adapters = {"sft": tmp_path / "sft", "dpo": tmp_path / "dpo"}
    models = Models(load_model(model, settings, device), adapters, load_tokenizer(model, settings), batch_size=1)
    rows = [([5, 6, 7, 2], [-100, 6, 7, 2])]
    alone = Models(load_model(model, settings, device), {}, load_tokenizer(model, settings), batch_size=1)
    scores = {name: models.scores(name, rows, "loss")[0].log_prob for name in ("dpo", "base", "sft")}
    assert scores["base"] == pytest.approx(alone.scores("base", rows, "loss")[0].log_prob, abs=1e-6)
    assert len({round(score, 4) for score in scores.values()}) == 3


def test_repetition_penalty_follows_its_formula(model, cpu, settings):
    """Positive logits of tokens that occurred before are divided by the penalty, negative ones are multiplied by it."""
    tokenizer = load_tokenizer(model, settings)
    base = load_model(model, settings, choose_device(cpu))
    prompt = [Message(role="user", content="Is it this?")]
    penalised = Models(base, {}, tokenizer, 1, repetition_penalty=1.5).answer("base", prompt, 8).ids
    ids = prompt_ids(prompt, tokenizer)
    expected = []
    with torch.inference_mode():
        while len(expected) < 8 and tokenizer.eos_token_id not in expected:
            logits = base(input_ids=torch.tensor([ids + expected])).logits[0, -1].float()
            there = sorted({*ids, *expected})
            logits[there] = torch.where(logits[there] > 0, logits[there] / 1.5, logits[there] * 1.5)
            expected.append(int(logits.argmax()))
    assert penalised == expected
    assert Models(base, {}, tokenizer, 1).answer("base", prompt, 8).ids != expected


def test_batched_answers_equal_answers_one_by_one(base_model, cpu, settings):
    config = ModelConfig(name_or_path=str(base_model), revision="test")
    # The pad token is also the end token, so only the position distinguishes padding from an end.
    tokenizer = load_tokenizer(config, settings, "chatml")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    model = load_model(config, settings, choose_device(cpu))
    torch.manual_seed(0)
    for parameter in model.parameters():
        # Weights so large that the answers depend on the questions.
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    models = Models(model, {}, tokenizer, batch_size=3)
    texts = ["Hi", "What is the sum of these numbers, please?", "Is it this?", "x" * 90, "It is", "7", "numbers " * 12]
    prompts = [[Message(role="user", content=text)] for text in texts]
    free = [models.answer("base", prompt, 16) for prompt in prompts]
    assert not any(sample.stopped for sample in free)
    assert all(len(sample.ids) == 16 for sample in free)
    # A further end token that occurs in some answers and not in others.
    end, place = next(
        (token, place)
        for place, sample in enumerate(free)
        for token in sample.ids[3:]
        if any(token not in other.ids for other in free)
    )
    model.generation_config.eos_token_id = end
    alone = [models.answer("base", prompt, 16) for prompt in prompts]
    assert models.answers("base", prompts, 16, "answers") == alone
    assert alone[place].ids == free[place].ids[: free[place].ids.index(end) + 1]
    assert {sample.stopped for sample in alone} == {True, False}
    assert len({tuple(sample.ids) for sample in alone}) > 3


def test_measures_by_hand():
    chosen = [AnswerScore(-2.0, 2), AnswerScore(-9.0, 3), AnswerScore(-4.0, 4)]
    rejected = [AnswerScore(-1.0, 1), AnswerScore(-8.0, 2), AnswerScore(-8.0, 4)]
    assert heldout_loss(chosen).value == pytest.approx(15 / 9)
    # Mean log-probabilities: -1 and -1 (a tie is no win), -3 and -4, -1 and -2.
    assert preference_accuracy(chosen, rejected).value == pytest.approx(2 / 3)
    assert preference_margin(chosen, rejected).value == pytest.approx(2 / 3)


def test_only_the_answers_of_pairs_are_labelled():
    formatted = {"id": pair(0).id, "truncated": False, "prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [5]}
    rows = held_out(
        {"preference": Dataset.from_list([formatted])}, {"preference": rows_dataset([pair(0)], "preference")}
    )
    assert rows.pairs[0].answers == [([1, 2, 3, 4], [-100, -100, 3, 4]), ([1, 2, 5], [-100, -100, 5])]


def test_stored_answers_are_those_of_the_same_model_batch_and_length(model, cpu, settings, monkeypatch):
    tokenizer = load_tokenizer(model, settings)
    config = EvaluationConfig(batch_size=2)
    prompts = [[Message(role="user", content=text)] for text in ("one", "two", "three")]

    def answers(length=6, asked=prompts, of=model):
        return Models.load(of, {}, tokenizer, config, cpu, settings).answers("base", asked, length)

    first = answers()
    generated = []
    monkeypatch.setattr(
        "llm_engineering.evaluation.models.generate_ids",
        lambda model, tokenizer, batch, *rest, **options: generated.append(len(batch)) or [[5]] * len(batch),
    )
    assert answers() == first
    assert generated == []
    answers(length=5)
    answers(asked=prompts[:1])
    answers(of=model.model_copy(update={"revision": "another"}))
    assert generated == [2, 1, 1, 2, 1]


def test_an_evaluation_that_was_killed_generates_only_the_missing_batches(model, cpu, settings, monkeypatch):
    tokenizer = load_tokenizer(model, settings)
    config = EvaluationConfig(batch_size=1)
    prompts = [[Message(role="user", content=text)] for text in ("one", "two", "three")]
    expected = Models.load(model, {}, tokenizer, config, cpu, settings).answers("base", prompts, 6)
    path = settings.llm_output_dir / "evaluation_answers.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:1]) + lines[1][:10])
    calls = []
    monkeypatch.setattr(
        "llm_engineering.evaluation.models.generate_ids",
        lambda *args, **options: calls.append(1) or generate_ids(*args, **options),
    )
    assert Models.load(model, {}, tokenizer, config, cpu, settings).answers("base", prompts, 6) == expected
    assert len(calls) == 2
