"""Dataset writers: answers are generated once and stored, and unusable questions have a reason."""

import pytest

from llm_engineering.data.rows import InstructionRow, Message
from llm_engineering.documents.passages import Passage
from llm_engineering.generation.clients import local
from llm_engineering.generation.clients.local import LocalModel
from llm_engineering.generation.instructions import (
    FROM_DOCUMENT,
    draw_style,
    generate_instructions,
    instruction_problem,
)
from llm_engineering.generation.preferences import generate_preferences
from llm_engineering.generation.store import AnswerStore
from llm_engineering.generation.types import Answer, Failure, Reply, Sampling
from llm_engineering.models.base_model import load_model
from llm_engineering.models.device import choose_device
from llm_engineering.models.tokenizer import load_tokenizer
from llm_engineering.recipe.generation_blocks import InstructionWriting, PreferenceWriting
from llm_engineering.recipe.model_blocks import ModelConfig

PASSAGE = "A generator function suspends its execution at each yield expression and goes on from there when asked."


@pytest.mark.parametrize(
    ("style", "text", "reason"),
    [
        ("question", "What does a generator function do at a yield expression?", ""),
        ("question", "A generator function suspends its execution", "not_a_question"),
        ("question", "Generators are nice, are they not?", "not_a_question"),
        ("question", "What is x?", "question_length"),
        ("question", "What does the passage say about a generator?", "mentions_passage"),
        ("question", "What is the output of the following generator?", "mentions_passage"),
        ("question", "What is the purpose of the debugger?", "not_grounded"),
        ("question", "Which debugger commands list the breakpoints of a generator?", "not_grounded"),
        ("how_to", "How does a generator function suspend its execution?", ""),
        ("how_to", "What does a generator function suspend?", "not_a_how_to"),
        ("task", "Explain how a generator function suspends its execution.", ""),
        ("task", "How does a generator function suspend its execution?", "not_a_task"),
        ("task", "Describe two debugger commands.", "not_grounded"),
    ],
)
def test_instruction_problems(style, text, reason):
    assert instruction_problem(text, PASSAGE, style) == reason


@pytest.fixture
def model(tiny_model, cpu, settings, tmp_path):
    config = ModelConfig(name_or_path=str(tiny_model), revision="test")
    loaded = load_model(config, settings, choose_device(cpu))
    tokenizer = load_tokenizer(config, settings)

    def make():
        return LocalModel(loaded, tokenizer, "tiny", AnswerStore(tmp_path / "answers.jsonl"), batch_size=2)

    return make


REQUESTS = [[{"role": "user", "content": f"Question {i}"}] for i in range(5)]


def test_stored_answers_are_not_generated_again(model, monkeypatch):
    answers = model().answer(REQUESTS, Sampling(4), "answers")
    asked = []
    monkeypatch.setattr(LocalModel, "_generate", lambda self, prompts, *rest: asked.append(prompts))
    assert model().answer(REQUESTS, Sampling(4), "answers") == answers
    assert asked == []


def test_sampled_answers_depend_only_on_the_seed(model, tmp_path):
    drawn = model().answer(REQUESTS, Sampling(4, 1.0, seed=1), "answers")
    (tmp_path / "answers.jsonl").unlink()
    assert model().answer(REQUESTS, Sampling(4, 1.0, seed=1), "answers") == drawn
    assert model().answer(REQUESTS, Sampling(4, 1.0, seed=2), "answers") != drawn
    assert model().answer(REQUESTS, Sampling(4), "answers") != drawn


def test_answers_end_at_a_stop_string(model):
    def answers(**stop):
        found = model().answer(REQUESTS, Sampling(24, temperature=1.0, **stop), "answers")
        return [answer.text for answer in found]

    # A token may have several vowels, and no token follows it. Each string is searched in all tokens of the vocabulary.
    assert sum(map(len, answers(stop=tuple("aeiou")))) < sum(map(len, answers())) / 2


def test_a_killed_and_restarted_run_has_the_same_answers(model, monkeypatch, tmp_path):
    expected = model().answer(REQUESTS, Sampling(4), "answers")
    (tmp_path / "answers.jsonl").unlink()
    real, calls = LocalModel._generate, []

    def dies(self, *arguments):
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return real(self, *arguments)

    monkeypatch.setattr(LocalModel, "_generate", dies)
    with pytest.raises(KeyboardInterrupt):
        model().answer(REQUESTS, Sampling(4), "answers")
    with (tmp_path / "answers.jsonl").open("a") as file:
        file.write('{"key": "half-writ')
    monkeypatch.setattr(LocalModel, "_generate", real)
    again = model()
    assert len(again.store.answers) == 2
    assert again.answer(REQUESTS, Sampling(4), "answers") == expected
    assert len(model().store.answers) == 5


def passage(text=PASSAGE, title="generators"):
    return Passage(id="x", document="doc", title=title, start=0, end=len(text), text=text)


