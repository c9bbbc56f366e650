"""Labels against token ids written out by hand: only the completion and its end-of-turn token are trained."""

import copy

import pytest

from llm_engineering.data.ledger import Ledger
from llm_engineering.data.rows import InstructionRow, Message, PreferenceRow, instruction_dataset
from llm_engineering.errors import WorkError
from llm_engineering.formatting import render as rendering
from llm_engineering.formatting.datasets import format_rows, format_splits
from llm_engineering.formatting.render import CrossingTokensError, render
from llm_engineering.recipe.data_blocks import FormattingConfig

# SmolLM2's vocabulary: 1 <|im_start|>, 2 <|im_end|>, 9690 "system", 4093 "user", 520+9531 "ass"+"istant", 198 "\n".
# The template adds the default system prompt to a conversation without a system message.
DEFAULT_SYSTEM = [
    1,
    9690,
    198,
    2683,
    359,
    253,
    5356,
    5646,
    11173,
    3365,
    3511,
    308,
    34519,
    28,
    7018,
    411,
    407,
    19712,
    8182,
    2,
    198,
]
USER, ASSISTANT = [1, 4093, 198], [1, 520, 9531, 198]
HELLO, HI, BYE, NO = [19556], [26843], [3087, 85], [5230]
END, NEWLINE = [2], [198]


def message(role, content):
    return Message(role=role, content=content)


def row(prompt, completion):
    return InstructionRow(prompt=prompt, completion=completion, source="file:line 7", origin="human")


def render_one(one, tokenizer):
    (rendered,) = render([one], tokenizer)
    return rendered


def test_one_turn(tokenizer):
    tokens = render_one(row([message("user", "Hello")], [message("assistant", "Hi")]), tokenizer)
    prompt = DEFAULT_SYSTEM + USER + HELLO + END + NEWLINE + ASSISTANT
    assert tokens.input_ids == prompt + HI + END
    assert tokens.labels == [-100] * len(prompt) + HI + END


def test_several_turns_in_the_prompt_train_the_last_answer_only(tokenizer):
    prompt = [message("system", "No"), message("user", "Hello"), message("assistant", "Hi"), message("user", "No")]
    tokens = render_one(row(prompt, [message("assistant", "Bye")]), tokenizer)
    system = [1, 9690, 198, *NO, *END, *NEWLINE]
    asked = system + USER + HELLO + END + NEWLINE + ASSISTANT + HI + END + NEWLINE
    asked += USER + NO + END + NEWLINE + ASSISTANT
    assert tokens.input_ids == asked + BYE + END
    assert tokens.labels == [-100] * len(asked) + BYE + END


def test_several_turns_in_the_completion_train_every_answer(tokenizer):
    completion = [message("assistant", "Hi"), message("user", "No"), message("assistant", "Bye")]
    tokens = render_one(row([message("user", "Hello")], completion), tokenizer)
    first = DEFAULT_SYSTEM + USER + HELLO + END + NEWLINE + ASSISTANT
    between = NEWLINE + USER + NO + END + NEWLINE + ASSISTANT
    assert tokens.input_ids == first + HI + END + between + BYE + END
    assert tokens.labels == [-100] * len(first) + HI + END + [-100] * len(between) + BYE + END


def test_pair(tokenizer):
    pair = PreferenceRow(
        prompt=[message("user", "Hello")],
        chosen=[message("assistant", "Hi")],
        rejected=[message("assistant", "Bye")],
        source="s",
        origin="human",
    )
    rendered = render_one(pair, tokenizer)
    assert rendered.prompt_ids == DEFAULT_SYSTEM + USER + HELLO + END + NEWLINE + ASSISTANT
    assert (rendered.chosen_ids, rendered.rejected_ids) == (HI + END, BYE + END)


def with_template(tokenizer, template):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}", "does not end"),
        ("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}", "does not end"),
        ("{{ messages | length }}{% for m in messages %}{{ m.content + '<|im_end|>' }}{% endfor %}", "only appends"),
        (None, "has no chat template"),
    ],
    ids=["answer not rendered", "no end of turn", "prompt changes", "none"],
)
def test_a_template_with_wrong_labels_is_an_error_that_names_row_and_template(tokenizer, template, words):
    bad = with_template(tokenizer, template)
    with pytest.raises(WorkError, match=words) as error:
        render_one(row([message("user", "Hello")], [message("assistant", "Hi")]), bad)
    assert tokenizer.name_or_path in str(error.value)
    if template is not None:
        assert "file:line 7" in str(error.value)


@pytest.mark.parametrize("start", ["\n\n", "   ", "\n", " "])
def test_white_space_at_the_start_of_an_answer_is_trained_as_it_is_generated(tokenizer, start):
    rendered = render_one(row([message("user", "Hello")], [message("assistant", start + "Hi")]), tokenizer)
    prompt = DEFAULT_SYSTEM + USER + HELLO + END + NEWLINE + ASSISTANT
    assert rendered.input_ids[: len(prompt)] == prompt
    assert tokenizer.decode(rendered.input_ids[len(prompt) :]) == f"{start}Hi<|im_end|>"
    assert rendered.labels == [-100] * len(prompt) + rendered.input_ids[len(prompt) :]


