"""Cutting over-long rows, training on prompts, and checking the labels of every row before training."""

import json
from collections import Counter

import pytest
from datasets import Dataset, DatasetDict

from llm_engineering.data.ledger import Ledger
from llm_engineering.data.rows import InstructionRow, LabelledRow, Message, PreferenceRow
from llm_engineering.data.storage import rows_dataset
from llm_engineering.errors import WorkError
from llm_engineering.formatting.datasets import format_rows, format_splits
from llm_engineering.formatting.labels import check_labels
from llm_engineering.formatting.render import prompt_ids, render
from llm_engineering.recipe.data_blocks import FormattingConfig
from llm_engineering.reports.data_report import write_data_report


def message(role, content):
    return Message(role=role, content=content)


def row(question, *answers):
    turns = [message("assistant", answers[0])]
    for answer in answers[1:]:
        turns += [message("user", "And?"), message("assistant", answer)]
    return InstructionRow(prompt=[message("user", question)], completion=turns, source="s", origin="o")


def pair(question, chosen, rejected):
    return PreferenceRow(
        prompt=[message("user", question)],
        chosen=[message("assistant", chosen)],
        rejected=[message("assistant", rejected)],
        source="s",
        origin="o",
    )


def cut(one, kind, tokenizer, max_length):
    (formatted,) = format_rows([one], kind, tokenizer, FormattingConfig(max_length=max_length, over_long="truncate"))
    return formatted


def test_a_cut_answer_is_trained_without_its_end(tokenizer):
    long = row("Hello", "long " * 90)
    start = len(prompt_ids(long.prompt, tokenizer))
    formatted = cut(long, "instruction", tokenizer, start + 7)
    (whole,) = render([long], tokenizer)
    assert formatted.records[0]["input_ids"] == whole.input_ids[: start + 7]
    assert formatted.records[0]["labels"] == [-100] * start + whole.input_ids[start : start + 7]
    assert tokenizer.eos_token_id not in formatted.records[0]["labels"]
    assert (formatted.records[0]["truncated"], formatted.records[0]["prompt_tokens"]) == (True, start)
    assert "the end of its answer is not trained" in formatted.truncated
    assert formatted.length == len(whole.input_ids)


def test_an_answer_with_a_label_is_a_prompt_and_a_completion(tokenizer):
    one = row("Hello", "Hi there")
    judged = LabelledRow.model_validate(one.model_dump() | {"label": False})
    (formatted,) = format_rows([judged], "labelled", tokenizer, FormattingConfig(train_on_prompt=True))
    (whole,) = render([one], tokenizer)
    (record,) = formatted.records
    start = len(prompt_ids(one.prompt, tokenizer))
    assert record["prompt_ids"] == whole.input_ids[:start]
    assert record["completion_ids"] == whole.input_ids[start:]
    assert record["completion_ids"][-1] == tokenizer.eos_token_id
    assert record["label"] is False
    shorter = cut(judged, "labelled", tokenizer, start + 2).records[0]
    assert (shorter["completion_ids"], shorter["truncated"]) == (whole.input_ids[start : start + 2], True)
    for wrong, words in (
        ({"prompt_ids": []}, "it has no prompt"),
        ({"completion_ids": []}, "its completion is empty"),
        ({"completion_ids": [5]}, "its completion does not end"),
    ):
        split = Dataset.from_list([{**record, **wrong}])
        with pytest.raises(WorkError, match=words):
            check_labels(DatasetDict(train=split, validation=split), tokenizer)


def test_a_conversation_cut_between_two_answers_ends_with_the_first(tokenizer):
    two = row("Hello", "Hi", "long " * 90)
    (whole,) = render([two], tokenizer)
    first_end = whole.labels.index(tokenizer.eos_token_id)
    record = cut(two, "instruction", tokenizer, first_end + 3).records[0]
    assert record["input_ids"] == whole.input_ids[: first_end + 1]
    assert record["labels"][-1] == tokenizer.eos_token_id


def test_a_prompt_is_never_cut(tokenizer):
    long = row("long " * 90, "Hi")
    start = len(prompt_ids(long.prompt, tokenizer))
    assert cut(long, "instruction", tokenizer, start).rejected.reason == "over_long_prompt"
    one = cut(row("long " * 90, "Hi there"), "instruction", tokenizer, start + 1)
    assert sum(label != -100 for label in one.records[0]["labels"]) == 1


