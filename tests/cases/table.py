"""Inputs of datasets and documents: comparisons of texts, damaged items, containers, formats and encodings."""

from __future__ import annotations

import json
import unicodedata

from llm_engineering.data.rows import words
from llm_engineering.evaluation.measures.observation import rouge_l
from tests.cases.case import CallCase, Case, DataCase, DocumentCase, lines, turns

QUESTIONS = {
    "Où se trouve la vieille forge de Brécy?": "Derrière l'église, près du pont de pierre.",
    "Which ferry leaves Norrhaven before sunrise?": "The mail boat, at a quarter to five.",
    "Wie heißt die höchste Mühle über dem Fluß?": "Man nennt sie die Krähenmühle.",
}
PAIR = {"prompt": "Who keeps the lighthouse?", "chosen": "Two sisters keep it.", "rejected": "I will not say."}
TALK = [
    "Is the harbour open?",
    "Yes, since noon.",
    "And the market?",
    "It opens at three.",
    "Who told you?",
    "The harbour master.",
]
ZERO_WIDTH = "\u200b\u2060\ufeff"


def rows() -> list[dict[str, str]]:
    """Three rows in the format alpaca."""
    return [{"instruction": question, "output": answer} for question, answer in QUESTIONS.items()]


def form(name: str, text: str) -> str:
    """A text in a Unicode form."""
    return unicodedata.normalize(name, text)


COMPARISON: list[Case] = [
    DataCase(
        "decomposed characters leak",
        "a.jsonl",
        lines(*rows()),
        "alpaca: 3 read, 3 kept, 3 leaked",
        against=form("NFD", lines(*rows())),
        before="alpaca: 3 read, 3 kept, 1 leaked",
    ),
    DataCase(
        "full-width letters leak",
        "a.jsonl",
        lines(*rows()),
        "alpaca: 3 read, 3 kept, 1 leaked",
        against=lines({"instruction": "Ｗｈｉｃｈ ferry leaves Norrhaven before sunrise?", "output": "None."}),
        before="alpaca: 3 read, 3 kept, 0 leaked",
    ),
    DataCase(
        "the recipe's format is that of an evaluation file that fits two",
        "a.jsonl",
        lines(*rows()),
        "alpaca: 3 read, 3 kept, 3 leaked",
        data={"format": "alpaca"},
        against=lines(*({**row, "messages": []} for row in rows())),
        before="refused",
    ),
    DataCase(
        "a row and its decomposed form are duplicates",
        "a.jsonl",
        lines(rows()[0]) + form("NFD", lines(rows()[0])) + lines(*rows()[1:]),
        "alpaca: 4 read, 3 kept, 1 near_duplicate",
        before="alpaca: 4 read, 4 kept",
    ),
    DataCase(
        "a pair repeats its prompt in another form",
        "a.jsonl",
        lines({"chosen": turns("Où est-il né?", "À Brécy."), "rejected": turns(form("NFD", "Où est-il né?"), "Loin.")}),
        "chosen-rejected: 1 read, 1 kept",
        before="chosen-rejected: 1 read, 0 kept, 1 different_prompts",
    ),
    CallCase(
        "vowel signs belong to their word in Hindi",
        lambda: words("हिन्दी की किताब"),
        "['हिन्दी', 'की', 'किताब']",
        before="['ह', 'न', 'द', 'क', 'क', 'त', 'ब']",
    ),
    CallCase("marks belong to their letter in Thai", lambda: words("ที่นี่"), "['ที่', 'นี่']", before="['ท', 'น']"),
    CallCase("ROUGE-L of words that differ in a vowel sign", lambda: rouge_l("कल", "काल"), "0.0"),
    CallCase("ROUGE-L of one text in two forms", lambda: rouge_l("größer", form("NFD", "größer")), "1.0", before="0.0"),
]

