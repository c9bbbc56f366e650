"""Finds personal data and secrets in a text: their positions and kinds, never their values.

E-mail addresses are found by a pattern after RFC 5322's dot-atoms, telephone numbers by phonenumbers (Google's
libphonenumber), credentials by the patterns of detect-secrets. All patterns run over every message of a dataset, so each
search begins with a cheap test for a string that every match contains.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import phonenumbers
from detect_secrets.filters.heuristic import is_prefixed_with_dollar_sign, is_templated_secret
from detect_secrets.plugins.aws import AWSKeyDetector
from detect_secrets.plugins.azure_storage_key import AzureStorageKeyDetector
from detect_secrets.plugins.base import RegexBasedDetector
from detect_secrets.plugins.basic_auth import BasicAuthDetector
from detect_secrets.plugins.discord import DiscordBotTokenDetector
from detect_secrets.plugins.github_token import GitHubTokenDetector
from detect_secrets.plugins.gitlab_token import GitLabTokenDetector
from detect_secrets.plugins.jwt import JwtTokenDetector
from detect_secrets.plugins.mailchimp import MailchimpDetector
from detect_secrets.plugins.openai import OpenAIDetector
from detect_secrets.plugins.pypi_token import PypiTokenDetector
from detect_secrets.plugins.sendgrid import SendGridDetector
from detect_secrets.plugins.slack import SlackDetector
from detect_secrets.plugins.square_oauth import SquareOAuthDetector
from detect_secrets.plugins.stripe import StripeDetector
from detect_secrets.plugins.telegram_token import TelegramBotTokenDetector
from detect_secrets.plugins.twilio import TwilioKeyDetector


class Private(NamedTuple):
    """A private part of a text: a readable kind, the mask that replaces it, and its characters [start, end)."""

    kind: str
    mask: str
    start: int
    end: int


# Latin letters beyond ASCII belong to an address, other scripts do not: in "写信给bob@firma.de吧" it ends before "吧".
_EMAIL = re.compile(
    r"(?<![A-Za-z0-9À-ɏ._%+-])[A-Za-z0-9À-ɏ_%+-][A-Za-z0-9À-ɏ._%+-]{0,63}"
    r"@((?:[A-Za-z0-9À-ɏ-]{1,63}\.){1,8}[A-Za-z]{2,24})(?![A-Za-z0-9À-ɏ-])"
)
# RFC 2606 reserves the example domains for documentation. SSH's `git@` is no person, and `icon@2x.png` is a file.
_NO_EMAIL = re.compile(r"git@|.*@(?:.*\.)?(?:example(?:\.\w+)?|test|invalid)$|.*@\dx\.", re.IGNORECASE)
_IN_URL = re.compile(r"://[^/?#\s]*$")

# A number with a plus sign has at least five digits with its country code, and between two digits only what
# libphonenumber allows: at most four characters, no letter except x, no operator. A text that this pattern does not
# match contains no number that libphonenumber finds.
_INTERNATIONAL = re.compile(r"[+＋][^\d=*\nA-WYZa-wyz]{0,9}\d(?:[^\d=*+\nA-WYZa-wyz]{0,4}\d){4}")
_NATIONAL_END = re.compile(r"[0-9]{3}[-.][0-9]{4}")
_NORTH_AMERICAN = re.compile(
    r"(?<![\w.+/-])(?:1[-. ])?(?:\([0-9]{3}\) ?|[0-9]{3}[-.])[0-9]{3}[-.][0-9]{4}(?![\w-])", re.ASCII
)


def personal_data(text: str) -> list[Private]:
    """E-mail addresses and telephone numbers, in the order of the text.

    Telephone numbers count in the international form, with a plus sign, if libphonenumber validates them. Without the
    plus sign, the same digits mean different things in each country and look like order numbers, dates and sums, and a
    recipe names no country. The only national form that is unmistakable is North America's, `(212) 555-0123` or
    `212-555-0123`. It counts if the area code and the exchange exist.
    """
    found: list[Private] = []
    if "@" in text:
        found += (
            Private("e-mail address", "[EMAIL]", *match.span()) for match in _EMAIL.finditer(text) if _is_email(match)
        )
    if ("+" in text or "＋" in text) and _INTERNATIONAL.search(text):
        found += (Private("telephone number", "[PHONE]", *span) for span in _international(text))
    if _NATIONAL_END.search(text):
        found += (
            Private("telephone number", "[PHONE]", *match.span())
            for match in _NORTH_AMERICAN.finditer(text)
            if phonenumbers.is_valid_number(phonenumbers.parse(match.group(), "US"))
        )
    return _disjoint(found)


def _is_email(match: re.Match[str]) -> bool:
    # In `postgres://ann:word@host.org` the text before the @ is a password, not a mailbox.  # pragma: allowlist secret
    before = match.string[max(0, match.start() - 200) : match.start()]
    return not _NO_EMAIL.match(match.group()) and not _IN_URL.search(before)


def _international(text: str) -> Iterator[tuple[int, int]]:
    start = 0
    # A number never continues in the next line, and most lines contain none.
    for line in text.split("\n"):
        if _INTERNATIONAL.search(line):
            for match in phonenumbers.PhoneNumberMatcher(line, None):
                # `0.5 + 14285714` and `x+4420836611` are sums.
                if not match.raw_string[1:2].isspace() and not _is_alphanumeric(line[match.start - 1 : match.start]):
                    yield start + match.start, start + match.end
        start += len(line) + 1


class _Credential(NamedTuple):
    kind: str
    pattern: re.Pattern[str]
    group: int  # the group that is the secret; 0 is the whole match
    marks: tuple[str, ...]  # every match contains one of these
    exact: bool  # the length is fixed: if a letter or digit follows the match, it is no secret


# The enabled plugins of detect-secrets, with the marks of each of their patterns, in the order of the patterns. Plugins
# whose matches are mostly no secrets are left out: both entropy plugins (digests, UUIDs, any base64), keyword
# (`password = "password"` in every lesson about code), public IP addresses, Artifactory (any word in capitals that begins
# with APA), IBM IAM, IBM COS, Cloudant and SoftLayer (any digest after `key`). The npm plugin is slow; its tokens have a
# pattern below. The private key plugin does not find the end of the key; _PRIVATE_KEY does.
_PLUGINS: list[tuple[RegexBasedDetector, tuple[tuple[str, ...], ...]]] = [
    (AWSKeyDetector(), (("A3T", "ABIA", "ACCA", "AKIA", "ASIA"), ("aws",))),
    (AzureStorageKeyDetector(), (("AccountKey=",),)),
    (BasicAuthDetector(), (("://",),)),
    (DiscordBotTokenDetector(), ((".",),)),
    (GitHubTokenDetector(), (("ghp_", "gho_", "ghu_", "ghs_", "ghr_"),)),
    (
        GitLabTokenDetector(),
        (
            ("glpat-", "gldt-", "glft-", "glsoat-", "glrt-"),
            ("GR1348941",),
            ("glcbt-",),
            ("glimt-",),
            ("glptt-",),
            ("glagent-",),
            ("gloas-",),
        ),
    ),
    (JwtTokenDetector(), (("eyJ",),)),
    (MailchimpDetector(), (("-us",),)),
    (OpenAIDetector(), (("T3BlbkFJ",),)),
    (PypiTokenDetector(), (("pypi-AgEIcHlwaS5vcmc",), ("pypi-AgENdGVzdC5weXBpLm9yZw",))),
    (SendGridDetector(), (("SG.",),)),
    (SlackDetector(), (("xox",), ("hooks.slack.com",))),
    (SquareOAuthDetector(), (("sq0csp-",),)),
    (StripeDetector(), (("k_live_",),)),
    (TelegramBotTokenDetector(), ((":",),)),
    (TwilioKeyDetector(), (("AC",), ("SK",))),
]
_PREFIX_GROUP = (GitHubTokenDetector, GitLabTokenDetector)
_UNBOUNDED = (JwtTokenDetector, OpenAIDetector)
_FIXED_LENGTH = (AWSKeyDetector, MailchimpDetector, TelegramBotTokenDetector, TwilioKeyDetector)

_CREDENTIALS = [
    _Credential(
        plugin.secret_type,
        # These two patterns have no length limit. If they could begin inside a word, searching eyJeyJeyJ… would take
        # quadratic time.
        re.compile(r"(?<![A-Za-z0-9_-])" + pattern.pattern) if isinstance(plugin, _UNBOUNDED) else pattern,
        group=0 if isinstance(plugin, _PREFIX_GROUP) else min(1, pattern.groups),
        marks=marks,
        exact=isinstance(plugin, _FIXED_LENGTH),
    )
    for plugin, all_marks in _PLUGINS
    for pattern, marks in zip(plugin.denylist, all_marks, strict=True)
] + [
    # These are newer than detect-secrets' last release. The prefixes are from the issuers' documentation.
    _Credential(kind, re.compile(pattern), 0, marks, False)
    for kind, pattern, marks in (
        ("GitHub Token", r"github_pat_[A-Za-z0-9_]{40,}", ("github_pat_",)),
        ("Google API Key", r"AIza[A-Za-z0-9_-]{35}", ("AIza",)),
        ("Hugging Face Token", r"hf_[A-Za-z0-9]{34}", ("hf_",)),
        ("npm Token", r"npm_[A-Za-z0-9]{36}", ("npm_",)),
        ("OpenAI Token", r"sk-(?:proj|svcacct|admin)-[A-Za-z0-9_-]{40,}", ("sk-proj-", "sk-svcacct-", "sk-admin-")),
        ("Anthropic Token", r"sk-ant-[A-Za-z0-9_-]{40,}", ("sk-ant-",)),
    )
]


def _marks(ignore_case: bool) -> list[tuple[str, int]]:
    """The marks of the patterns with or without IGNORECASE, each with the pattern's position in _CREDENTIALS."""
    return [
        (mark, place)
        for place, credential in enumerate(_CREDENTIALS)
        if bool(credential.pattern.flags & re.IGNORECASE) == ignore_case
        for mark in credential.marks
    ]


