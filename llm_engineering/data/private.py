"""Finds personal data and secrets in a text: where they stand and of what kind, never what they say.

E-mail addresses by a pattern after RFC 5322's dot-atoms, telephone numbers by phonenumbers (Google's libphonenumber),
credentials by the patterns of detect-secrets. All of them run over every message of a dataset, so each begins with a
cheap test for something that every match holds.
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
    """A private part of a text: its kind for people, what masks it, and its characters [start, end)."""

    kind: str
    mask: str
    start: int
    end: int


# Latin letters beyond ASCII are taken, others not: in "写信给bob@firma.de吧" the address ends where the script changes.
_EMAIL = re.compile(
    r"(?<![A-Za-z0-9À-ɏ._%+-])[A-Za-z0-9À-ɏ_%+-][A-Za-z0-9À-ɏ._%+-]{0,63}"
    r"@((?:[A-Za-z0-9À-ɏ-]{1,63}\.){1,8}[A-Za-z]{2,24})(?![A-Za-z0-9À-ɏ-])"
)
# Reserved for documentation by RFC 2606; SSH's `git@` is nobody's, and `icon@2x.png` is a file.
_NO_EMAIL = re.compile(r"git@|.*@(?:.*\.)?(?:example(?:\.\w+)?|test|invalid)$|.*@\dx\.", re.IGNORECASE)
_IN_URL = re.compile(r"://[^/?#\s]*$")

# A number with a plus sign has at least five digits (country code and all), and between them only what libphonenumber
# allows: at most four characters, no letter but x, no operator. What this does not find, it cannot find either.
_INTERNATIONAL = re.compile(r"[+＋][^\d=*\nA-WYZa-wyz]{0,9}\d(?:[^\d=*+\nA-WYZa-wyz]{0,4}\d){4}")
_NATIONAL_END = re.compile(r"[0-9]{3}[-.][0-9]{4}")
_NORTH_AMERICAN = re.compile(
    r"(?<![\w.+/-])(?:1[-. ])?(?:\([0-9]{3}\) ?|[0-9]{3}[-.])[0-9]{3}[-.][0-9]{4}(?![\w-])", re.ASCII
)


def personal_data(text: str) -> list[Private]:
    """E-mail addresses and telephone numbers, in the order of the text.

    Numbers count in the international form, with a plus sign, as libphonenumber validates them. Without it the same
    digits mean different things from country to country, and order numbers, dates and sums look no different; a recipe
    names no country. The one national form that is unmistakable as written is North America's, `(212) 555-0123` or
    `212-555-0123`: it counts if the area code and the exchange exist.
    """
    found: list[Private] = []
    if "@" in text:
        found += (
            Private("e-mail address", "[EMAIL]", *match.span()) for match in _EMAIL.finditer(text) if _mail(match)
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


def _mail(match: re.Match[str]) -> bool:
    # In `postgres://ann:word@host.org` the part before the @ is a password, no mailbox.
    before = match.string[max(0, match.start() - 200) : match.start()]
    return not _NO_EMAIL.match(match.group()) and not _IN_URL.search(before)


def _international(text: str) -> Iterator[tuple[int, int]]:
    start = 0
    # Numbers do not run over the end of a line, and most lines hold none.
    for line in text.split("\n"):
        if _INTERNATIONAL.search(line):
            for match in phonenumbers.PhoneNumberMatcher(line, None):
                # In `0.5 + 14285714` and `x+4420836611` it is a sum.
                if not match.raw_string[1:2].isspace() and not _is_alphanumeric(line[match.start - 1 : match.start]):
                    yield start + match.start, start + match.end
        start += len(line) + 1


class _Credential(NamedTuple):
    kind: str
    pattern: re.Pattern[str]
    group: int  # which group is the secret; 0: the whole match
    marks: tuple[str, ...]  # every match holds one of these
    exact: bool  # a letter or digit right behind it makes it something else


# detect-secrets' plugins that are on, with the marks of each of their patterns in order. Off are those whose matches
# are mostly none: both entropy plugins (digests, UUIDs, base64 of anything), keyword (`password = "password"` in every
# lesson about code), public IP addresses, Artifactory (any word in capitals that begins with APA), IBM IAM, IBM COS,
# Cloudant and SoftLayer (any digest behind `key`), and npm (slow; the form of its token stands below). The private key
# plugin knows no end of the key; see _PRIVATE_KEY.
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
        # These two run on without a bound; if they began within a word too, eyJeyJeyJ… would take time in the square
        # of its length.
        re.compile(r"(?<![A-Za-z0-9_-])" + pattern.pattern) if isinstance(plugin, _UNBOUNDED) else pattern,
        group=0 if isinstance(plugin, _PREFIX_GROUP) else min(1, pattern.groups),
        marks=marks,
        exact=isinstance(plugin, _FIXED_LENGTH),
    )
    for plugin, all_marks in _PLUGINS
    for pattern, marks in zip(plugin.denylist, all_marks, strict=True)
] + [
    # Newer than detect-secrets' last release; the prefixes are those of their issuers' documentation.
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
_MARKS = [
    (mark, place)
    for place, credential in enumerate(_CREDENTIALS)
    if not credential.pattern.flags & re.IGNORECASE
    for mark in credential.marks
]
# Looked for in the casefolded text, not the lowered one: IGNORECASE also takes the long ſ for an s.
_FOLDED_MARKS = [
    (mark, place)
    for place, credential in enumerate(_CREDENTIALS)
    if credential.pattern.flags & re.IGNORECASE
    for mark in credential.marks
]
# Only with key material behind it: the first line alone is what lessons about keys show.
_PRIVATE_KEY = re.compile(r"-----BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----")
_PRIVATE_KEY_END = re.compile(r"-----END [A-Z0-9 ]{0,40}-----")
_KEY_MATERIAL = re.compile(r"[A-Za-z0-9+/]{40}")
_REST = re.compile(r"[A-Za-z0-9_=/+-]*(?:\.[A-Za-z0-9_=/+-]+)*")
_PLACEHOLDER_PASSWORD = re.compile(
    r"[^A-Za-z0-9]*(?:(?:your|my|the|some|db|user|root)?[-_]?"
    r"(?:pass(?:word|wd)?|pwd?|secret|token|key|changeme|example|credentials?)\d{0,3}|x+|\.+|\W*)[^A-Za-z0-9]*",
    re.IGNORECASE,
)
# A random token of 20 characters has about 14 different ones; `ghp_xxxxxxxx…` and other stand-ins have few.
_MIN_DIFFERENT = 10
# jwt.io's specimen (subject 1234567890), and AWS's, which say EXAMPLE, stand in many lessons.
_SPECIMENS = ("EXAMPLE", ".eyJzdWIiOiIxMjM0NTY3ODkwIi")


def secrets(text: str) -> list[Private]:
    """Keys, tokens, private key blocks, and passwords in URLs, in the order of the text.

    Stand-ins such as `ghp_xxxxxxxx`, `user:password@` or `${TOKEN}` are none.
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
                # Some patterns stop before the token does, e.g. before a JWT's signature.
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
        # Without its last line the key may run to the end, or to the next key.
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
    """The text without anything private, for reports."""
    text = masked(text, secrets(text))
    return masked(text, personal_data(text))