ITEMS: list[Case] = [
    DataCase(
        "an integer of 5,000 digits in one item",
        "a.json",
        f'[{lines(rows()[0])}, {{"n": {"7" * 5000}}}, {lines(rows()[1])}]',
        "alpaca: 3 read, 2 kept, 1 malformed",
        before="is not valid JSON: Exceeds the limit (4300 digits) for integer string conversion",
    ),
    DataCase(
        "deep nesting in one item",
        "a.json",
        f"[{lines(rows()[0])}, {'[' * 9000}{']' * 9000}, {lines(rows()[1])}]",
        "alpaca: 3 read, 2 kept, 1 malformed",
        before="is not valid JSON: maximum recursion depth exceeded",
    ),
    DataCase(
        "a long integer beside the rows",
        "a.json",
        f'{{"seed": {"7" * 5000}, "rows": {json.dumps(rows())}}}',
        "alpaca: 3 read, 3 kept",
        before="is not valid JSON: Exceeds the limit (4300 digits) for integer string conversion",
    ),
    DataCase(
        "a long integer in a line",
        "a.jsonl",
        lines(*rows()) + f'{{"n": {"7" * 5000}}}\n',
        "alpaca: 4 read, 3 kept, 1 malformed",
    ),
    DataCase(
        "half a character in a line",
        "a.jsonl",
        lines(*rows()) + '{"instruction": "\\ud83d", "output": "x"}\n',
        "alpaca: 4 read, 3 kept, 1 not_utf8",
    ),
]

EMPTY: list[Case] = [
    DataCase(
        "a prompt without a visible character",
        "a.jsonl",
        lines(*rows(), {"instruction": ZERO_WIDTH, "output": "x"}),
        "alpaca: 4 read, 3 kept, 1 empty_prompt",
        before="alpaca: 4 read, 4 kept",
    ),
    DataCase(
        "an answer without a visible character",
        "a.jsonl",
        lines(*rows(), {"instruction": "x", "output": ZERO_WIDTH}),
        "alpaca: 4 read, 3 kept, 1 empty_answer",
    ),
    DataCase(
        "a turn without a visible character",
        "a.jsonl",
        lines({"messages": turns("Who?", ZERO_WIDTH, "And?", "She.")}, {"messages": turns(*TALK)}),
        "messages: 2 read, 1 kept, 1 empty_turn",
        before="messages: 2 read, 1 kept, 1 empty_answer",
    ),
    DocumentCase(
        "a document without a visible character",
        {"a.txt": ZERO_WIDTH, "b.txt": "Text"},
        "1 read, 1 empty",
        before="2 read",
    ),
]

LENGTH: list[Case] = [
    DataCase(
        "the prompt of a pair is over-long",
        "a.jsonl",
        lines(PAIR, {**PAIR, "prompt": "Who? " * 90}),
        "prompt-chosen-rejected: 2 read, 1 kept, 1 over_long_prompt",
        formatting={"max_length": 64},
        before="prompt-chosen-rejected: 2 read, 1 kept, 1 no_trained_token",
    ),
    DataCase(
        "an answer is over-long",
        "a.jsonl",
        lines(*rows(), {"instruction": "Go on", "output": "and on " * 90}),
        "alpaca: 4 read, 3 kept, 1 over_long",
        formatting={"max_length": 96},
    ),
    DataCase(
        "the oldest turns are dropped",
        "a.jsonl",
        lines({"messages": turns("Well? " * 60, "So. " * 60, *TALK)}),
        "messages: 1 read, 1 kept, 1 oldest_turns_dropped",
        formatting={"max_length": 96, "over_long": "drop_oldest_turns"},
        before="the setting is unknown",
    ),
]

