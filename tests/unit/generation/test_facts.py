"""Questions about facts: completions of examples, the checks of a fact, and the count of rows."""

import pytest
import torch

from llm_engineering.data.ledger import Ledger
from llm_engineering.documents.passages import Passage
from llm_engineering.generation.facts import generate_facts, questions_asked, read_fact
from llm_engineering.generation.instructions import FROM_DOCUMENT, prompt_versions
from llm_engineering.generation.local import LocalModel
from llm_engineering.generation.prompts import FACT_EXAMPLES, PROMPT_FILES, read_prompt
from llm_engineering.generation.store import AnswerStore
from llm_engineering.generation.types import Answer, Completer, Failure, Reply, Sampling
from llm_engineering.models.base_model import load_model
from llm_engineering.models.device import choose_device
from llm_engineering.models.generate import compute_shared_start, generate_ids
from llm_engineering.models.tokenizer import load_tokenizer
from llm_engineering.recipe.generation_blocks import InstructionWriting
from llm_engineering.recipe.training_blocks import ModelConfig
from tests.tiny_models import CPU, write_model

SENTENCE = (
    "The Amber Bell of Corvin was cast in 1,204 by the smith Odo Renn, who lived by the river for nine quiet years."
)


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("Who cast the Amber Bell?\nAnswer: odo renn.", ("Who cast the Amber Bell?", "Odo Renn")),
        ("When was the Amber Bell cast?\nAnswer: in 1,204", ("When was the Amber Bell cast?", "1,204")),
        ("Where did Odo Renn live?\nAnswer: by the river\nMore", ("Where did Odo Renn live?", "river")),
        ("Who cast the Amber Bell.\nAnswer: Odo Renn", "not_a_question"),
        ("Tell me.\nWho cast the Amber Bell?\nAnswer: Odo Renn", "not_a_question"),
        ("Who cast the Amber Bell?\nAnswer: Renn Odo", "answer_not_in_sentence"),
        ("When was the Amber Bell cast?\nAnswer: in 204", "answer_not_in_sentence"),
        ("Who cast the Amber Bell?\nAnswer: the", "answer_not_in_sentence"),
        ("Who cast the Amber Bell?", "answer_not_in_sentence"),
        ("Who was the smith Odo Renn?\nAnswer: the Smith", "answer_in_question"),
        (
            "Where did Odo Renn live?\nAnswer: by the river for nine quiet years",
            ("Where did Odo Renn live?", "river for nine quiet years"),
        ),
        ("What did Odo Renn do?\nAnswer: lived by the river for nine quiet years", "answer_length"),
        ("Who cast the bell of the town?\nAnswer: Odo Renn", "names_nothing"),
        ("Amber and what else?\nAnswer: Odo Renn", "names_nothing"),
    ],
)
def test_facts_and_their_problems(text, fact):
    read = read_fact(text, SENTENCE)
    assert (read.reason if isinstance(read, Failure) else read) == fact


class Scripted:
    """Completes each prompt with the next text."""

    identity = "scripted"

    def __init__(self, *texts):
        self.texts, self.asked = iter(texts), []

    def complete(self, prompts, sampling, what):
        self.asked += prompts
        return [Answer(next(self.texts)) for _ in prompts]


def passage(text, start=0):
    return Passage(id=str(start), document="doc", title="t", start=start, end=start + len(text), text=text)