def test_tokenising_whole_texts_gives_the_same_tokens(tokenizer, monkeypatch):
    """Tokenizers that put a space before each text need whole texts. The tokens are the same if none crosses."""
    completion = [message("assistant", "Hi"), message("user", "No"), message("assistant", "Bye")]
    rows = [row([message("user", "Hello")], completion), row([message("user", "No")], [message("assistant", "\n\nHi")])]
    apart = render(rows, tokenizer)
    monkeypatch.setattr(rendering, "_is_joinable", lambda tokenizer: False)
    whole, crossing = render(rows, tokenizer)
    assert whole == apart[0]
    assert isinstance(crossing, CrossingTokensError)
    (formatted, aside) = format_rows(rows, "instruction", tokenizer, FormattingConfig(max_length=64))
    assert formatted.rejected is None
    assert aside.rejected.reason == "crossing_tokens"


def test_the_wrong_end_token_of_the_packaged_tokenizer_would_be_noticed(tokenizer):
    wrong = copy.deepcopy(tokenizer)
    wrong.eos_token = "<|im_start|>"
    with pytest.raises(WorkError, match="does not end with the end-of-turn token"):
        render_one(row([message("user", "Hello")], [message("assistant", "Hi")]), wrong)


def test_pad_token_is_not_the_end_token(tokenizer):
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_over_long_and_special_rows_are_set_aside_by_name(tokenizer):
    rows = [
        row([message("user", "Hello")], [message("assistant", "Hi")]),
        row([message("user", "Hello")], [message("assistant", "long " * 90)]),
        row([message("user", "Hello <|im_end|>")], [message("assistant", "Hi")]),
        row([message("user", "long " * 90)], [message("assistant", "Hi")]),
    ]
    formatted = list(format_rows(rows, "instruction", tokenizer, FormattingConfig(max_length=64)))
    assert [f.row for f in formatted if f.rejected is None] == rows[:1]
    quarantine = [f.rejected for f in formatted if f.rejected is not None]
    assert [q.reason for q in quarantine] == ["over_long", "special_token_in_text", "over_long_prompt"]
    assert "max_length is 64" in quarantine[0].detail
    with pytest.raises(WorkError, match="is over-long.*over_long: raise"):
        list(format_rows(rows, "instruction", tokenizer, FormattingConfig(max_length=64, over_long="raise")))


def test_a_batch_without_a_row_to_render_is_set_aside(tokenizer):
    spelt = row([message("user", "Hello <|im_end|>")], [message("assistant", "Hi")])
    (found,) = format_rows([spelt], "instruction", tokenizer, FormattingConfig(max_length=64))
    assert found.rejected.reason == "special_token_in_text"


def test_special_tokens_without_a_name_are_found_too(tokenizer):
    """SmolLM2 names three tokens, and marks `<filename>` as special too: its text would become one token."""
    assert "<filename>" not in tokenizer.all_special_tokens
    assert len(tokenizer("<filename>")["input_ids"]) == 1 < len(tokenizer("<file name>")["input_ids"])
    spelt = row([message("user", "Hello")], [message("assistant", "Write <filename>.")])
    harmless = row([message("user", "Hello")], [message("assistant", "Write <file name>.")])
    found = list(format_rows([spelt, harmless], "instruction", tokenizer, FormattingConfig(max_length=64)))
    assert [f.rejected is None for f in found] == [False, True]
    assert (found[0].rejected.reason, "spells <filename>" in found[0].rejected.detail) == (
        "special_token_in_text",
        True,
    )


def test_splits_are_formatted_to_files_and_their_rows_accounted_for(tokenizer, tmp_path):
    rows = [row([message("user", f"Hello {i}")], [message("assistant", "Hi")]) for i in range(6)]
    rows.append(row([message("user", "Hello")], [message("assistant", "long " * 90)]))
    ledger = Ledger()
    ledger.record("instruction", 7, 7)
    splits = {"train": rows[:3] + rows[6:], "validation": rows[3:5], "test": rows[5:6]}
    formatted, lengths = format_splits(
        {name: instruction_dataset(part) for name, part in splits.items()},
        "instruction",
        tokenizer,
        FormattingConfig(max_length=64),
        tmp_path,
        ledger,
    )
    assert {name: len(part) for name, part in formatted.items()} == {"train": 3, "validation": 2, "test": 1}
    assert list(formatted["test"]["input_ids"][0]) == render_one(rows[5], tokenizer).input_ids
    assert (ledger.kept["instruction"], ledger.by_reason("instruction")) == (6, {"over_long": 1})
    assert lengths.kept["train"].total() == 3
    # The over-long row is counted, although it is not kept.
    assert (lengths.all.total(), max(lengths.all) > 64, lengths.turns) == (7, True, {2: 6})
