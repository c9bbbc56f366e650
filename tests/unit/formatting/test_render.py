"""Labels against token ids written out by hand: only the completion and its end-of-turn token are trained."""

import copy

import pytest

from llm_engineering.data.ledger import Ledger
from llm_engineering.data.rows import InstructionRow, Message, PreferenceRow
from llm_engineering.data.storage import rows_dataset
from llm_engineering.errors import WorkError
from llm_engineering.evaluation.heldout import held_out
from llm_engineering.formatting import render as rendering
from llm_engineering.formatting.datasets import format_rows, format_splits
from llm_engineering.formatting.render import UnrenderableError, render
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


APPENDS = "{% for m in messages %}{{ (m.content) + '<|im_end|>' }}{% endfor %}"


def with_template(tokenizer, template):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


@pytest.mark.parametrize(
    ("template", "reason", "words"),
    [
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "no_end_of_turn", "does not end"),
        ("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}", "no_end_of_turn", "does not end"),
        ("{{ messages | length }}" + APPENDS, "template_changes_prompt", "only appends"),
        ("{{ messages[1].content }}" + APPENDS, "template_error", "has no element 1"),
        ("{{ 'a' + none }}" + APPENDS, "template_error", "the chat template says"),
        ("{{ raise_exception('No systems here') }}", "template_error", "No systems here"),
        (APPENDS.replace("m.content", "m.content[:1]"), "template_drops_text", "a part of its answer"),
        (
            "{% for m in messages if m.role == 'assistant' %}{{ m.content + '<|im_end|>' }}{% endfor %}",
            "template_drops_text",
            "its user text",
        ),
    ],
)
def test_a_row_that_the_template_cannot_render_is_set_aside_with_its_words(tokenizer, template, reason, words):
    one = row([message("user", "Hello")], [message("assistant", "Hi there")])
    (found,) = format_rows([one], "instruction", with_template(tokenizer, template), FormattingConfig(max_length=64))
    assert (found.rejected.reason, found.rejected.source) == (reason, "file:line 7")
    assert words in found.rejected.detail


def test_a_tokenizer_without_a_template_is_an_error(tokenizer):
    with pytest.raises(WorkError, match="has no chat template"):
        render_one(row([message("user", "Hello")], [message("assistant", "Hi")]), with_template(tokenizer, None))


def test_an_answer_of_weight_0_is_in_the_input_and_not_trained(tokenizer):
    wrong = Message(role="assistant", content="No", weight=0)
    completion = [
        message("assistant", "Hi"),
        message("user", "Bye"),
        wrong,
        message("user", "No"),
        message("assistant", "Bye"),
    ]
    tokens = render_one(row([message("user", "Hello")], completion), tokenizer)
    trained = [label for label in tokens.labels if label != -100]
    assert trained == HI + END + BYE + END
    text = tokenizer.decode(tokens.input_ids)
    assert text.count("<|im_start|>assistant\nNo<|im_end|>") == 1


# As Qwen3 does it: the reasoning is in the last answer only.
THINKS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.last %}"
    "{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As DeepSeek-R1 does it: the prompt opens the reasoning, and the template leaves it out of every answer.
OPENS = (
    THINKS.replace("and loop.last", "and false")
    .replace("m.content +", "m.content.split('</think>')[-1] +")
    .replace("'<|im_start|>assistant\n' }}", "'<|im_start|>assistant\n<think>\n' }}")
)


