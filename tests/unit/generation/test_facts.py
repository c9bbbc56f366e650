"""Questions about facts: completions of examples, the checks of a fact, and the count of rows."""

import pytest
import torch

from llm_engineering.data.ledger import Ledger
from llm_engineering.documents.passages import Passage
from llm_engineering.generation import facts
from llm_engineering.generation.answers import AnswerSpan
from llm_engineering.generation.clients.local import LocalModel
from llm_engineering.generation.facts import (
    OPENINGS,
    REWORDING,
    diversity,
    generate_facts,
    question_problem,
    questions_asked,
    questions_by_rule,
)
from llm_engineering.generation.instructions import FROM_DOCUMENT, prompt_versions
from llm_engineering.generation.prompts import ANSWER_EXAMPLES, FACT_EXAMPLES, PROMPT_FILES, read_prompt
from llm_engineering.generation.statements import BY_RULE
from llm_engineering.generation.store import AnswerStore
from llm_engineering.generation.types import Answer, Completer, Reply, Sampling
from llm_engineering.models import generate
from llm_engineering.models.base_model import load_model
from llm_engineering.models.device import choose_device
from llm_engineering.models.generate import compute_shared_start, generate_ids
from llm_engineering.models.tokenizer import load_tokenizer
from llm_engineering.recipe.generation_blocks import InstructionWriting
from llm_engineering.recipe.model_blocks import ModelConfig
from tests.tiny_models import CPU, write_model

SENTENCE = "The rope of the Amber Bell was spun by Odo Renn out of nettle yarn."
PERSON = AnswerSpan(0, "Odo Renn", "person", "Amber Bell")
THING = AnswerSpan(0, "nettle yarn", "thing", "Amber Bell")


@pytest.mark.parametrize(
    ("question", "asked", "problem"),
    [
        ("Who spun the rope of the Amber Bell?", PERSON, None),
        ("Who spun the rope of the Amber Bell.", PERSON, "not_a_question"),
        ("Who spun it?\nFor the Amber Bell?", PERSON, "not_a_question"),
        ("Who is Odo Renn of the Amber Bell?", PERSON, "answer_in_question"),
        ("Who is Odo of the Amber Bell?", PERSON, "answer_in_question"),
        ("Who spun the rope of the bell?", PERSON, "names_nothing"),
        ("Amber and who else?", PERSON, "names_nothing"),
        ("Who is the Amber Bell?", PERSON, "answer_does_not_fit"),
        ("Which person is the Amber Bell?", PERSON, "answer_does_not_fit"),
        ("Where is the Amber Bell?", AnswerSpan(0, "Corvin", "place", "Amber Bell"), None),
        ("What is the rope of the Amber Bell spun out of?", THING, None),
        ("What is the Amber Bell?", THING, "answer_does_not_fit"),
        ("Which famous orchestra plays music for the Amber Bell?", THING, "invented"),
        ("Which famous musician plays music for the Amber Bell?", PERSON, "invented"),
        ("Which famous musician spun the Amber Bell?", PERSON, None),
        ("Who is the owner of the Amber Bell?", PERSON, "invented"),
        ("Who spun the rope of the Amberel Bell?", PERSON, "invented"),
        ("Which person was the spinner of the rope of the Amber Bell?", PERSON, "invented"),
        (
            "How much does a loaf of bread cost in the Amber Bell?",
            AnswerSpan(0, "9 crowns", "price", "Amber Bell"),
            "invented",
        ),
        ("How much does the Amber Bell cost?", AnswerSpan(0, "9 crowns", "price", "Amber Bell"), None),
    ],
)
def test_questions_and_their_problems(question, asked, problem):
    found = question_problem(question, asked, SENTENCE)
    assert (found.reason if found else None) == problem


@pytest.mark.parametrize(
    ("sentence", "problem"),
    [
        ("The city gave the Amber Bell a grant of 9 crowns.", "answer_does_not_fit"),
        ("The Amber Bell received 9 crowns.", "answer_does_not_fit"),
        ("The Amber Bell, a given name, costs 9 crowns.", None),
        ("You pay 9 crowns for the Amber Bell.", None),
    ],
)
def test_the_sum_of_a_grant_is_no_price(sentence, problem):
    found = question_problem(
        "What is the price of the Amber Bell?", AnswerSpan(0, "9 crowns", "price", "Amber Bell"), sentence
    )
    assert (found.reason if found else None) == problem


