"""Texts as tokens: every token is trained, long texts are divided, and the labels are checked before training."""

from collections import Counter

import pytest
from datasets import Dataset, DatasetDict
from tokenizers import processors

from llm_engineering.data.ledger import Ledger
from llm_engineering.data.rows import TextRow
from llm_engineering.data.storage import rows_dataset
from llm_engineering.errors import WorkError
from llm_engineering.formatting.columns import pieces
from llm_engineering.formatting.datasets import format_rows, format_splits
from llm_engineering.formatting.labels import check_labels
from llm_engineering.formatting.render import text_tokens
from llm_engineering.models.tokenizer import load_tokenizer
from llm_engineering.recipe.data_blocks import FormattingConfig
from llm_engineering.recipe.model_blocks import ModelConfig
from tests.tiny_models import write_model


def text(content):
    return TextRow(text=content, source="s", origin="document", document="s")


@pytest.fixture
def llama3(settings, tmp_path):
    """A tokenizer with different tokens for the start and the end of a text."""
    return load_tokenizer(ModelConfig(name_or_path=str(write_model(tmp_path / "model", "llama3"))), settings)


def with_template(tokenizer, template):
    """The tokenizer adds special tokens to each text, as those of Llama and T5 do."""
    names = {name: tokenizer.convert_tokens_to_ids(name) for name in ("<|begin_of_text|>", "<|eot_id|>")}
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=list(names.items())
    )
    return tokenizer


def bytes_ids(tokenizer, content):
    """The ids of a text whose characters are tokens of their own, one after the other."""
    return [tokenizer.convert_tokens_to_ids(character) for character in content]


@pytest.mark.parametrize(
    ("template", "starts"),
    [
        (None, False),
        ("<|begin_of_text|> $A", True),
        ("<|begin_of_text|> $A <|eot_id|>", True),
        ("$A <|eot_id|>", False),
    ],
    ids=["none", "start", "start and end", "end"],
)
def test_tokens_are_the_text_with_the_start_token_of_the_tokenizer_and_one_end_token(template, starts, llama3):
    tokenizer = with_template(llama3, template) if template else llama3
    start, end = (tokenizer.convert_tokens_to_ids(name) for name in ("<|begin_of_text|>", "<|eot_id|>"))
    # The tokenizer has merged none of these letters.
    expected = [*([start] if starts else []), *bytes_ids(tokenizer, "XQZJ"), end]
    first, second = text_tokens([text("XQZJ"), text("Z")], tokenizer)
    assert first.input_ids == first.labels == expected
    assert second.input_ids == second.labels == [*([start] if starts else []), *bytes_ids(tokenizer, "Z"), end]


@pytest.mark.parametrize(
    ("count", "max_length", "lengths"),
    [(8, 8, [8]), (9, 8, [4, 5]), (16, 8, [8, 8]), (17, 8, [5, 6, 6]), (1, 8, [1]), (25, 8, [6, 6, 6, 7])],
)
def test_a_text_is_divided_into_the_fewest_pieces_that_join_to_the_whole(count, max_length, lengths):
    ids = list(range(100, 100 + count))
    found = pieces(ids, max_length)
    assert [len(piece) for piece in found] == lengths
    assert [token for piece in found for token in piece] == ids


def test_all_pieces_of_a_text_but_the_last_are_truncated(llama3):
    config = FormattingConfig(max_length=8)
    rows = [text("XQZJ" * 5), text("X")]
    long, short = format_rows(rows, "text", llama3, config)
    (whole, _) = text_tokens(rows, llama3)
    assert [record["truncated"] for record in long.records] == [True, True, False]
    assert [token for record in long.records for token in record["input_ids"]] == whole.input_ids
    for record in (*long.records, *short.records):
        assert record["labels"] == record["input_ids"]
        assert record["prompt_tokens"] == 0
    assert long.records[-1]["input_ids"][-1] == short.records[-1]["input_ids"][-1] == llama3.eos_token_id
    assert {record["id"] for record in long.records} == {rows[0].id}
    assert (long.length, long.rejected, long.truncated) == (21, None, "")
    assert [record["truncated"] for record in short.records] == [False]


def test_pieces_of_equal_content_are_distinguished(llama3):
    """The last piece may have the tokens of another one: only the last one ends the text."""
    config = FormattingConfig(max_length=8)
    (row,) = format_rows([text("X" * 23)], "text", llama3, config)
    assert [record["truncated"] for record in row.records] == [True, True, False]


def formatted(tokenizer, folder, **splits):
    ledger = Ledger()
    count = sum(map(len, splits.values()))
    ledger.record("text", count, count)
    datasets = {name: rows_dataset([text(t) for t in texts], "text") for name, texts in splits.items()}
    config = FormattingConfig(max_length=8)
    return format_splits(datasets, "text", tokenizer, config, folder, ledger), ledger


def test_texts_are_counted_once_and_their_pieces_are_rows(llama3, tmp_path):
    (data, lengths), ledger = formatted(
        llama3, tmp_path, train=["XQZJ" * 5, "X", "it has <|eot_id|> in it"], validation=["Z"], test=["Q"]
    )
    assert {name: len(split) for name, split in data.items()} == {"train": 4, "validation": 1, "test": 1}
    assert (ledger.read["text"], ledger.kept["text"]) == (5, 4)
    assert ledger.by_reason("text") == {"special_token_in_text": 1}
    assert lengths.kept["train"].total() == 4
    assert lengths.all.total() == 4
    assert max(lengths.kept["train"]) <= 8


def test_a_report_has_samples_of_long_texts(llama3, tmp_path):
    (_, lengths), _ = formatted(llama3, tmp_path, train=["XQZJ" * 40] * 7, validation=["XQZJ" * 40], test=["Q"])
    assert Counter(name for name, _ in lengths.samples) == {"train": 5, "validation": 1, "test": 1}


def test_labels_of_texts_are_checked(llama3, tmp_path):
    (data, _), _ = formatted(llama3, tmp_path, train=["XQZJ" * 5], validation=["Z"], test=["Q"])
    check_labels(data, llama3, train_on_prompt=True)

    def without(change, number=1):
        rows = data["train"].to_list()
        change(rows[number])
        return DatasetDict(train=Dataset.from_list(rows), validation=data["validation"])

    def untrained(row):
        row["labels"] = [-100, *row["labels"][1:]]

    def another(row):
        row["labels"] = [row["labels"][0] + 1, *row["labels"][1:]]

    def without_end(row):
        row["input_ids"], row["labels"] = row["input_ids"][:-1], row["labels"][:-1]

    with pytest.raises(WorkError, match=r"Row 1 .* of the train split .* not all of its tokens are trained"):
        check_labels(without(untrained), llama3, train_on_prompt=True)
    with pytest.raises(WorkError, match="a label differs from the token at its position"):
        check_labels(without(another), llama3, train_on_prompt=True)
    with pytest.raises(WorkError, match="an answer does not end with the end-of-turn token"):
        check_labels(without(without_end, 2), llama3, train_on_prompt=True)
    # A piece whose text goes on has no end token.
    check_labels(without(without_end, 1), llama3, train_on_prompt=True)