def test_answers_that_the_template_renders_differently_later_become_rows_of_their_own(tokenizer):
    thinks = with_template(tokenizer, THINKS)
    thought = Message(role="assistant", content="Bye", reasoning_content="A farewell.")
    several = row([message("user", "Hello")], [message("assistant", "Hi"), message("user", "No"), thought])
    (found,) = format_rows([several], "instruction", thinks, FormattingConfig(max_length=64))
    texts = [tokenizer.decode(record["input_ids"][: record["prompt_tokens"]]) for record in found.records]
    asked = [m.model_dump(include={"role", "content"}) for m in [*several.prompt, *several.completion]]
    assert texts == [
        thinks.apply_chat_template(asked[:count], add_generation_prompt=True, tokenize=False) for count in (1, 3)
    ]
    answers = [tokenizer.decode(record["input_ids"][record["prompt_tokens"] :]) for record in found.records]
    assert answers == ["<think>\n\n</think>\n\nHi<|im_end|>", "<think>\nA farewell.\n</think>\n\nBye<|im_end|>"]
    # Only the second prompt is too long.
    length = found.records[0]["input_ids"]
    cut = FormattingConfig(max_length=len(length) + 1, over_long="truncate")
    (first,) = format_rows([several], "instruction", thinks, cut)
    assert (len(first.records), "1 of its answers" in first.truncated) == (1, True)
    (dropped,) = format_rows([several], "instruction", thinks, FormattingConfig(max_length=len(length) + 1))
    assert dropped.records == []


def test_each_held_out_answer_has_the_prompt_that_it_was_rendered_with(tokenizer, tmp_path):
    completion = [message("assistant", "Hi"), message("user", "No"), message("assistant", "Bye")]
    rows = rows_dataset(
        [row([message("user", "Hello")], completion), row([message("user", "No")], completion[:1])], "instruction"
    )
    ledger = Ledger()
    ledger.record("instruction", 2, 2)
    thinks = with_template(tokenizer, THINKS)
    config = FormattingConfig(max_length=64)
    formatted, _ = format_splits({"test": rows}, "instruction", thinks, config, tmp_path, ledger)
    found = held_out({"instruction": formatted["test"]}, {"instruction": rows}).rows
    assert [one.row.prompt[-1].content for one in found] == ["Hello", "No", "No"]
    # The answers of one conversation are one cluster.
    assert (found[0].row.document == found[1].row.document != "", found[2].row.document) == (True, "")
    assert ledger.kept["instruction"] == 2


@pytest.mark.parametrize("content", ["Hi", "<think>\nA greeting.\n</think>\n\nHi"])
def test_an_answer_ends_the_reasoning_that_the_prompt_opened(tokenizer, content):
    opens = with_template(tokenizer, OPENS)
    tokens = render_one(row([message("user", "Hello")], [message("assistant", content)]), opens)
    start = tokens.labels.index(next(label for label in tokens.labels if label != -100))
    assert tokenizer.decode(tokens.input_ids[:start]).endswith("assistant\n<think>\n")
    thought = "A greeting." if "greeting" in content else ""
    assert tokenizer.decode(tokens.input_ids[start:]) == f"{thought}\n</think>\n\nHi<|im_end|>"


def test_reasoning_that_the_template_leaves_out_is_not_dropped(tokenizer):
    thought = Message(role="assistant", content="Hi", reasoning_content="A greeting.")
    found = render_one(row([message("user", "Hello")], [thought]), tokenizer)
    assert (found.reason, "reasoning" in str(found)) == ("template_drops_text", True)


def test_later_turns_of_a_conversation_that_is_too_long_are_not_rendered(tokenizer, monkeypatch):
    applied = []
    apply = rendering._apply
    monkeypatch.setattr(rendering, "_apply", lambda *args, **named: applied.append(args) or apply(*args, **named))
    many = [message("assistant" if number % 2 else "user", f"Turn {number}") for number in range(400)]
    long = row(many[:1], many[1:])

    def work(max_length, over_long="drop"):
        """The turns that all renders together go through."""
        applied.clear()
        (found,) = format_rows(
            [long], "instruction", tokenizer, FormattingConfig(max_length=max_length, over_long=over_long)
        )
        return sum(len(arguments[1]) for arguments in applied), found

    turns, found = work(128)
    assert found.rejected.reason == "over_long"
    assert "at least" in found.rejected.detail
    # 13 and 107 messages fill the lengths, that of the template included. To label all 400, the renders would go through 400 × 400 / 2 turns together. Tokens are
    # counted when the text is half as long again, so more turns are rendered than fit.
    assert turns < 2 * 13**2
    assert work(1024)[0] < 2 * 107**2
    cut, found = work(128, "truncate")
    assert found.records
    assert cut == turns
    # The number of exchanges to drop is found by bisection among 199.
    shortened, found = work(512, "drop_oldest_turns")
    assert len(found.records[0]["input_ids"]) <= 512
    assert found.rule == "oldest_turns_dropped"
    assert shortened <= 9 * work(512, "truncate")[0]