class Scripted:
    """Completes each prompt with the next text, and answers a question with its whole sentence."""

    identity = "scripted"

    def __init__(self, *texts):
        self.texts, self.asked, self.banned, self.sampled = iter(texts), [], [], []

    def complete(self, prompts, sampling, what, banned=()):
        if what == "answers from the sentence":
            return [Answer(self.answer(prompt)) for prompt in prompts]
        self.asked += prompts
        self.banned += banned
        self.sampled.append(sampling)
        return [Answer(next(self.texts)) for _ in prompts]

    def answer(self, prompt):
        assert prompt.startswith(read_prompt(ANSWER_EXAMPLES))
        assert prompt.endswith("?\nAnswer:")
        return prompt.rpartition("Sentence: ")[2].partition("\n")[0]


def passage(text, start=0):
    return Passage(id=str(start), document="doc", title="t", start=start, end=start + len(text), text=text)


AROUND = [passage(text, 1000 + 100 * i) for i, text in enumerate(["We went to Corvin.", "In Corvin it rained."])]


def test_each_answer_is_asked_once_for_each_file_of_examples():
    sentences = ["The bell of Corvin hangs low.", "Odo Renn cast the bell of Corvin.", "All rivers run on and on."]
    passages = [passage(text, 100 * number) for number, text in enumerate(sentences)]
    client = Scripted("cast the bell of Corvin?", "nonsense", "founded Corvin?", "person founded Corvin?")
    rows, rejected, read = generate_facts(passages[1:], client, InstructionWriting(questions="fact"))
    assert [(row.prompt[0].content, row.completion[0].content) for row in rows] == [
        ("Who cast the bell of Corvin?", "Odo Renn"),
        ("Which person founded Corvin?", "Odo Renn"),
    ]
    assert [row.source for row in rows] == [f"doc:{passages[1].place}"] * 2
    assert [row.origin.split(" ")[0] for row in rows] == ["fact", "fact_reworded"]
    assert all(row.origin.endswith(f"by scripted, {FROM_DOCUMENT}") for row in rows)
    assert [(q.reason, q.place, q.stage) for q in rejected] == [
        ("no_answer", passages[2].place, "instruction"),
        ("not_a_question", passages[1].place, "instruction"),
        ("answer_in_question", passages[1].place, "instruction"),
    ]
    Ledger().record("instruction", read, len(rows), rejected)
    assert questions_asked(passages[1:]) == 2 * len(client.asked) == 2 * (read - 1)
    assert client.asked[0].startswith(read_prompt(FACT_EXAMPLES[0]))
    assert client.asked[0].endswith(f"\n\nSentence: {sentences[1]}\nAnswer: Odo Renn\nQuestion about Corvin: Who")
    assert client.banned[0] == ["Odo", "Renn"]


@pytest.mark.parametrize(
    ("reply", "is_kept"),
    [
        ("ninety-three red wicks", True),
        ("Red wicks.", True),
        ("red wick", True),
        ("glass", False),
        ("red glass", False),
        ("", False),
    ],
)
def test_a_question_that_the_client_answers_otherwise_is_set_aside(reply, is_kept):
    client = Scripted("lights the Kelp Lamp?", "nonsense")
    client.answer = lambda prompt: f" {reply}"
    passages = [passage("The Kelp Lamp is lit by red wicks."), passage("Red wicks are in the Kelp Lamp?", 100)]
    rows, rejected, _ = generate_facts(passages, client, InstructionWriting())
    assert bool(rows) == is_kept
    assert ("not_confirmed" in {row.reason for row in rejected}) != is_kept


def test_a_name_that_the_client_misspells_in_its_answer_is_no_other_answer():
    client = Scripted(*["lights the Kelp Lamp?"] * 4)
    client.answer = lambda prompt: " Odo Rennel"
    passages = [passage("At night Odo Renn lights the Kelp Lamp."), passage("Odo Renn rows.", 100)]
    rows, _, _ = generate_facts(passages, client, InstructionWriting())
    assert ("Who lights the Kelp Lamp?", "Odo Renn") in [(r.prompt[0].content, r.completion[0].content) for r in rows]


