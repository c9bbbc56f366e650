"""Personal data and secrets: what is found, what is not, and that masks and details hide it."""

import random

import phonenumbers
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_engineering.data import private
from llm_engineering.data.private import masked, personal_data, redacted, secrets
from llm_engineering.data.row_rules import check_row
from llm_engineering.data.rows import InstructionRow, Message, PreferenceRow
from llm_engineering.recipe.data_blocks import RulesConfig

RANDOM = random.Random(7)
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"


def token(length: int, alphabet: str = LETTERS) -> str:
    # Generated here, so that a secret scanner finds no example in this repository.
    return "".join(RANDOM.choice(alphabet) for _ in range(length))


KEY_LINES = "\n".join(token(64) for _ in range(3))
LOWER_HEX = "0123456789abcdef"
SECRETS = {
    "AWS id": "AKIA" + token(16, "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"),
    "AWS key": token(40),
    "GitHub": "ghp_" + token(36),
    "GitHub, fine-grained": "github_pat_" + token(60),
    "GitLab": "glpat-" + token(20),
    "Google": "AIza" + token(35),
    "Hugging Face": "hf_" + token(34),
    "npm": "npm_" + token(36),
    "two key blocks": f"-----BEGIN PRIVATE KEY-----\n{KEY_LINES}\n-----BEGIN PRIVATE KEY-----\n{KEY_LINES}\n-----END PRIVATE KEY-----",
    "OpenAI, old": "sk-" + token(20) + "T3BlbkFJ" + token(20),
    "OpenAI": "sk-proj-" + token(60),
    "Anthropic": "sk-ant-api03-" + token(80),
    "Slack": "xoxb-" + token(12, "0123456789") + "-" + token(24, "abcdefghij0123456789"),
    "Stripe": "sk_live_" + token(24),
    "SendGrid": "SG." + token(22) + "." + token(43),
    "Telegram": token(9, "123456789") + ":" + token(35),
    "Twilio": "SK" + token(32, "abcdefghijklmnop0123456789"),
    "JWT": "eyJhbGciOiJIUzI1NiJ9.eyJ1c2VyIjoiYW5uLmxlZSJ9." + token(43),
    "key block": f"-----BEGIN RSA PRIVATE KEY-----\n{KEY_LINES}\n-----END RSA PRIVATE KEY-----",
    "key block without an end": f"-----BEGIN PRIVATE KEY-----\n{KEY_LINES}",
    "password in a URL": "hunter2horse",
}
AROUND = {"AWS key": ("aws_secret_key = '", "'"), "password in a URL": ("postgres://ann:", "@db.firma.de/x")}


@pytest.mark.parametrize("kind", SECRETS)
def test_secrets_are_masked_whole_and_the_text_around_them_is_kept(kind):
    before, after = AROUND.get(kind, ("Use this: ", "" if kind == "key block without an end" else " from now on."))
    found = secrets(before + SECRETS[kind] + after)
    assert len(found) == (2 if kind == "two key blocks" else 1)
    assert masked(before + SECRETS[kind] + after, found) == before + "[SECRET]" * len(found) + after