CONTAINERS: list[Case] = [
    DataCase(
        "a list in .jsonl",
        "a.jsonl",
        json.dumps(rows(), indent=1),
        "alpaca: 3 read, 3 kept",
        before="no row can be read: line 1 is malformed, Expecting value",
    ),
    DataCase(
        "a list on one line of .jsonl",
        "a.jsonl",
        json.dumps(rows()),
        "alpaca: 3 read, 3 kept",
        before="no row can be read: line 1 is malformed, expected an object, found list",
    ),
    DataCase(
        "objects of several lines",
        "a.jsonl",
        "\n".join(json.dumps(row, indent=1) for row in rows()),
        "alpaca: 3 read, 3 kept",
        before="no row can be read: line 1 is malformed, Expecting property name enclosed in double quotes",
    ),
    DataCase(
        "JSON lines in .json",
        "a.json",
        lines(*rows()),
        "alpaca: 3 read, 3 kept",
        before="is not valid JSON: extra data after the first value",
    ),
    DataCase(
        "a list of bare conversations",
        "a.json",
        json.dumps([turns(*TALK), turns("Who?", "She.")]),
        "messages: 2 read, 2 kept",
        before="no row can be read: [0] is malformed, expected an object, found list",
    ),
    DataCase(
        "records by their names",
        "a.json",
        json.dumps({"r1": rows()[0], "r2": rows()[1]}),
        "write the values as a list",
        before="it holds an object with 0 lists (none)",
    ),
    DataCase(
        "UTF-16 without a mark",
        "a.jsonl",
        lines(*rows()).encode("utf-16-le"),
        "alpaca: 3 read, 3 kept",
        before="no row can be read: line 1 is not_utf8, it contains bytes that are not UTF-8 text",
    ),
    DataCase(
        "UTF-16 table",
        "a.csv",
        "instruction\toutput\nWho?\tShe.\n".encode("utf-16"),
        "alpaca: 1 read, 1 kept",
        before="is in no known format",
    ),
    DataCase(
        "semicolons",
        "a.csv",
        '"instruction";"output"\n"Who, when?";"She; at noon."\n',
        "alpaca: 1 read, 1 kept",
        before="is not valid CSV: ',' expected after '\"'. Correct the file",
    ),
    DataCase(
        "tabs",
        "a.tsv",
        "instruction\toutput\nWho, when?\tShe.\n",
        "alpaca: 1 read, 1 kept",
        before="is in no known format (.tsv)",
    ),
    DataCase(
        "unnamed columns of a spreadsheet",
        "a.csv",
        "instruction,output,,\nWho?,She.,,\nWhen?,At noon.\n",
        "alpaca: 2 read, 2 kept",
        before="two columns have the same name (instruction, output, , )",
    ),
    DataCase(
        "two columns of one name",
        "a.csv",
        "instruction,output,output\nWho?,She.,He.\n",
        "two columns have the same name",
    ),
    DataCase(
        "NaN is null",
        "a.json",
        '[{"instruction": "Who?", "input": NaN, "output": "She."}, {"instruction": NaN, "output": "x"}]',
        "alpaca: 2 read, 1 kept, 1 null_value",
        before="alpaca: 2 read, 0 kept, 2 not_text",
    ),
]

HH = "\n\nHuman: Is the harbour open?\n\nAssistant: Yes.\n\nHuman: Since when?\n\nAssistant:"
CHATML = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns(*TALK))