def test_rows_and_quarantine_add_up(model, monkeypatch):
    questions = iter(
        [["What does a generator function do?", "Nonsense"], ["Question: What does a generator function do?"]]
    )
    monkeypatch.setattr(LocalModel, "_generate", lambda *a: list(map(Reply, next(questions))))
    passages = [passage(), passage(PASSAGE + " It is lazy."), passage(PASSAGE + " It is lazy. Very.")]
    rows, rejected = generate_instructions(passages, model(), InstructionWriting(question_max_new_tokens=8), seed=1)
    assert [(r.prompt[0].content, r.completion[0].content) for r in rows] == [
        ("What does a generator function do?", PASSAGE)
    ]
    assert sorted(q.reason for q in rejected) == ["not_a_question", "repeated_question"]
    assert rows[0].document == "doc"
    assert rows[0].source == f"doc:characters 0-{len(PASSAGE)}"


def test_rows_that_are_not_drawn_are_quarantined(model):
    rows = [
        InstructionRow(
            prompt=[Message(role="user", content=f"Q{i}")],
            completion=[Message(role="assistant", content=f"A{i}")],
            source=f"s{i}",
            origin="o",
        )
        for i in range(5)
    ]
    writing = PreferenceWriting(rejected_max_new_tokens=4, max_preferences=3, rejected_cut="keep")
    made, rejected = generate_preferences(rows, {}, model(), writing, seed=1)
    assert (len(made), [q.reason for q in rejected]) == (3, ["not_drawn", "not_drawn"])
    assert all(row.chosen[0].content.startswith("A") for row in made)
    assert len({row.source for row in made} | {q.source for q in rejected}) == 5


def test_keys_of_the_local_model_do_not_change(model, monkeypatch):
    """Keys order and seed the batches, so other keys would give other rejected answers."""
    monkeypatch.setattr(LocalModel, "_generate", lambda self, prompts, *rest: [Reply("x")] * len(prompts))
    client = model()
    client.answer([[{"role": "user", "content": "Hi"}]], Sampling(32, 0.0, 42, ("?",)), "questions")
    client.answer([[{"role": "user", "content": "Hi"}]], Sampling(64, 1.0, 42), "answers")
    # sha256 of '[["tiny", 32, ["?"], 0.0, 0], [{"role": "user", "content": "Hi"}]]' and of
    # '[["tiny", 64, [], 1.0, 42], [{"role": "user", "content": "Hi"}]]'.
    assert list(client.store.answers) == ["169d43cb384dba3253aa213c", "fa359c5093d69d13374c516f"]


class Scripted:
    """A client that gets its answers from a function."""

    identity = "scripted"
    temperature = None

    def __init__(self, answer, writes_json=True):
        self.say, self.writes_json, self.asked = answer, writes_json, []

    def answer(self, requests, sampling, what):
        self.asked += [(request[-1]["content"], sampling) for request in requests]
        return [self.say(request[-1]["content"], sampling) for request in requests]


def test_styles_are_drawn_by_weight_and_seed():
    passages = [Passage(id=str(i), document="d", title="t", start=0, end=1, text="x") for i in range(2000)]
    writing = InstructionWriting(styles={"task": 1, "question": 3, "how_to": 0})
    drawn = [draw_style(p, writing, 1) for p in passages]
    # 1,500 expected, standard deviation 19.
    assert 1400 < drawn.count("question") < 1600
    assert drawn.count("how_to") == 0
    assert [draw_style(p, writing, 1) for p in reversed(passages)] == drawn[::-1]
    assert [draw_style(p, writing, 2) for p in passages] != drawn


def test_every_style_has_its_prompt_and_its_rows():
    passages = [passage(f"{PASSAGE} Number {i}.").model_copy(update={"id": str(i)}) for i in range(30)]

    def say(prompt, sampling):
        number = prompt.split("Number ")[1].split(".")[0]
        if "one specific task" in prompt:
            return Answer(f"Explain generator number {number} in words{'x' * int(number)}.")
        return Answer(f"How does generator number {number} suspend{'x' * int(number)}?")

    writing = InstructionWriting(styles={"task": 1, "question": 1, "how_to": 1})
    rows, rejected = generate_instructions(passages, Scripted(say), writing, seed=1)
    assert rejected == []
    assert {row.origin.split(" ")[0] for row in rows} == {"task", "question", "how_to"}
    # The rows are in the order of the passages, although each style is asked separately.
    assert [row.completion[0].content for row in rows] == [p.text for p in passages]
    assert all(row.origin.endswith(f"by scripted, {FROM_DOCUMENT}") for row in rows)


def test_the_model_answers_only_the_questions_that_are_kept():
    def say(prompt, sampling):
        if sampling.json_field == "answer":
            return Answer("It suspends.") if "at each yield" in prompt else Failure("refused", "no", "raw")
        return Answer("What does a generator do" + (" now" if "lazy" in prompt else "") + "?")

    client = Scripted(say)
    passages = [passage(), passage(PASSAGE + " It is lazy."), passage(PASSAGE)]
    writing = InstructionWriting(answers="model", answer_max_new_tokens=100)
    rows, rejected = generate_instructions(passages, client, writing, seed=1)
    assert [row.completion[0].content for row in rows] == ["It suspends."] * 2
    assert FROM_DOCUMENT not in rows[0].origin
    assert "answer (prompt " in rows[0].origin
    assert [q.reason for q in rejected] == ["repeated_question"]
    assert [s.json_field for _, s in client.asked] == ["instruction"] * 3 + ["answer"] * 2