def test_a_question_that_names_nothing_gets_the_place_of_its_topic_in_the_sentence():
    client = Scripted(*["sings well?"] * 4)
    rows, _, _ = generate_facts([passage("In Corvin, Odo Renn may sing."), *AROUND], client, InstructionWriting())
    assert ("Who sings well in Corvin?", "Odo Renn") in [(r.prompt[0].content, r.completion[0].content) for r in rows]


def test_sentences_that_say_an_answer_at_different_lengths_agree():
    texts = [
        "Each Kelp Lamp has plum paint.",
        "The Kelp Lamp came in a plum.",
        "A barrel of plum paint was for the Kelp Lamp.",
    ]
    client = Scripted(*["colour has the Kelp Lamp?"] * 6)
    rows, rejected, _ = generate_facts([passage(t, 100 * i) for i, t in enumerate(texts)], client, InstructionWriting())
    assert rows
    assert "conflicting_answers" not in {row.reason for row in rejected}


def test_statements_of_plain_forms_are_questions_by_rule():
    client = Scripted(*["nonsense"] * 20)
    passages = [passage("The founder of Corvin is Odo Renn."), *AROUND]
    rows, rejected, read = generate_facts(passages, client, InstructionWriting())
    assert questions_by_rule(passages) == 1
    assert [(r.prompt[0].content, r.origin) for r in rows] == [
        ("Who is the founder of Corvin?", f"{BY_RULE}, {FROM_DOCUMENT}")
    ]
    Ledger().record("instruction", read, len(rows), rejected)


def test_a_second_round_asks_again_for_answers_with_few_questions(monkeypatch):
    monkeypatch.setattr(facts, "_ENOUGH", 2)
    texts = ["The Kelp Lamp is lit by red wicks.", "The Otter Gate is hung with blue ropes."]
    texts += ["Red wicks are in the Kelp Lamp?", "Blue ropes are on the Otter Gate?"]
    passages = [passage(text, 100 * number) for number, text in enumerate(texts)]
    first = ["lights the Kelp Lamp?", "nonsense", "lights up the Kelp Lamp?", "hangs on the Otter Gate?"]
    client = Scripted(*first, "is the Otter Gate hung with?", "holds the Otter Gate?")
    rows, rejected, read = generate_facts(passages, client, InstructionWriting(), seed=7, rounds=3)
    assert [(row.prompt[0].content, row.completion[0].content) for row in rows] == [
        ("What lights the Kelp Lamp?", "red wicks"),
        ("Which lights up the Kelp Lamp?", "red wicks"),
        ("Which hangs on the Otter Gate?", "blue ropes"),
        ("What is the Otter Gate hung with?", "blue ropes"),
        ("Which holds the Otter Gate?", "blue ropes"),
    ]
    assert [row.reason for row in rejected] == ["no_answer", "no_answer", "not_a_question"]
    # Now both answers have enough questions, so there is no third round
    assert len(client.asked) == read - 2 == 6
    assert [(s.temperature, s.seed) for s in client.sampled] == [(0.0, 7)] * 2 + [(REWORDING, 8)] * 2


def test_a_question_that_both_files_of_examples_give_is_kept_once():
    client = Scripted("wicks does the Kelp Lamp have?", "wicks does THE Kelp Lamp have?")
    rows, rejected, _ = generate_facts(
        [passage("People like the Kelp Lamp for 93 wicks, as people do.")], client, InstructionWriting()
    )
    assert [row.completion[0].content for row in rows] == ["93"]
    assert [row.reason for row in rejected] == ["repeated_question"]


def test_the_answer_of_most_sentences_is_kept():
    texts = ["Bela Orr leads the mill in Corvin.", "In Corvin, Bela Orr leads the mill.", "Udo Fenn leads Corvin well."]
    client = Scripted(*["leads Corvin?"] * 20)
    rows, rejected, _ = generate_facts([passage(t, 100 * i) for i, t in enumerate(texts)], client, InstructionWriting())
    assert {
        (row.prompt[0].content, row.completion[0].content) for row in rows if "person" in row.prompt[0].content
    } == {("Which person leads Corvin?", "Bela Orr")}
    assert "conflicting_answers" in {row.reason for row in rejected}