_MARKS = _marks(ignore_case=False)
# Searched in the casefolded text, not in the lowered one: IGNORECASE also matches the long ſ with an s.
_FOLDED_MARKS = _marks(ignore_case=True)
# The first line of a private key counts only if key material follows, because texts that explain keys often show only it.
_PRIVATE_KEY = re.compile(r"-----BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----")
_PRIVATE_KEY_END = re.compile(r"-----END [A-Z0-9 ]{0,40}-----")
_KEY_MATERIAL = re.compile(r"[A-Za-z0-9+/]{40}")
_REST = re.compile(r"[A-Za-z0-9_=/+-]*(?:\.[A-Za-z0-9_=/+-]+)*")
_PLACEHOLDER_PASSWORD = re.compile(
    r"[^A-Za-z0-9]*(?:(?:your|my|the|some|db|user|root)?[-_]?"
    r"(?:pass(?:word|wd)?|pwd?|secret|token|key|changeme|example|credentials?)\d{0,3}|x+|\.+|\W*)[^A-Za-z0-9]*",
    re.IGNORECASE,
)
# A random token of 20 characters has about 14 different characters; placeholders such as `ghp_xxxxxxxx…` have few.
_MIN_DIFFERENT = 10
# Many lessons quote the example token of jwt.io (subject 1234567890) and the example keys of AWS (they say EXAMPLE).
_SPECIMENS = ("EXAMPLE", ".eyJzdWIiOiIxMjM0NTY3ODkwIi")