def test_general_rows_get_no_rejected_answer():
    rows = [
        InstructionRow(
            prompt=[Message(role="user", content=f"Q {origin}")],
            completion=[Message(role="assistant", content="A")],
            source="s",
            origin=origin,
        )
        for origin in ("human", "replay")
    ]
    client = Scripted(lambda prompt, sampling: Answer("mine"))
    made, rejected = generate_preferences(rows, {}, client, PreferenceWriting(), seed=1)
    assert [row.prompt[0].content for row in made] == ["Q human"]
    assert [quarantined.reason for quarantined in rejected] == ["replay"]
    assert len(client.asked) == 1


def test_chosen_answers_must_be_in_the_document():
    def row(answer, origin):
        return InstructionRow(
            prompt=[Message(role="user", content=f"Q {answer}")],
            completion=[Message(role="assistant", content=answer)],
            source="s",
            origin=origin,
            document="doc",
        )

    document = f"question by m, {FROM_DOCUMENT}"
    rows = [row("one two three", document), row("one two four", document), row("made up", "question and answer by m")]
    client = Scripted(lambda prompt, sampling: Failure("refused", "no", "raw") if "made" in prompt else Answer("mine"))
    made, rejected = generate_preferences(rows, {"doc": "one\n  two\tthree"}, client, PreferenceWriting(), seed=1)
    assert [r.chosen[0].content for r in made] == ["one two three"]
    assert [(q.reason, q.text) for q in rejected] == [("not_verbatim", "one two four"), ("refused", "raw")]
    # The user's own rows have no documents to be found in.
    assert len(generate_preferences(rows[:2], {}, client, PreferenceWriting(), seed=1)[0]) == 2


def answered(text, is_cut, **writing):
    """The pairs and the quarantine of one row whose rejected answer is `text`."""
    row = InstructionRow(
        prompt=[Message(role="user", content="Where is it?")],
        completion=[Message(role="assistant", content="It is here.")],
        source="s",
        origin="o",
    )
    return generate_preferences(
        [row], {}, Scripted(lambda *_: Answer(text, is_cut)), PreferenceWriting(**writing), seed=1
    )


CUT = "It is there. The other one stands in the kitch"


@pytest.mark.parametrize(
    ("text", "is_cut", "rejected_cut", "kept", "origin"),
    [
        (CUT, True, "sentence", "It is there.", "chosen: o; rejected by scripted, ended at its last sentence"),
        (CUT, False, "sentence", CUT, "chosen: o; rejected by scripted"),
        (CUT, True, "keep", CUT, "chosen: o; rejected by scripted"),
        (CUT, False, "drop", CUT, "chosen: o; rejected by scripted"),
    ],
)
def test_a_cut_rejected_answer_ends_at_its_last_sentence(text, is_cut, rejected_cut, kept, origin):
    pairs, quarantine = answered(text, is_cut, rejected_cut=rejected_cut)
    assert [(pair.rejected[0].content, pair.origin) for pair in pairs] == [(kept, origin)]
    assert quarantine == []


@pytest.mark.parametrize(("text", "rejected_cut"), [("The other one stands in", "sentence"), (CUT, "drop")])
def test_a_cut_rejected_answer_without_a_whole_sentence_is_set_aside(text, rejected_cut):
    pairs, quarantine = answered(text, True, rejected_cut=rejected_cut)
    assert pairs == []
    expected = ("rejected_cut", "generation.rejected_max_new_tokens is 64", text)
    assert [(q.reason, q.detail, q.text) for q in quarantine] == [expected]


def test_the_local_model_says_which_answers_were_cut(model, monkeypatch):
    client = model()
    end = client.tokenizer.eos_token_id
    some = client.tokenizer("It is this.")["input_ids"][:2]
    written = iter([[[*some, end], [*some, *some]], [[end], some], [some]])
    monkeypatch.setattr(local, "generate_ids", lambda *_, **options: next(written))
    answers = client.answer(REQUESTS, Sampling(4), "answers")
    assert sorted(answer.is_cut for answer in answers) == [False, False, True, True, True]
    assert model().answer(REQUESTS, Sampling(4), "answers") == answers


def test_answers_of_earlier_versions_that_may_be_cut_are_generated_again(model, monkeypatch):
    client = model()
    client.answer(REQUESTS[:1], Sampling(4), "answers")
    (key,) = client.store.answers
    client.store.add({key: Reply("stored by an earlier version")})
    assert model().answer(REQUESTS[:1], Sampling(4), "answers")[0].text != "stored by an earlier version"