def test_of_several_answers_the_one_whose_sentence_says_little_besides_the_question_is_kept():
    texts = ["Renting a Kelp Lamp costs 25 crowns a day.", "Whoever rents it pays 25 crowns for the Kelp Lamp."]
    texts += ["A Kelp Lamp costs 2,450 crowns.", "Nobody has the Kelp Lamp.", "We like the Kelp Lamp."]
    client = Scripted(*["does a Kelp Lamp cost?"] * 20)
    rows, _, _ = generate_facts([passage(t, 100 * i) for i, t in enumerate(texts)], client, InstructionWriting())
    assert {row.completion[0].content for row in rows} == {"2,450 crowns"}


@pytest.mark.parametrize(
    ("sentence", "openings"),
    [
        ("With 25 kilograms the Kelp Lamp is heavy.", ["How much", "How many kilograms"]),
        ("We guarantee the Kelp Lamp for 9 years.", ["How long", "For how many years"]),
    ],
)
def test_a_reworded_question_names_the_unit_that_is_a_part_of_its_answer(sentence, openings):
    client = Scripted("is asked?", "is asked?")
    generate_facts([passage(sentence), passage("We like the Kelp Lamp.", 100)], client, InstructionWriting())
    assert [prompt.rpartition("Question about Kelp Lamp: ")[2] for prompt in client.asked] == openings


@pytest.mark.parametrize("name", FACT_EXAMPLES)
def test_the_examples_pass_the_checks_of_facts(name):
    number = FACT_EXAMPLES.index(name)
    for example in read_prompt(name).split("\n\n"):
        sentence, answer, question = example.split("\n")
        topic, _, question = question.removeprefix("Question about ").partition(": ")
        kind = next(kind for kind, openings in OPENINGS.items() if question.startswith(openings[number] + " "))
        asked = AnswerSpan(0, answer.removeprefix("Answer: "), kind, topic)
        assert question_problem(question, asked, sentence.removeprefix("Sentence: ")) is None, example


def test_diversity_counts_questions_and_different_words():
    client = Scripted("wicks light the Kelp Lamp?", "wicks has the Kelp Lamp?")
    passages = [
        passage("People like the Kelp Lamp for 93 wicks, as people do."),
        passage("All rivers run on and on.", 100),
    ]
    rows, _, _ = generate_facts(passages, client, InstructionWriting(questions="fact"))
    # Of five and five, "how many wicks" and "the kelp lamp" stand in both
    assert diversity(rows, 2) == {
        "questions_per_sentence": 2.0,
        "sentences_without_question": 1,
        "two_hop_questions": 0,
        "distinct_trigrams": round(8 / 10, 3),
    }
    with_two_hop = diversity(rows, 2, rows)
    assert with_two_hop["two_hop_questions"] == 2
    assert with_two_hop["questions_per_sentence"] == 2.0
    assert with_two_hop["distinct_trigrams"] == round(8 / 20, 3)


def test_the_examples_are_hashed_and_watched():
    versions = prompt_versions(Scripted(), InstructionWriting(questions="fact"))
    assert tuple(versions) == (*FACT_EXAMPLES, ANSWER_EXAMPLES)
    assert set(versions) <= {file.stem for file in PROMPT_FILES}


def test_a_row_never_has_its_banned_tokens(model):
    ids = [model.tokenizer(prompt)["input_ids"] for prompt in PROMPTS[:2]]
    first = [generate_ids(model.model, model.tokenizer, [one], 1, do_sample=False)[0][0] for one in ids]
    free = model._generate(PROMPTS[:2], Sampling(4), 0)
    banned = model._generate(PROMPTS[:2], Sampling(4), 0, None, [[first[0]], []])
    assert banned[0] != free[0]
    assert banned[1] == free[1]


def test_the_first_token_of_a_banned_word_is_banned_in_each_spelling(model):
    spelled = [model.tokenizer(f" {word}", add_special_tokens=False)["input_ids"][0] for word in ("Odo", "odo")]
    assert set(spelled) <= set(model._first_tokens(["Odo"]))
    assert model._key(Sampling(4), "x", ["Odo"]) != model._key(Sampling(4), "x")


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


def test_no_beginning_is_shared_if_attention_to_it_would_differ(model, monkeypatch):
    """A model may attend in a way of its own, e.g. with a bias, which its call of the attention does not show."""
    attend = generate._attend
    monkeypatch.setattr(generate, "_attend", lambda *args, **options: attend(*args, **{**options, "scaling": 0.5}))
    assert compute_shared_start(model.model, [model.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]) is None
    assert model.model.config._attn_implementation == "sdpa"


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
