"""Contamination: evaluation rows in training data. Language: the detected language of a text."""

import json
import pickle

import pytest

from llm_engineering.data.examine import language_of
from llm_engineering.data.load import load_evaluation
from llm_engineering.data.rows import InstructionRow, Message, PreferenceRow
from llm_engineering.data.similarity import EvaluationIndex
from llm_engineering.errors import RequestError


def row(prompt: str, answer: str = "Yes.", system: str = "") -> InstructionRow:
    messages = [Message(role="system", content=system)] if system else []
    return InstructionRow(
        prompt=[*messages, Message(role="user", content=prompt)],
        completion=[Message(role="assistant", content=answer)],
        source="rows.jsonl:1",
        origin="unknown",
    )


def index(*rows: InstructionRow | PreferenceRow, n: int = 5) -> EvaluationIndex:
    found = EvaluationIndex(n)
    for each in rows:
        found.add(each)
    return found


LONG = "A train leaves the station at noon and arrives at three."


@pytest.mark.parametrize(
    "prompt",
    [
        LONG,
        LONG.upper().replace(" ", "\n"),
        "Read this: a train, leaves the STATION! Then go on.",
        "When? at noon and arrives at",
    ],
)
def test_five_consecutive_words_match_in_any_case_and_punctuation(prompt):
    assert index(row(LONG)).match(row(prompt))


@pytest.mark.parametrize(
    "prompt",
    [
        "A train leaves the harbour at noon and leaves at three.",
        "the station at noon",
        "at noon and arrives later",
        "three at arrives and noon at station the leaves train a",
        "",
        "Ein Zug fährt mittags ab und kommt um drei an.",
        "一列火车中午离站，三点到达。",
    ],
)
def test_fewer_consecutive_words_are_not_enough(prompt):
    assert index(row(LONG)).match(row(prompt)) == ""


def test_a_match_quotes_the_shared_words_up_to_a_limit():
    assert index(row(LONG)).match(row("Why: leaves the station at noon?")) == "leaves the station at noon"
    wide = " ".join("x" * 40 + str(i) for i in range(5))
    assert len(index(row(wide)).match(row(wide))) == 100


def test_answers_count_on_both_sides_and_in_all_kinds_of_rows():
    pair = PreferenceRow(
        prompt=[Message(role="user", content="Tell me about trains, please do.")],
        chosen=[Message(role="assistant", content="I know nothing of that at all.")],
        rejected=[Message(role="assistant", content=LONG)],
        source="pairs.jsonl:1",
        origin="unknown",
    )
    assert index(row("Q", LONG)).match(row("P", LONG))
    assert index(row("Q", LONG)).match(row(LONG, "No."))
    assert index(row("Q", LONG)).match(pair)
    assert index(pair).match(row("Q", LONG))
    assert index(pair).match(row("Q", "She said: I know nothing of that."))


def test_a_short_prompt_counts_as_a_whole_and_a_short_answer_never():
    found = index(row("What is 2 + 2?", "Four."))
    assert found.match(row("what is 2 2", "I do not know.")) == "what is 2 2"
    assert found.match(row("What is 2 + 2 + 1?", "Four.")) == ""
    assert found.match(row("How many wheels?", "Four.")) == ""
    assert found.match(row("So: What is 2 + 2?")) == ""


def test_short_prompts_in_other_scripts_count_as_a_whole():
    found = index(row("法国的首都是哪里？"), row("Где столица?"))
    assert found.match(row("法国的首都是哪里"))
    assert found.match(row("где столица"))
    assert found.match(row("法国的首都是巴黎。")) == "法 国 的 首 都"
    assert index(row("法国的首都是哪里？"), n=13).match(row("法国的首都是巴黎。")) == ""


def test_a_prompt_of_punctuation_alone_matches_no_other():
    assert index(row("???")).match(row("!!!")) == ""


def test_system_messages_are_ignored():
    found = index(row("What is this?", system=LONG))
    assert found.match(row("Something else here", system=LONG)) == ""
    assert found.match(row(LONG)) == ""
    assert found.match(row("what is this", system="You are kind."))


def test_an_ngram_never_spans_two_messages():
    assert index(row("one two three four five")).match(row("one two three", "four five")) == ""


def test_exactly_n_words_make_one_gram_and_n_can_be_one():
    found = index(row("one two three four five"))
    assert len(found.grams) == 1
    assert not found.short_prompts
    assert index(row("trains"), n=1).match(row("I like trains."))


def test_the_index_holds_only_numbers_and_can_be_pickled_for_a_worker():
    found = pickle.loads(pickle.dumps(index(row(LONG), row("Short one"))))
    assert all(isinstance(value, int) for value in found.grams | found.short_prompts)
    assert found.match(row(LONG))
    assert found.match(row("short one"))


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("The dog ran across the street because it had seen a cat.", "en"),
        ("Der Hund lief über die Straße, weil er eine Katze gesehen hatte.", "de"),
        ("Le chien a traversé la rue en courant parce qu'il avait vu un chat.", "fr"),
        ("El perro cruzó la calle corriendo porque había visto un gato en la acera.", "es"),
        ("那只狗跑过了街道，因为它看见了一只猫。", "zh"),
        ("Собака перебежала улицу, потому что увидела кошку. Потом она вернулась домой и легла спать.", "ru"),
        ("", None),
        ("42", None),
        ("Paris", None),
        ("Amanda, James, John, Maria", None),
        ("for (int i = 0; i < n; i++) { sum += a[i]; }", None),
        ('{"id": 1, "tags": ["a", "b"]}', None),
    ],
)
def test_the_language_of_a_text_is_none_if_it_is_uncertain(text, language):
    assert language_of(text) == language


def test_evaluation_files_may_have_any_columns(tmp_path, caplog):
    benchmark = tmp_path / "benchmark.jsonl"
    record = {"question": "Who?", "choices": {"text": [LONG, "Nobody"]}, "answer": 3}
    benchmark.write_text(json.dumps(record))
    known = tmp_path / "known.jsonl"
    known.write_text(json.dumps({"instruction": "Add up", "input": "1 2", "output": "3"}))
    with caplog.at_level("INFO"):
        found = load_evaluation([str(benchmark), str(known)], 5)
    assert f"The format of {benchmark} is not clear: each of its texts is compared alone" in caplog.text
    assert found.match(row("Tell me.", f"Well. {LONG}"))
    assert found.match(row("who"))
    assert found.match(row("Add up 1 2"))
    assert not found.match(row("Add up"))
    turns = [{"role": "user", "content": LONG}, {"role": "assistant", "content": "Yes."}]
    known.write_text(json.dumps({"instruction": "Add", "output": "3", "messages": turns}))
    assert load_evaluation([str(known)], 5).match(row("Tell me.", f"Well. {LONG}"))
    assert load_evaluation([], 5) is None
    with pytest.raises(RequestError, match="There is no file"):
        load_evaluation([str(tmp_path / "nowhere.jsonl")], 5)