FORMATS: list[Case] = [
    DataCase(
        "HH-RLHF",
        "a.jsonl",
        lines({"chosen": f"{HH} Since noon.", "rejected": f"{HH} Ask somebody else."}),
        "chosen-rejected: 1 read, 1 kept",
        before="chosen-rejected: 1 read, 0 kept, 1 no_prompt",
    ),
    DataCase(
        "HH-RLHF with a prompt",
        "a.jsonl",
        lines({"prompt": HH, "chosen": " Since noon.", "rejected": " Ask."}),
        "prompt-chosen-rejected: 1 read, 1 kept",
    ),
    DataCase(
        "OpenAI's preferences",
        "a.jsonl",
        lines(
            {
                "input": {"messages": turns("Who?")},
                "preferred_output": [{"role": "assistant", "content": "She."}],
                "non_preferred_output": [{"role": "assistant", "content": "No."}],
            }
        ),
        "openai-preference: 1 read, 1 kept",
        before="is in no known format",
    ),
    DataCase(
        "ranked answers",
        "a.json",
        json.dumps([{"instruction": "Who keeps it?", "output": ["Two sisters keep it.", "Somebody.", "No."]}]),
        "alpaca-preference: 2 read, 2 kept",
        before="alpaca: 1 read, 0 kept, 1 not_text",
    ),
    DataCase(
        "scored answers",
        "a.jsonl",
        lines({"prompt": "Who?", "responses": ["No.", "She, since May."], "scores": [2, 9]}),
        "prompt-chosen-rejected: 1 read, 1 kept",
        before="is in no known format",
    ),
    DataCase(
        "equal scores",
        "a.jsonl",
        lines(PAIR, {"prompt": "Who?", "responses": ["A", "B"], "scores": [1, 1]}),
        "prompt-chosen-rejected: 2 read, 1 kept, 1 equal_scores",
        before="prompt-chosen-rejected: 2 read, 1 kept, 1 malformed",
    ),
    DataCase(
        "several rejected answers",
        "a.jsonl",
        lines({**PAIR, "rejected": ["I will not say.", "Nobody."]}),
        "prompt-chosen-rejected: 2 read, 2 kept",
        before="prompt-chosen-rejected: 1 read, 0 kept, 1 malformed",
    ),
    DataCase(
        "one answer that is JSON",
        "a.jsonl",
        lines({"instruction": "Sort b, a", "output": '["a", "b"]'}),
        "alpaca: 1 read, 1 kept",
    ),
    DataCase(
        "ChatML as text",
        "a.jsonl",
        lines({"text": CHATML}),
        "text-chatml: 1 read, 1 kept",
        before="is in no known format",
    ),
    DataCase(
        "text around ChatML",
        "a.jsonl",
        lines({"text": CHATML}, {"text": f"Look: {CHATML}"}),
        "text-chatml: 2 read, 1 kept, 1 malformed",
        before="is in no known format",
    ),
    DataCase(
        "messages as JSON text in a table",
        "a.csv",
        'messages\n"' + json.dumps(turns(*TALK)).replace('"', '""') + '"\n',
        "messages: 1 read, 1 kept",
        before="messages: 1 read, 0 kept, 1 malformed",
    ),
    DataCase(
        "messages as Python text",
        "a.csv",
        "messages\n\"[{'role': 'user', 'content': 'Who?'}]\"\n"
        + '"'
        + json.dumps(turns(*TALK)).replace('"', '""')
        + '"\n',
        "messages: 2 read, 1 kept, 1 malformed",
        before="messages: 2 read, 0 kept, 2 malformed",
    ),
]

DOCUMENTS: list[Case] = [
    DocumentCase(
        "UTF-16 documents",
        {"a.txt": "Grüße".encode("utf-16"), "b.md": "Grüße".encode("utf-16-be")},
        "2 read",
        before="no document can be read: not_utf8",
    ),
    DocumentCase(
        "a declared charset",
        {"a.html": "<meta charset=iso-8859-1><p>Grüße".encode("latin-1")},
        "1 read",
        before="no document can be read: not_utf8",
    ),
    DocumentCase(
        "a charset that is not the declared one",
        {"a.html": "<meta charset=utf-8><p>Grüße".encode("latin-1"), "b.txt": "x"},
        "1 read, 1 not_utf8",
    ),
    DocumentCase("a link to nothing", {"a.txt": "Text", "b.txt": None}, "1 read, 1 broken_link", before="1 read"),
    DocumentCase(
        "a text in an object",
        {"a.json": json.dumps([{"page": {"body": "Text"}}])},
        "1 read",
        text_field="page.body",
        before="no document can be read: no_text_field",
    ),
    DocumentCase(
        "a text in an object without its path",
        {"a.json": json.dumps([{"page": {"body": "Text"}}])},
        "set documents.text_field to page.body",
        before="no document can be read: no_text_field",
    ),
]

INPUTS: list[Case] = [*COMPARISON, *ITEMS, *EMPTY, *LENGTH, *CONTAINERS, *FORMATS, *DOCUMENTS]