@pytest.mark.parametrize(
    "text",
    [
        "ghp_" + "x" * 36,
        "export AWS_ACCESS_KEY_ID=AKIAIOSFODNN7EXAMPLE",
        "sha256: " + token(64, LOWER_HEX),
        "commit " + token(40, LOWER_HEX),
        "id = '123e4567-e89b-12d3-a456-426614174000'",
        'password = "password"',
        "postgres://user:password@localhost:5432/db",
        "https://admin:${PASSWORD}@host.org",
        "https://<user>:<pass>@host.org",
        "ftp://anonymous:anonymous@host.org",
        "http://localhost:8080/@angular/core",
        "The file begins with -----BEGIN RSA PRIVATE KEY----- and ends with -----END RSA PRIVATE KEY-----.",
        "data:image/png;base64," + token(100),
        "x" + "AKIA" + "QWERTYUIOPASDF23" + "4",
        "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiIxMjM0NTY3ODkwIiwibmFtZSI6IkpvaG4gRG9lIn0." + token(43),
        "Die ACHTUNDZWANZIG Aufgaben: 12345678:00",
        "Sk8er und Ähnliches：https://例え.jp/路径",
    ],
)
def test_placeholders_and_digests_are_no_secrets(text):
    assert secrets(text) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Write to ann.lee@firma.de.", "Write to [EMAIL]."),
        ("mailto:ann+news@mail.firma.co.uk?subject=x", "mailto:[EMAIL]?subject=x"),
        ("<ann_lee@firma.de>, ben@firma.de", "<[EMAIL]>, [EMAIL]"),
        ("写信给ann@firma.com吧", "写信给[EMAIL]吧"),
        ("Schreib an müller@bücher.de!", "Schreib an [EMAIL]!"),
        ("https://x.org/?to=ann@firma.de", "https://x.org/?to=[EMAIL]"),
        ("Ring +49 30 901820 today.", "Ring [PHONE] today."),
        ("tel:+41446681800", "tel:[PHONE]"),
        ("Tél. : +33 1 42 68 53 00", "Tél. : [PHONE]"),
        ("電話 +81 3-3224-9999。", "電話 [PHONE]。"),
        ("電話+81 3-3224-9999。", "電話[PHONE]。"),
        ("+1 (212) 736-5000 or +12127365000", "[PHONE] or [PHONE]"),
        ("Call (212) 736-5000 or 212-736-5000.", "Call [PHONE] or [PHONE]."),
        ("Call 1-212-736-5000, ann@firma.de", "Call [PHONE], [EMAIL]"),
    ],
)
def test_addresses_and_numbers_are_masked(text, expected):
    assert masked(text, personal_data(text)) == expected
    assert personal_data(expected) == []


@pytest.mark.parametrize(
    "text",
    [
        "user@example.com or jane@mail.example.org",
        "git clone git@github.com:owner/name.git",
        "logo@2x.png",
        "npm install vue@3.2.1",
        "@property\ndef x(self): ...",
        "A @ B, a@b",
        "https://medium.com/@ann",
        "postgres://ann:word@db.firma.de",
        "+ 41446681800 = x",
        "2 + 3 + 4567890 = 4567895",
        "0.5x+14155552671",
        "Order 2127365000 of 2024-05-17 12:30:00",
        "My number is 123-456-7890 or (555) 555-1234.",
        "030 901820",
        "ISBN 978-3-16-148410-0, 4111 1111 1111 1111",
        "C++11 and C++ 2017",
        "价格上涨了+12%，共1234567元",
    ],
)
def test_text_that_identifies_nobody_is_kept(text):
    assert personal_data(text) == []


@settings(max_examples=400, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [
                *"+＋ 0123456789()-./x=*\n٣４",
                "+49",
                " 30 ",
                "901820",
                "212",
                "555-",
                "+1 ",
                "ext. 5",
                "ー",
                "年",
                "\u00a0",
            ]
        ),
        max_size=24,
    ).map("".join)
)
def test_the_quick_search_misses_no_telephone_number(text):
    every = [match.raw_string for match in phonenumbers.PhoneNumberMatcher(text, None)]
    assert all(private._INTERNATIONAL.search(raw) for raw in every)
    by_line = [m.raw_string for line in text.split("\n") for m in phonenumbers.PhoneNumberMatcher(line, None)]
    assert by_line == every


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.one_of(st.sampled_from([*SECRETS.values(), "AW\u017f key '", "\u212a", "'", " "]), st.text(max_size=4)),
        max_size=6,
    )
)
def test_every_match_of_a_pattern_holds_one_of_its_marks(pieces):
    text = "".join(pieces)
    for place, credential in enumerate(private._CREDENTIALS):
        if credential.pattern.search(text):
            seen = [at for mark, at in private._MARKS if mark in text]
            seen += [at for mark, at in private._FOLDED_MARKS if mark in text.casefold()]
            assert place in seen


