"""People read and correct data on the pages of `make review`, in a real browser."""

from __future__ import annotations

import json
import re
import signal
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from llm_engineering.feedback.decisions import Decision, current, stored
from tests.conftest import free_port
from tests.integration.chromium import (
    SECONDS_TO_SHOW,
    TELEPHONE,
    check_touch,
    chromium,
    loopback_context,
    needs_chromium,
    printed_url,
)

HOSTILE = "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">\u202egnp.exe\u2066"
LONG = "word " * 200_000


class Server:
    """`review` of a file or of a project's datasets; it can be killed and started again."""

    def __init__(self, project: Any, *arguments: str) -> None:
        self.project = project
        self.arguments = arguments
        self.url = self.start()

    def start(self) -> str:
        """Start the server on a free port; returns the address that it prints."""
        port = free_port()
        self.process = self.project.start(
            "review", *self.arguments, "--config", str(self.project.recipe), "--port", str(port)
        )
        self.url = printed_url(self.process, rf"Review: (http://127\.0\.0\.1:{port}/[\w-]{{32}}/) ")
        return self.url

    def kill(self) -> None:
        """End the server as `kill -9` does."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def decisions(self) -> list[Decision]:
        """All stored decisions."""
        return stored(Path(self.project.env["LLM_OUTPUT_DIR"]) / "review" / "tiny")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    rows = [{"prompt": f"Where does {n} stand?", "completion": f"It stands before {n + 1}."} for n in range(60)]
    rows[3]["completion"] = HOSTILE
    rows[4]["completion"] = LONG
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def server(fresh_project: Any, rows_file: Path) -> Iterator[Server]:
    expect.set_options(timeout=SECONDS_TO_SHOW * 1000)
    server = Server(fresh_project, str(rows_file))
    yield server
    server.kill()


def open_rows(browser: Browser, url: str, name: str, **window: Any) -> Page:
    """The page of the rows in a browser of its own, as a reviewer with this name. Errors of scripts fail the test."""
    page = loopback_context(browser, **window).new_page()
    page.on("pageerror", lambda error: pytest.fail(str(error)))
    page.goto(url)
    page.get_by_label("Your name").fill(name)
    page.keyboard.press("Escape")
    return page


def row(page: Page, number: int) -> Any:
    return page.get_by_role("article", name=re.compile(rf"Row {number}(,|$)"))


@needs_chromium
def test_rows_are_corrected_by_keyboard_and_a_killed_server_loses_nothing(
    browser: Browser, server: Server, rows_file: Path
) -> None:
    before = rows_file.read_bytes()
    page = open_rows(browser, server.url, "Ann")
    page.keyboard.press("a")
    expect(row(page, 1)).to_contain_text("accepted by Ann")
    page.keyboard.press("e")
    answer = row(page, 2).get_by_label("answer")
    expect(answer).to_be_focused()
    answer.fill("It stands between 0 and 2.")
    page.keyboard.press("Control+Enter")
    expect(row(page, 2)).to_contain_text("edited by Ann")
    page.keyboard.press("d")
    page.keyboard.type("not true")
    page.keyboard.press("Enter")
    expect(row(page, 3)).to_contain_text("dropped by Ann: not true")
    expect(page.get_by_text("60 of 60 rows; 3 decided.")).to_be_visible()

    server.kill()
    page.keyboard.press("a")
    expect(page.get_by_role("status").first).to_contain_text("The server does not answer, so nothing was saved.")
    assert [decision.action for decision in server.decisions()] == ["accept", "edit", "drop"]

    page.goto(server.start())
    expect(page.get_by_text("60 of 60 rows; 3 decided.")).to_be_visible()
    expect(row(page, 2)).to_contain_text("It stands between 0 and 2.")
    page.keyboard.press("/")
    page.keyboard.type("does 59 stand")
    page.keyboard.press("Enter")
    expect(page.get_by_text("1 of 60 rows; 3 decided.")).to_be_visible()
    page.get_by_label("Your name").fill("Bob")
    row(page, 60).get_by_role("button", name="Drop").click()
    row(page, 60).get_by_label("Why is it dropped?").fill("too long")
    row(page, 60).get_by_role("button", name="Drop").last.click()
    expect(row(page, 60)).to_contain_text("dropped by Bob")
    page.get_by_role("button", name="Save corrected file").click()
    expect(page.get_by_role("status").first).to_contain_text(
        "has 58 rows: 1 edited, 2 dropped. rows.jsonl is unchanged."
    )

    assert rows_file.read_bytes() == before
    lines = rows_file.with_name("rows.reviewed.jsonl").read_text().splitlines()
    written = {line["prompt"][0]["content"]: line for line in map(json.loads, lines)}
    assert written["Where does 1 stand?"]["completion"][0]["content"] == "It stands between 0 and 2."
    assert written["Where does 1 stand?"]["origin"] == "human:Ann"
    assert written.keys() == {f"Where does {n} stand?" for n in range(60)} - {
        "Where does 2 stand?",
        "Where does 59 stand?",
    }


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_telephone_reaches_every_decision_by_touch(browser: Browser, server: Server, scheme: Any) -> None:
    page = loopback_context(browser, **TELEPHONE, color_scheme=scheme).new_page()
    page.on("pageerror", lambda error: pytest.fail(str(error)))
    page.goto(server.url)

    def tap(role: Any, name: str, inside: Any = page) -> None:
        inside.get_by_role(role, name=name, exact=True).tap()

    expect(row(page, 1)).to_be_visible()
    # A decision without a name says what is missing.
    tap("button", "Accept", row(page, 1))
    expect(page.get_by_role("status").first).to_contain_text("Enter your name first")
    page.get_by_label("Your name").fill("Ann")
    tap("button", "Accept", row(page, 1))
    expect(row(page, 1)).to_contain_text("accepted by Ann")
    tap("button", "Edit", row(page, 2))
    row(page, 2).get_by_label("answer").fill("It stands between 0 and 2.")
    check_touch(page)
    tap("button", "Save the edit", row(page, 2))
    expect(row(page, 2)).to_contain_text("edited by Ann")
    tap("button", "Drop", row(page, 3))
    row(page, 3).get_by_label("Why is it dropped?").fill("not true")
    check_touch(page)
    row(page, 3).get_by_role("button", name="Drop", exact=True).last.tap()
    expect(row(page, 3)).to_contain_text("dropped by Ann: not true")
    tap("button", "Undo", row(page, 3))
    expect(row(page, 3)).not_to_contain_text("dropped by Ann")
    tap("button", "Keys")
    check_touch(page)
    tap("button", "Close")
    page.get_by_text("More filters").tap()
    check_touch(page)
    tap("link", "Row 4")
    page.get_by_text("Prompt and labels, token by token").tap()
    expect(page.get_by_role("heading", name="Row, token by token")).to_be_visible()
    check_touch(page)
    tap("link", "Next row")
    expect(row(page, 5)).to_be_visible()
    tap("link", "All rows")
    expect(row(page, 6)).to_be_visible()
    for tab in ("Set aside", "Duplicates", "Findings"):
        page.get_by_role("link", name=re.compile(tab)).tap()
        expect(page.get_by_role("link", name=re.compile(tab))).to_have_attribute("aria-current", "page")
        check_touch(page)
    page.get_by_role("link", name=re.compile("Rows")).tap()
    tap("button", "Save corrected file")
    expect(page.get_by_role("status").first).to_contain_text("has 60 rows: 1 edited, 0 dropped.")
    assert [decision.action for decision in server.decisions()] == ["accept", "edit", "drop", "undo"]


@needs_chromium
def test_two_reviewers_see_each_other_and_the_last_decision_counts(browser: Browser, server: Server) -> None:
    ann, bob = (open_rows(browser, server.url, name) for name in ("Ann", "Bob"))
    bob.keyboard.press("e")
    row(bob, 1).get_by_label("answer").fill("Bob's answer.")
    ann.keyboard.press("d")
    ann.keyboard.type("wrong")
    ann.keyboard.press("Enter")
    expect(row(ann, 1)).to_contain_text("dropped by Ann")
    # Bob's form stays open, with what he wrote.
    expect(row(bob, 1)).to_contain_text("Ann dropped this row. The last decision counts.")
    expect(row(bob, 1).get_by_label("answer")).to_have_value("Bob's answer.")
    bob.keyboard.press("Control+Enter")
    expect(row(bob, 1)).to_contain_text("edited by Bob")
    expect(row(ann, 1)).to_contain_text("Bob edited this row.")
    expect(row(ann, 1)).to_contain_text("Bob's answer.")
    made = server.decisions()
    assert [(one.reviewer, one.action) for one in made] == [("Ann", "drop"), ("Bob", "edit")]
    assert [one.reviewer for one in current(made).values()] == ["Bob"]


@needs_chromium
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_hostile_text_is_shown_and_does_nothing(browser: Browser, server: Server, width: int, scheme: Any) -> None:
    page = open_rows(browser, server.url, "Ann", width=width, color_scheme=scheme)
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("dialog", lambda dialog: said.append(dialog.message))
    expect(row(page, 4)).to_contain_text("<script>document.title='taken'</script><img src=x")
    expect(row(page, 4)).to_contain_text("‹U+202E›gnp.exe‹U+2066›")
    assert page.locator("article img, article script").count() == 0
    assert len(row(page, 5).inner_text()) < 3000
    assert page.evaluate("document.documentElement.scrollWidth") == width
    row(page, 5).get_by_role("button", name="show all 1,000,000 characters").click()
    expect(row(page, 5).get_by_role("button", name="show all")).to_have_count(0)
    assert len(row(page, 5).inner_text()) > 900_000
    row(page, 4).get_by_role("button", name="Edit").click()
    # The form holds the text itself, so that saving changes only what the reviewer changed.
    expect(row(page, 4).get_by_label("answer")).to_have_value(HOSTILE)
    row(page, 4).get_by_role("link").click()
    expect(page.get_by_role("heading", name="How training reads it")).to_be_visible()
    # The page shows its text before its script listens to keys.
    page.wait_for_load_state()
    page.keyboard.press("t")
    expect(page.get_by_role("heading", name="Row, token by token")).to_be_visible()
    for path in ("", "/quarantine", "/clusters", "/findings", "/rows/3"):
        page.goto(f"{server.url}data/file{path}")
        assert page.evaluate("document.documentElement.scrollWidth") == width, path
        assert "taken" not in page.title()
    assert said == []


@needs_chromium
def test_a_page_of_another_site_can_neither_read_nor_write(browser: Browser, server: Server, tmp_path: Path) -> None:
    page = open_rows(browser, server.url, "Ann")
    decision = f"{server.url}data/file/rows/0/decision"
    body = json.dumps({"id": row(page, 1).get_attribute("data-id"), "action": "accept", "reviewer": "Eve"})
    secret = page.locator("meta[name=write-secret]").get_attribute("content")
    # Even a site that knows both secrets may not write. The form sends JSON as text.
    form = body.replace('"', "&quot;")[:-1] + ",&quot;a&quot;:&quot;"
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "evil.html").write_text(
        f"""<form id=f method=post enctype=text/plain action="{decision}"><input name="{form}" value='"}}'></form>
        <iframe id=frame src="{server.url}data/file"></iframe>"""
    )
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path / "site")
    evil = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=evil.serve_forever, daemon=True).start()
    try:
        page.goto(f"http://127.0.0.1:{evil.server_port}/evil.html")
        tried = page.evaluate(
            """async ([url, body, secret]) => {
                const json = {"Content-Type": "application/json", "X-Review-Write": secret};
                const sent = [{headers: json}, {mode: "no-cors"}, {mode: "no-cors", headers: json}, {credentials: "include"}];
                const writes = sent.map((more) => fetch(url, {method: "POST", body, ...more}));
                const results = await Promise.allSettled([fetch(url.replace("/decision", "")), ...writes]);
                return results.map((one) => one.status === "rejected" ? "refused" : one.value.type);
            }""",
            [decision, body, secret],
        )
        assert tried == ["refused"] * 5
        assert page.frames[1].url.startswith("chrome-error:")
        page.evaluate("document.getElementById('f').submit()")
        expect(page.get_by_text("Another site tried to write.")).to_be_visible()
    finally:
        evil.shutdown()
    assert server.decisions() == []

    headers = {"content-type": "application/json", "x-review-write": secret}
    for changed in (
        {"host": f"evil.example:{urlsplit(server.url).port}"},
        {"x-review-write": "no"},
        {"origin": "null"},
    ):
        assert httpx.post(decision, content=body, headers=headers | changed, trust_env=False).status_code == 403
    without = decision.replace(urlsplit(server.url).path.strip("/"), "0" * 32)
    assert httpx.post(without, content=body, headers=headers, trust_env=False).status_code == 403
    assert server.decisions() == []
    # The same request passes without any of these faults.
    assert httpx.post(decision, content=body, headers=headers, trust_env=False).status_code == 200
    assert [one.reviewer for one in server.decisions()] == ["Eve"]


@needs_chromium
def test_the_datasets_of_runs_can_be_browsed_and_decided_on(browser: Browser, fresh_project: Any) -> None:
    made = fresh_project.command("run", "datasets", "--config", str(fresh_project.recipe), "--set", "chain=[sft]")
    assert made.code == 0, made.stderr
    server = Server(fresh_project)
    try:
        page = open_rows(browser, server.url, "Ann", width=390)
        expect(page.get_by_role("heading", name="instruction dataset 1")).to_be_visible()
        expect(page.get_by_text("60 of 60 rows; 0 decided.")).to_be_visible()
        page.get_by_role("link", name="Set aside 3").click()
        expect(page.locator(".badge").first).to_have_text("malformed")
        page.get_by_role("link", name="Rows 60").click()
        page.get_by_text("More filters").click()
        page.get_by_label("Split").select_option("test")
        page.get_by_role("button", name="Show", exact=True).click()
        page.locator("article").first.get_by_role("link").click()
        page.get_by_text("Prompt and labels, token by token").click()
        expect(page.locator(".tokens .e").first).to_have_text("<|im_end|>")
        page.get_by_role("button", name="Accept").click()
        expect(page.locator("article")).to_contain_text("accepted by Ann")
        (decision,) = server.decisions()
        assert (decision.kind, decision.dataset) == ("instruction", "instruction dataset 1")
        # The history and the tokens follow a decision, without a reload.
        expect(page.locator(".history")).to_contain_text("Ann accepted it (counts)")
        page.get_by_role("button", name="Edit").click()
        page.get_by_label("answer").fill("Elsewhere.")
        page.keyboard.press("Control+Enter")
        expect(page.locator(".history")).to_contain_text("Ann edited it (counts)")
        expect(page.locator("#tokens")).to_contain_text("Elsewhere.")
    finally:
        server.kill()
