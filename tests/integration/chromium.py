"""A real browser for the tests of pages. It can reach only loopback."""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, Route, sync_playwright

from tests.integration.preloaded import Forked

CHROMIUM = shutil.which("chromium")
CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SECONDS_TO_START = 120
SECONDS_TO_SHOW = 60
# The settings of a telephone for `loopback_context`.
TELEPHONE: dict[str, Any] = {"width": 390, "height": 844, "has_touch": True, "is_mobile": True}

needs_chromium = pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("CI"), reason="needs chromium on the PATH (Debian: apt install chromium)"
)


@contextmanager
def chromium() -> Iterator[Browser]:
    """The browser, until the end of the block."""
    assert CHROMIUM, "CI must have chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


def loopback_context(browser: Browser, width: int = 1280, height: int = 900, **settings: Any) -> BrowserContext:
    """A browser profile of its own, for a window of this size."""
    context = browser.new_context(viewport={"width": width, "height": height}, **settings)
    context.set_default_timeout(SECONDS_TO_SHOW * 1000)
    context.route("**/*", _loopback_only)
    return context


def check_touch(page: Page) -> None:
    """Check that a page fits the window, and that a finger can hit each control: 44 px in both directions.

    The target of a check box is its label.
    """
    small = page.evaluate(
        """() => [...document.querySelectorAll("a[href], button, input, select, textarea, summary")]
            .filter((one) => one.checkVisibility({visibilityProperty: true}) && !one.matches(".skip"))
            .filter((one) => {
              const box = (one.type === "checkbox" ? one.closest("label") : one).getBoundingClientRect();
              return box.width < 44 || box.height < 44;
            })
            .map((one) => one.outerHTML.slice(0, 200))"""
    )
    assert small == []
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0


def printed_url(process: Forked, pattern: str) -> str:
    """The address of a page in the first line that a command prints: the first group of `pattern`.

    A command that prints no line in time is killed, so that this returns.
    """
    watchdog = threading.Timer(SECONDS_TO_START, process.kill)
    watchdog.start()
    line = process.stdout.readline()
    watchdog.cancel()
    found = re.match(pattern, line)
    if found is None:
        process.kill()
        pytest.fail(f"printed {line!r} instead of the address; on stderr: {process.stderr.read()}")
    return found[1]


def _loopback_only(route: Route) -> None:
    if urlsplit(route.request.url).hostname == "127.0.0.1":
        route.continue_()
    else:
        route.abort()