def test_answers_whose_white_space_the_template_changes_are_counted(tokenizer):
    trims = with_template(tokenizer, APPENDS.replace("m.content", "m.content | trim"))
    rows = [row([message("user", "Hello")], [message("assistant", text)]) for text in ("    return x\n", "return x")]
    found = format_rows(rows, "instruction", trims, FormattingConfig(max_length=64))
    assert [f.respaced for f in found] == [True, False]
    assert not any(f.respaced for f in format_rows(rows, "instruction", tokenizer, FormattingConfig(max_length=64)))
    first = [message("user", "1 " * 100), message("assistant", "y")]
    longer = row([*first, *rows[0].prompt], rows[0].completion)
    config = FormattingConfig(max_length=64, over_long="drop_oldest_turns")
    (shortened,) = format_rows([longer], "instruction", trims, config)
    assert (shortened.rule, shortened.respaced) == ("oldest_turns_dropped", True)


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
    assert isinstance(crossing, UnrenderableError)
    (formatted, aside) = format_rows(rows, "instruction", tokenizer, FormattingConfig(max_length=64))
    assert formatted.rejected is None
    assert aside.rejected.reason == "crossing_tokens"


def test_the_wrong_end_token_of_the_packaged_tokenizer_would_be_noticed(tokenizer):
    wrong = copy.deepcopy(tokenizer)
    wrong.eos_token = "<|im_start|>"
    found = render_one(row([message("user", "Hello")], [message("assistant", "Hi")]), wrong)
    assert found.reason == "no_end_of_turn"


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


@pytest.mark.parametrize(
    ("asked", "answer", "spelt"),
    [
        ("Hello <|user|>", "Hi", "<|user|>"),
        ("Hello", "Hi <|user|>", "<|user|>"),
        ("Hello <begin_turn>", "Hi", "<begin_turn>"),
        ("Hello <think>", "Hi", "<think>"),
        ("Hello", "<think>Hi</think>Hi", ""),
        ("Hello <table>\n\nglycolysis", "Hi <table>\n\nglycolysis", ""),
    ],
)
def test_added_tokens_that_are_not_marked_as_special_are_control_tokens_if_they_look_like_it_or_the_template_writes_them(
    tokenizer, asked, answer, spelt
):
    template = str(tokenizer.chat_template) + "{# <begin_turn> <think> </think> #}"
    added = with_template(tokenizer, template)
    added.add_tokens(["<|user|>", "<begin_turn>", "<think>", "</think>", "<table>", "\n\n", "glycolysis"])
    one = row([message("user", asked)], [message("assistant", answer)])
    (found,) = format_rows([one], "instruction", added, FormattingConfig(max_length=64))
    assert found.rejected is None if not spelt else f"spells {spelt}," in found.rejected.detail


def test_splits_are_formatted_to_files_and_their_rows_accounted_for(tokenizer, tmp_path):
    rows = [row([message("user", f"Hello {i}")], [message("assistant", "Hi")]) for i in range(6)]
    rows.append(row([message("user", "Hello")], [message("assistant", "long " * 90)]))
    ledger = Ledger()
    ledger.record("instruction", 7, 7)
    splits = {"train": rows[:3] + rows[6:], "validation": rows[3:5], "test": rows[5:6]}
    formatted, lengths = format_splits(
        {name: rows_dataset(part, "instruction") for name, part in splits.items()},
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


def test_no_rows_render_to_none(tokenizer):
    assert render([], tokenizer) == []
