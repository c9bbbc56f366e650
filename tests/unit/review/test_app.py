"""Who may use the pages of the review, and how they show hostile text."""

from __future__ import annotations

import re

import pytest
from fastapi.testclient import TestClient

from llm_engineering.errors import RequestError
from llm_engineering.review.app import build_app
from llm_engineering.review.browse import DatasetVersion
from llm_engineering.review.site import Context, as_typed, visible
from tests.fakes.answering import no_models
from tests.fakes.reviews import reviews

PORT = 8240
OWN = f"http://127.0.0.1:{PORT}"


@pytest.fixture
def context(tmp_path):
    hostile = DatasetVersion("a/b?c", "<script>alert(1)</script>\u202e", "2026-01-01", "", "train 1")
    plain = DatasetVersion("b", "b", "", "", "")
    return Context(reviews(tmp_path, list_datasets=lambda: [hostile, plain]))


@pytest.fixture
def app(context):
    app = build_app(context, PORT, no_models())

    @app.post("/write")
    def write() -> dict[str, bool]:
        return {"written": True}

    @app.get("/fails")
    def fails() -> None:
        raise RequestError("No <b>such</b> thing. Choose another.")

    return app


@pytest.fixture
def client(app):
    return TestClient(app, base_url=OWN, raise_server_exceptions=False)


def write(client, context, **headers):
    needed = {"content-type": "application/json", "x-review-write": context.write_secret}
    return client.post(f"{context.root}/write", content="{}", headers={**needed, **headers})


def test_the_address_with_the_token_opens_the_pages(client, context):
    answer = client.get(f"{context.root}/")
    assert answer.status_code == 200
    assert answer.url.path == f"{context.root}/data"
    assert client.get(f"{context.root}/static/review.css").status_code == 200


@pytest.mark.parametrize("path", ["/", "/data", "/static/review.css", "/wrong/data", "//", "/%ff/"])
def test_no_token_no_page(client, path):
    answer = client.get(path)
    assert answer.status_code == 403
    assert answer.text.endswith(".\n")
    assert "make review" in answer.text


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", f"127.0.0.1.evil.example:{PORT}", "127.0.0.1:1", ""])
def test_another_host_is_refused(client, context, host):
    assert client.get(f"{context.root}/data", headers={"host": host}).status_code == 403


def test_localhost_is_this_server(client, context):
    assert client.get(f"{context.root}/data", headers={"host": f"localhost:{PORT}"}).status_code == 200


def test_a_page_of_this_server_may_write(client, context):
    assert write(client, context).json() == {"written": True}
    assert write(client, context, origin=OWN, **{"sec-fetch-site": "same-origin"}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": f"http://localhost:{PORT}"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"x-review-write": "wrong"},
        {"x-review-write": ""},
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
    ],
)
def test_other_writes_are_refused(client, context, headers):
    answer = write(client, context, **headers)
    assert answer.status_code == 403
    assert answer.text.endswith(".\n")


@pytest.mark.parametrize("method", ["PUT", "DELETE", "OPTIONS", "PATCH"])
def test_only_get_and_post_are_answered(client, context, method):
    headers = {"content-type": "application/json", "x-review-write": context.write_secret}
    assert client.request(method, f"{context.root}/write", headers=headers).status_code == 403


def test_every_answer_has_the_headers_that_protect_it(client, context):
    for answer in (client.get(f"{context.root}/data"), client.get("/"), client.get(f"{context.root}/none")):
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"
        assert "set-cookie" not in answer.headers


def test_text_is_escaped_and_what_no_font_shows_is_named(client, context):
    page = client.get(f"{context.root}/data").text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;‹U+202E›" in page
    assert "\u202e" not in page
    assert f"{context.root}/data/a%2Fb%3Fc" in page
    assert re.findall("<script[^>]*>", page) == [f'<script type="module" src="{context.root}/static/review.js">']


def test_an_error_is_a_page_with_its_sentence(client, context):
    answer = client.get(f"{context.root}/fails")
    assert answer.status_code == 400
    assert "No &lt;b&gt;such&lt;/b&gt; thing. Choose another." in answer.text
    assert client.get(f"{context.root}/data/c").status_code == 400
    assert client.get(f"{context.root}/none").status_code == 404


def test_unseen_characters_are_named_and_others_stay():
    hidden = "\u202e\u2066\u200b\x1b\r\ud800\U000e0041\u2028"
    assert visible(hidden) == "‹U+202E›‹U+2066›‹U+200B›‹U+001B›‹U+000D›‹U+D800›‹U+E0041›‹U+2028›"
    shown = "a\tb\nÀ é ض هند\u200cی 👩\u200d👩 日本"
    assert visible(shown) == shown
    assert visible(3) == 3


def test_a_form_field_keeps_unseen_characters():
    assert as_typed("<a>\u202e") == "&lt;a&gt;\u202e"