def test_answers_of_a_cut_pair_are_neither_empty_nor_the_same(tokenizer):
    start = len(prompt_ids([message("user", "Hello")], tokenizer))
    record = cut(pair("Hello", "Yes " * 90, "No " * 90), "preference", tokenizer, start + 1).records[0]
    assert len(record["chosen_ids"]) == len(record["rejected_ids"]) == 1
    assert cut(pair("Hello", "Yes " * 90, "No"), "preference", tokenizer, start).rejected.reason == "over_long_prompt"
    alike = cut(pair("Hello", "Yes " * 90, "Yes " * 80), "preference", tokenizer, start + 5).rejected
    assert (alike.reason, "both answers are the same" in alike.detail) == ("over_long", True)


def test_truncated_rows_are_counted_in_the_report(tokenizer, tmp_path):
    rows = [row(f"Hello {i}", "long " * (90 if i < 2 else 1)) for i in range(6)]
    ledger = Ledger()
    ledger.record("instruction", 6, 6)
    splits = {"train": rows_dataset(rows[:4], "instruction"), "validation": rows_dataset(rows[4:], "instruction")}
    config = FormattingConfig(max_length=64, over_long="truncate")
    data, lengths = format_splits(splits, "instruction", tokenizer, config, tmp_path, ledger)
    check_labels(data, tokenizer)
    assert data["train"]["truncated"][:] == [True, True, False, False]
    assert max(lengths.kept["train"]) == 64
    empty = Dataset.from_dict({"id": [], "source": [], "rule": [], "detail": []})
    clusters = Dataset.from_dict({"cluster": [], "source": [], "split": [], "fate": []})
    suspicious = Dataset.from_dict({"id": [], "source": [], "findings": [], "prompt": [], "answer": []})
    tables = DatasetDict(findings=empty, clusters=clusters, suspicious=suspicious)
    report = write_data_report(tmp_path / "report", "instruction", ledger, tables, lengths, 64)
    assert (report["truncated"], report["share_truncated"], report["findings"]) == (2, 0.3333, {"truncated": 2})
    assert any("2 rows were cut" in line for line in report["guidance"])
    lines = [json.loads(line) for line in (tmp_path / "report" / "findings.jsonl").read_text().splitlines()]
    assert Counter(line["rule"] for line in lines) == {"truncated": 2}
    assert {line["id"] for line in lines} == {rows[0].id, rows[1].id}


def test_training_on_prompts_trains_every_token_but_the_test_split_labels_only_answers(tokenizer, tmp_path):
    rows = rows_dataset([row("Hello", "Hi")], "instruction")
    ledger = Ledger()
    ledger.record("instruction", 3, 3)
    config = FormattingConfig(max_length=64, train_on_prompt=True)
    splits = {"train": rows, "validation": rows, "test": rows}
    data, _ = format_splits(splits, "instruction", tokenizer, config, tmp_path, ledger)
    assert data["train"][0]["labels"] == data["train"][0]["input_ids"]
    assert data["test"][0]["labels"][: data["test"][0]["prompt_tokens"]] == [-100] * data["test"][0]["prompt_tokens"]
    check_labels(data, tokenizer, train_on_prompt=True)
    with pytest.raises(WorkError, match="a token of its prompt is trained"):
        check_labels(data, tokenizer)


END = 2
GOOD = {"id": "a", "input_ids": [5, 6, 7, END], "labels": [-100, -100, 7, END], "prompt_tokens": 2, "truncated": False}
PAIR = {"id": "a", "prompt_ids": [5], "chosen_ids": [6, END], "rejected_ids": [7, END], "truncated": False}


def splits_of(good, bad):
    return DatasetDict(train=Dataset.from_list([good, bad]), validation=Dataset.from_list([good]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": [-100] * 4}, "none of its tokens is trained"),
        ({"labels": [-100, -100, 7]}, "4 tokens and 3 labels"),
        ({"labels": [-100, -100, 8, END]}, "a label differs from the token at its position"),
        ({"labels": [-100, 6, 7, END]}, "a token of its prompt is trained"),
        ({"labels": [5, 6, 7, END], "prompt_tokens": 0}, "a token of its prompt is trained"),
        ({"labels": [-100, -100, 7, -100]}, "does not end with the end-of-turn token"),
        ({"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}, "does not end with the end-of-turn token"),
        (
            {"input_ids": [5, 6, 7, 8, 9, END], "labels": [-100, -100, 7, -100, 9, END], "truncated": True},
            "does not end",
        ),
    ],
)
def test_a_row_with_wrong_labels_is_named(tokenizer, change, words):
    check_labels(splits_of(GOOD, GOOD), tokenizer)
    with pytest.raises(WorkError, match=rf"Row 1 \(b\) of the train split .*{words}"):
        check_labels(splits_of(GOOD, GOOD | {"id": "b"} | change), tokenizer)


def test_the_last_answer_of_a_truncated_row_has_no_end(tokenizer):
    check_labels(splits_of(GOOD, GOOD | {"labels": [-100, -100, 7, -100], "truncated": True}), tokenizer)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt_ids": []}, "no prompt"),
        ({"rejected_ids": []}, "rejected answer is empty"),
        ({"chosen_ids": [6, 8]}, "chosen answer does not end"),
        ({"chosen_ids": [7, END]}, "are the same"),
    ],
)
def test_a_wrong_pair_is_named(tokenizer, change, words):
    check_labels(splits_of(PAIR, PAIR | {"chosen_ids": [6, 8], "truncated": True}), tokenizer)
    with pytest.raises(WorkError, match=rf"Row 1 \(b\) of the train split .*{words}"):
        check_labels(splits_of(PAIR, PAIR | {"id": "b"} | change), tokenizer)