PRIVATE = [*SECRETS.values(), "ann.lee@firma.de", "+49 30 901820", "(212) 736-5000"]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from(PRIVATE), min_size=1, max_size=3, unique=True),
    st.sampled_from(
        ["Say {}", "I'm sorry, but I can't {}", "One of the most important things here is {} and the", "```\n{}"]
    ),
    st.sampled_from(["report", "mask", "drop"]),
)
def test_no_detail_holds_anything_private(values, frame, action):
    text = frame.format(
        " ; ".join(
            AROUND.get(kind, ("", ""))[0] + v + AROUND.get(kind, ("", ""))[1]
            for v in values
            for kind in [next((k for k, s in SECRETS.items() if s == v), "")]
        )
    )
    row = PreferenceRow(
        prompt=[Message(role="user", content=text)],
        chosen=[Message(role="assistant", content=text)],
        rejected=[Message(role="assistant", content=text.upper())],
        source="rows.jsonl:1",
        origin="unknown",
    )
    rules = dict.fromkeys(("refusal", "truncated_answer", "mentions_passage", "chosen_equals_rejected"), "report")
    checked = check_row(row, RulesConfig(**rules, empty_answer="report", personal_data=action, secret=action))

    details = " ".join([checked.detail, *(finding.detail for finding in checked.findings)])
    assert details.strip()
    for value in values:
        for part in value.split("\n"):
            assert part not in details or part.startswith("-----")
            assert action != "mask" or part not in checked.row.chosen[0].content or part.startswith("-----")


def test_a_row_is_masked_in_every_message_and_keeps_the_rest():
    row = InstructionRow(
        prompt=[
            Message(role="system", content="Key: " + SECRETS["GitHub"]),
            Message(role="user", content="I am ann@firma.de"),
        ],
        completion=[Message(role="assistant", content="Hello ann@firma.de, ben@firma.de and +49 30 901820!")],
        source="rows.jsonl:3",
        origin="gpt-4o",
        document="d",
    )

    checked = check_row(row, RulesConfig(personal_data="mask", secret="mask"))

    assert [message.content for message in checked.row.prompt] == ["Key: [SECRET]", "I am [EMAIL]"]
    assert [message.content for message in checked.row.completion] == ["Hello [EMAIL], [EMAIL] and [PHONE]!"]
    assert (checked.row.source, checked.row.origin, checked.row.document) == ("rows.jsonl:3", "gpt-4o", "d")
    assert row.prompt[1].content == "I am ann@firma.de"
    assert [tuple(finding) for finding in checked.findings] == [
        ("secret", "masked: GitHub Token in the prompt"),
        (
            "personal_data",
            "masked: e-mail address in the prompt; e-mail address in the completion, 2 times; "
            "telephone number in the completion",
        ),
    ]


@pytest.mark.parametrize(("rule", "value"), [("secret", SECRETS["GitHub"]), ("personal_data", "ann@firma.de")])
def test_the_switch_decides_what_happens(rule, value):
    row = InstructionRow(
        prompt=[Message(role="user", content="Hi")],
        completion=[Message(role="assistant", content=f"It is {value}.")],
        source="rows.jsonl:1",
        origin="human",
    )
    off = {"personal_data": "off", "secret": "off"}
    results = {
        action: check_row(row, RulesConfig(**{**off, rule: action})) for action in ("off", "report", "mask", "drop")
    }

    assert [results[action].reason for action in results] == ["", "", "", rule]
    assert [len(results[action].findings) for action in results] == [0, 1, 1, 0]
    assert [results[action].row is row for action in results] == [True, True, False, True]


def test_a_row_that_another_rule_drops_is_masked_too():
    row = InstructionRow(
        prompt=[Message(role="user", content="I am ann@firma.de")],
        completion=[Message(role="assistant", content=" ")],
        source="rows.jsonl:1",
        origin="human",
    )
    checked = check_row(row, RulesConfig(personal_data="mask"))
    assert (checked.reason, checked.row.prompt[0].content) == ("empty_answer", "I am [EMAIL]")


def test_redacted_text_holds_neither_secrets_nor_personal_data():
    text = f"{SECRETS['GitLab']} ann@firma.de postgres://ann:hunter2horse@db.firma.de"
    assert redacted(text) == "[SECRET] [EMAIL] postgres://ann:[SECRET]@db.firma.de"