def secrets(text: str) -> list[Private]:
    """Keys, tokens, private key blocks, and passwords in URLs, in the order of the text.

    Placeholders such as `ghp_xxxxxxxx`, `user:password@` or `${TOKEN}` are no secrets.
    """
    folded = text.casefold()
    candidates = {place for mark, place in _MARKS if mark in text}
    candidates |= {place for mark, place in _FOLDED_MARKS if mark in folded}
    found = [private for place in sorted(candidates) for private in _credentials(text, _CREDENTIALS[place])]
    if "PRIVATE KEY" in text:
        found += _private_keys(text)
    return _disjoint(found)


def _credentials(text: str, credential: _Credential) -> Iterator[Private]:
    match = credential.pattern.search(text)
    while match:
        start, end = match.span(credential.group)
        is_whole = True
        if credential.group == 0:
            is_whole = not _is_alphanumeric(text[start - 1 : start])
            if credential.exact:
                is_whole = is_whole and not _is_alphanumeric(text[end : end + 1])
            else:
                # Some patterns end before the token ends, e.g. before the signature of a JWT.
                rest = _REST.match(text, end) if is_whole else None
                end = rest.end() if rest else end
        if is_whole and _is_secret(credential, match, text[start:end]):
            yield Private(credential.kind, "[SECRET]", start, end)
        match = credential.pattern.search(text, max(end, match.end()))


def _is_secret(credential: _Credential, match: re.Match[str], value: str) -> bool:
    if credential.kind == "Basic Auth Credentials":
        user = match.group()[3:].split(":")[0]
        return value != user and not _is_placeholder(value)
    if credential.kind == "JSON Web Token" and not JwtTokenDetector.is_formally_valid(match.group()):
        return False
    return len(set(value)) >= _MIN_DIFFERENT and not any(specimen in value for specimen in _SPECIMENS)


def _is_alphanumeric(character: str) -> bool:
    return character.isascii() and character.isalnum()


def _is_placeholder(password: str) -> bool:
    return (
        is_templated_secret(password)
        or is_prefixed_with_dollar_sign(password)
        or _PLACEHOLDER_PASSWORD.fullmatch(password) is not None
    )


def _private_keys(text: str) -> Iterator[Private]:
    begins = list(_PRIVATE_KEY.finditer(text))
    limits = [begin.start() for begin in begins[1:]] + [len(text)]
    for begin, limit in zip(begins, limits, strict=True):
        closing = _PRIVATE_KEY_END.search(text, begin.end(), limit)
        # A key without its last line extends to the next key or to the end of the text.
        end = closing.end() if closing else limit
        if _KEY_MATERIAL.search(text, begin.end(), end):
            yield Private("Private Key", "[SECRET]", begin.start(), end)


def _disjoint(found: Sequence[Private]) -> list[Private]:
    kept: list[Private] = []
    for private in sorted(found, key=lambda private: private.start):
        if kept and private.start < kept[-1].end:
            kept[-1] = kept[-1]._replace(end=max(kept[-1].end, private.end))
        else:
            kept.append(private)
    return kept


def masked(text: str, found: Iterable[Private]) -> str:
    """The text with each private part replaced by its mask."""
    parts: list[str] = []
    last = 0
    for private in found:
        parts += (text[last : private.start], private.mask)
        last = private.end
    return "".join((*parts, text[last:]))


def redacted(text: str) -> str:
    """The text with all secrets and personal data masked, for reports."""
    text = masked(text, secrets(text))
    return masked(text, personal_data(text))