def test_training_refuses_a_dataset_with_wrong_labels(base_model, cpu, settings):
    from llm_engineering.recipe.model_blocks import ModelConfig
    from llm_engineering.recipe.stage_blocks import SFTConfig
    from llm_engineering.recipe.training_blocks import TrackingConfig, TrainingSetup
    from tests.tiny_models import train

    setup = TrainingSetup(
        model=ModelConfig(name_or_path=str(base_model)),
        max_length=64,
        chat_template="alpaca",
        compute=cpu,
        tracking=TrackingConfig(comet="off"),
        seed=7,
    )
    config = SFTConfig(
        learning_rate=1e-3,
        num_train_epochs=1,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        eval_steps=1,
        save_steps=1,
    )
    with pytest.raises(WorkError, match="Row 0 .* does not end with the end-of-turn token"):
        train(splits_of(GOOD, GOOD), config, setup, settings)


def test_a_pair_that_was_cut_is_marked_as_truncated(tokenizer, tmp_path):
    pairs = rows_dataset([pair("Hello", "Yes " * 90, "No"), pair("Hello", "Yes", "No")], "preference")
    ledger = Ledger()
    ledger.record("preference", 4, 4)
    config = FormattingConfig(max_length=64, over_long="truncate")
    data, _ = format_splits({"train": pairs, "validation": pairs}, "preference", tokenizer, config, tmp_path, ledger)
    check_labels(data, tokenizer)
    assert data["train"]["truncated"][:] == [True, False]


def newest(one, kind, tokenizer, max_length):
    config = FormattingConfig(max_length=max_length, over_long="drop_oldest_turns")
    (formatted,) = format_rows([one], kind, tokenizer, config)
    return formatted


def talk(*contents):
    return [message(("user", "assistant")[number % 2], content) for number, content in enumerate(contents)]


@pytest.mark.parametrize("first", [1, 3, 5])
@pytest.mark.parametrize("system", [[], [message("system", "Be brief.")]])
def test_an_over_long_conversation_loses_as_few_of_its_oldest_turns_as_possible(tokenizer, first, system):
    turns = talk("One?", "1 " * 30, "Two?", "2", "Three?", "3 " * 5)
    whole = InstructionRow(prompt=[*system, *turns[:first]], completion=turns[first:], source="s", origin="o")
    kept = InstructionRow(prompt=[*system, *turns[2:3]], completion=turns[3:], source="s", origin="o")
    if first == 5:
        kept = InstructionRow(prompt=[*system, *turns[2:5]], completion=turns[5:], source="s", origin="o")
    (expected,) = render([kept], tokenizer)
    formatted = newest(whole, "instruction", tokenizer, len(expected.input_ids))
    assert formatted.records[0]["input_ids"] == expected.input_ids
    assert formatted.records[0]["labels"] == expected.labels
    assert formatted.records[0]["id"] == whole.id
    assert (formatted.rule, "without its first 1 exchanges" in formatted.truncated) == ("oldest_turns_dropped", True)
    shorter = newest(whole, "instruction", tokenizer, len(expected.input_ids) - 1)
    assert "without its first 2 exchanges" in shorter.truncated
    assert tokenizer.decode(shorter.records[0]["input_ids"]).count("Three?") == 1
    assert newest(whole, "instruction", tokenizer, 8).rejected.reason.startswith("over_long")


def test_an_over_long_pair_loses_the_oldest_turns_of_its_prompt(tokenizer):
    prompt = talk("One?", "1 " * 90, "Two?", "2 " * 90, "Three?")
    chosen, rejected = [message("assistant", "3")], [message("assistant", "4")]
    whole = PreferenceRow(prompt=prompt, chosen=chosen, rejected=rejected, source="s", origin="o")
    formatted = newest(whole, "preference", tokenizer, 64)
    assert formatted.records[0]["prompt_ids"] == prompt_ids(prompt[4:], tokenizer)
    single = PreferenceRow(prompt=talk("1 " * 90), chosen=chosen, rejected=rejected, source="s", origin="o")
    assert newest(single, "preference", tokenizer, 64).rejected.reason == "over_long_prompt"
