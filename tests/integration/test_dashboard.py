"""A finished run in ZenML's dashboard, seen in a real browser."""

from __future__ import annotations

import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Page, expect

from tests.conftest import ROOT, free_port
from tests.integration.chromium import (
    SECONDS_TO_SHOW,
    SECONDS_TO_START,
    chromium,
    loopback_context,
    needs_chromium,
    printed_url,
)
from tests.integration.preloaded import Forked

STEPS = ("load_instructions", "train_sft", "evaluate_sft")
SECONDS_TO_END = 30


def is_free(port: int) -> bool:
    """Whether a server could listen on this loopback port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


@pytest.fixture
def dashboard(finished_run: Any) -> Iterator[Forked]:
    """The dashboard, started with the store of the finished run."""
    process = Forked("tools.cli", ["dashboard", "--port", str(free_port())], finished_run.env, ROOT)
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def page() -> Iterator[Page]:
    """A browser page of desktop size, which can reach only loopback."""
    with chromium() as browser:
        yield loopback_context(browser, 1440).new_page()


@needs_chromium
def test_run_and_its_report_show_in_the_dashboard(finished_run: Any, dashboard: Forked, page: Page) -> None:
    expect.set_options(timeout=SECONDS_TO_SHOW * 1000)
    runs_url = printed_url(dashboard, r"Dashboard: (http://127\.0\.0\.1:\d+/projects/default/runs) ")

    page.goto(runs_url)
    page.locator(f"a[href*='/runs/{finished_run.run_id}']").first.click()
    expect(page).to_have_url(re.compile(f"/projects/default/runs/{finished_run.run_id}"))

    expect(page.get_by_role("heading", name=re.compile(finished_run.pipeline))).to_be_visible()
    for step in STEPS:
        expect(page.locator(f".react-flow__node[data-id='step/{step}']").get_by_text(step)).to_be_visible()

    page.locator(".react-flow__node[data-id$='/evaluation_page']").click()
    panel = page.get_by_role("dialog")
    panel.get_by_role("tab", name="Visualization").click()
    load = panel.get_by_role("button", name="Load Preview")
    load.wait_for()
    chooser = panel.get_by_label("Choose visualization")
    if chooser.count():  # shown only if the artifact has several visualizations
        chooser.click()
        page.get_by_role("option", name=re.compile("html")).first.click()
    load.click()
    report = panel.frame_locator("iframe[sandbox]")
    expect(report.get_by_text("Held-out loss").first).to_be_visible()
    # A link to a place in the page would leave it, because the dashboard shows it as the srcdoc of a frame.
    answers = report.get_by_role("heading", name="Answers", exact=True)
    expect(answers).not_to_be_in_viewport()
    report.locator("nav").get_by_text("Answers", exact=True).click()
    expect(answers).to_be_in_viewport()
    report.locator("summary", has_text="1. Where does").first.click()
    expect(report.locator("details[open]").get_by_text("Reference answer")).to_be_visible()

    # The browser is still open. Its connections must not keep the server alive.
    dashboard.send_signal(signal.SIGINT)
    _, errors = dashboard.communicate(timeout=SECONDS_TO_END)
    assert dashboard.returncode == 0, errors
    assert "Traceback" not in errors
    assert is_free(urlsplit(runs_url).port)


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_reports_fit_a_phone_and_can_be_read_in_the_dark(
    finished_run: Any, width: int, scheme: Literal["light", "dark"]
) -> None:
    with chromium() as browser:
        page = loopback_context(browser, width, color_scheme=scheme).new_page()
        for name in ("data_report", "training_report", "evaluation_page"):
            file = Path(finished_run.result.json["artifacts"][name]["uri"], "files", "report.html")
            page.set_content(file.read_text(encoding="utf-8"))
            assert page.evaluate("document.documentElement.scrollWidth") <= width, name
            paper = lightness(page, "body", "backgroundColor")
            assert (paper > 0.5) == (scheme == "light")
            # Text of the page, of its verdict and of its charts stands out from what is behind it.
            assert abs(lightness(page, "p.lead", "color") - paper) > 0.5, name
            assert abs(lightness(page, "svg text", "fill") - paper) > 0.5, name
            behind = lightness(page, ".verdict", "backgroundColor")
            assert abs(lightness(page, ".verdict", "color") - behind) > 0.4, name
            # The answers and the recipe are closed.
            assert page.locator("details").count() > 0
            assert page.locator("details[open]").count() == 0


def lightness(page: Page, selector: str, name: str) -> float:
    """The lightness of a colour of the first matching element, between 0 and 1."""
    colour = page.locator(selector).first.evaluate(f"element => getComputedStyle(element).{name}")
    red, green, blue = map(int, re.findall(r"\d+", colour)[:3])
    return (0.2126 * red + 0.7152 * green + 0.0722 * blue) / 255


def test_a_port_in_use_is_refused(finished_run: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        process = Forked("tools.cli", ["dashboard", "--port", str(taken.getsockname()[1])], finished_run.env, ROOT)
        stdout, stderr = process.communicate(SECONDS_TO_START)
    assert process.wait() == 2
    assert "--port" in stderr
    assert stdout == ""