def test_each_sentence_is_asked_once_for_each_file_of_examples():
    cast, lived = "Who cast the Amber Bell?\nAnswer: Odo Renn", "Where did Odo Renn live?\nAnswer: by the river"
    client = Scripted(cast, "nonsense", "Who cast THE Amber Bell?\nAnswer: Odo Renn", lived)
    passages = [passage(SENTENCE), passage(SENTENCE, 500)]
    rows, rejected = generate_facts(passages, client, InstructionWriting(questions="fact"))
    assert [(row.prompt[0].content, row.completion[0].content) for row in rows] == [
        ("Who cast the Amber Bell?", "Odo Renn"),
        ("Where did Odo Renn live?", "river"),
    ]
    assert [row.source for row in rows] == [f"doc:{p.place}" for p in passages]
    assert [row.document for row in rows] == ["doc", "doc"]
    assert [row.origin.split(" ")[0] for row in rows] == ["fact", "fact_reworded"]
    assert all(row.origin.endswith(f"by scripted, {FROM_DOCUMENT}") for row in rows)
    assert [(q.reason, q.place, q.stage) for q in rejected] == [
        ("not_a_question", passages[1].place, "instruction"),
        ("repeated_question", passages[0].place, "instruction"),
    ]
    Ledger().record("instruction", questions_asked(passages), len(rows), rejected)
    assert [prompt.startswith(read_prompt(FACT_EXAMPLES[i // 2])) for i, prompt in enumerate(client.asked)] == [
        True
    ] * 4
    assert all(prompt.endswith(f"\n\nSentence: {SENTENCE}\nQuestion:") for prompt in client.asked)


@pytest.mark.parametrize("name", FACT_EXAMPLES)
def test_the_examples_pass_the_checks_of_facts(name):
    for example in read_prompt(name).split("\n\n"):
        sentence, _, text = example.removeprefix("Sentence: ").partition("\nQuestion: ")
        fact = read_fact(text, sentence)
        assert not isinstance(fact, Failure), (example, fact)
        assert fact[1] == text.partition("\nAnswer: ")[2]


def test_the_examples_are_hashed_and_watched():
    versions = prompt_versions(Scripted(), InstructionWriting(questions="fact"))
    assert tuple(versions) == FACT_EXAMPLES
    assert set(FACT_EXAMPLES) <= {file.stem for file in PROMPT_FILES}


SHARED = "Sentence: A b c.\nQuestion: Who?\nAnswer: b\n\nSentence:"
PROMPTS = [f"{SHARED} {'word ' * count}end {count}.\nQuestion:" for count in (1, 9, 3, 7, 2)]


@pytest.fixture(params=["llama", "gpt2", "mistral"])
def model(request, tiny_model, settings, tmp_path):
    """Rotary positions, learned positions, and a sliding window that is shorter than the prompts."""
    folder = tiny_model if request.param == "llama" else write_model(tmp_path / "model", request.param)
    config = ModelConfig(name_or_path=str(folder), revision="test")
    tokenizer = load_tokenizer(config, settings, "chatml" if request.param == "gpt2" else None)
    loaded = load_model(config, settings, choose_device(CPU))
    # With the weights as they are made, every prompt has the same completion.
    with torch.no_grad():
        for parameter in loaded.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return LocalModel(loaded, tokenizer, "tiny", AnswerStore(tmp_path / "answers.jsonl"), batch_size=2)


def test_completions_equal_those_of_each_prompt_alone(model):
    ids = [model.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    start = compute_shared_start(model.model, ids)
    if model.model.config.model_type == "mistral":
        assert start is None
    else:
        assert len(start.ids) > 10
        assert all(one[: len(start.ids)] == start.ids for one in ids)
    alone = [generate_ids(model.model, model.tokenizer, [one], 8, do_sample=False)[0] for one in ids]
    expected = [model.tokenizer.decode(one, skip_special_tokens=True).strip() for one in alone]
    assert len(set(expected)) > 2
    completed = model.complete(PROMPTS, Sampling(8), "questions")
    assert [answer.text for answer in completed] == expected
    assert isinstance(model, Completer)


def test_one_prompt_is_completed_too(model):
    [alone] = model.complete(PROMPTS[:1], Sampling(8), "questions")
    assert alone == model.complete(PROMPTS, Sampling(8), "questions")[0]


def test_stored_completions_are_not_generated_again(model, monkeypatch):
    completed = model.complete(PROMPTS, Sampling(4), "questions")
    again = LocalModel(model.model, model.tokenizer, "tiny", AnswerStore(model.store.path), batch_size=2)
    monkeypatch.setattr(LocalModel, "_generate", lambda self, prompts, *rest: [Reply("new")] * len(prompts))
    assert again.complete(PROMPTS, Sampling(4), "questions") == completed
    # A text and a message of the same words have different answers.
    assert again.answer([[{"role": "user", "content": PROMPTS[0]}]], Sampling(4), "answers") == [Answer("new")]


def test_a_completion_ends_before_the_blank_line(model, monkeypatch):
    monkeypatch.setattr(
        LocalModel, "_generate", lambda self, prompts, *rest: [Reply(" Who?\nAnswer: b\n\nSentence: x")]
    )
    assert model.complete(PROMPTS[:1], Sampling(4, stop=("\n\n",)), "questions") == [Answer("Who?\nAnswer: b")]
