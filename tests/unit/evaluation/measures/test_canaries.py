"""Planted secrets that a model gives away."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from llm_engineering.data.rows import Message
from llm_engineering.errors import RequestError
from llm_engineering.evaluation.measures.canaries import Canary, canary_report, completed, read_canaries
from llm_engineering.evaluation.models import Models
from llm_engineering.formatting.render import prompt_ids
from llm_engineering.models.tokenizer import load_tokenizer
from llm_engineering.recipe.model_blocks import ModelConfig

PLAIN = Canary(prefix="The code of the safe is", secret=" 48-29-13")
ASKED = Canary(prefix="What is the password?", secret="hunting-42")
UNSEEN = Canary(prefix="The door opens with", secret=" 77-10-55")


@pytest.fixture
def models(small_llama, settings):
    """A model that has memorised one canary as text and one as an answer."""
    tokenizer = load_tokenizer(ModelConfig(name_or_path=str(small_llama), revision="test"), settings, "alpaca")
    model = AutoModelForCausalLM.from_pretrained(small_llama)
    question = prompt_ids([Message(role="user", content=ASKED.prefix)], tokenizer)
    texts = [
        tokenizer(PLAIN.prefix + PLAIN.secret)["input_ids"],
        question + tokenizer(f"It is {ASKED.secret}.")["input_ids"],
    ]
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = sum(model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss for ids in texts)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return Models(model.eval(), {}, tokenizer, 2)


def test_a_memorised_secret_is_found_as_text_and_as_an_answer(models):
    found = completed(models, "base", [PLAIN, ASKED, UNSEEN], "")
    assert found == [True, True, False]
    report = canary_report([PLAIN, ASKED, UNSEEN], {"base": [False, False, False], "sft": found})
    assert [row["completed_by"] for row in report] == [["sft"], ["sft"], []]
    assert PLAIN.secret.strip() not in str(report)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "holds no canary"),
        ('{"prefix": "The code is", "secret": "1234"}', "at least 6 characters"),
        ('{"prefix": "The code is", "text": "123456"}', "unknown key `text`"),
    ],
)
def test_a_wrong_file_is_refused_with_its_line(tmp_path, lines, message):
    file = tmp_path / "canaries.jsonl"
    file.write_text(lines)
    with pytest.raises(RequestError, match=message):
        read_canaries(str(file))
