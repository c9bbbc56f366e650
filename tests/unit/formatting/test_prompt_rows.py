"""Prompts as token ids: those that evaluation and serving use."""

import pytest

from llm_engineering.data.rows import Message, PromptRow
from llm_engineering.errors import RequestError, WorkError
from llm_engineering.formatting.datasets import Lengths, format_rows
from llm_engineering.formatting.prompt_rows import check_accepted
from llm_engineering.formatting.render import prompt_ids
from llm_engineering.recipe.data_blocks import FormattingConfig
from tests.tiny_models import KINDS, tiny_tokenizer

TEMPLATE = KINDS["qwen3"].template


def asks(*texts, accepted=("5",)):
    roles = ["user", "assistant"]
    prompt = [Message(role=roles[number % 2], content=text) for number, text in enumerate(texts)]
    return PromptRow(prompt=prompt, answers=list(accepted), source="s", origin="o")


def formatted(*rows, template=TEMPLATE, **keys):
    tokenizer = tiny_tokenizer(KINDS["qwen3"].tokens, template)
    return list(format_rows(rows, "prompt", tokenizer, FormattingConfig(**keys)))


def test_a_prompt_has_the_tokens_of_evaluation_its_messages_and_its_answers():
    row = asks("Hi", "Yo", "How many?", accepted=("5", "five"))
    ((record,),) = [one.records for one in formatted(row)]
    tokenizer = tiny_tokenizer(KINDS["qwen3"].tokens, TEMPLATE)
    assert record["prompt_ids"] == prompt_ids(row.prompt, tokenizer)
    assert tokenizer.decode(record["prompt_ids"]).endswith("<|im_start|>assistant\n")
    assert [turn["content"] for turn in record["prompt"]] == ["Hi", "Yo", "How many?"]
    assert (record["id"], record["answers"], record["truncated"]) == (row.id, ["5", "five"], False)


@pytest.mark.parametrize("over_long", ["drop", "truncate", "drop_oldest_turns"])
def test_an_over_long_prompt_is_set_aside_and_never_cut(over_long):
    short, long = formatted(asks("Hi"), asks("Hi", "Yo", "x" * 80), max_length=64, over_long=over_long)
    assert short.rejected is None
    assert (long.rejected.reason, long.records) == ("over_long_prompt", [])


def test_an_over_long_prompt_ends_a_run_that_says_so():
    with pytest.raises(WorkError, match="over-long: its prompt alone has"):
        formatted(asks("x" * 80), max_length=64, over_long="raise")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ messages[-1].content }}", "template_drops_text"),
        ("{{ raise_exception('no history') }}", "template_error"),
    ],
)
def test_a_prompt_that_the_template_cannot_render_is_set_aside(template, reason):
    (row,) = formatted(asks("First words", "Yo", "How many?"), template=template)
    assert row.rejected.reason == reason


def test_a_prompt_that_spells_a_control_token_is_set_aside():
    (row,) = formatted(asks("Hi<|im_end|>"))
    assert row.rejected.reason == "special_token_in_text"


def test_lengths_count_the_tokens_and_turns_of_prompts(settings):
    lengths, (row,) = Lengths(), formatted(asks("Hi", "Yo", "How many?"))
    lengths.add("train", row)
    assert lengths.turns == {3: 1}
    assert lengths.trained["prompts"].tokens == len(row.records[0]["prompt_ids"])


def test_rewards_that_compare_need_an_accepted_answer_in_every_split():
    rows = {"train": {"answers": [["5"], []]}, "test": {"answers": [[], []]}}
    check_accepted(rows, [])
    check_accepted({"train": rows["train"]}, ["exact_answer"])
    with pytest.raises(
        RequestError, match="The rewards exact_answer and contains compare .* no prompt of the test split"
    ):
        check_accepted(rows, ["exact_answer", "contains"])
