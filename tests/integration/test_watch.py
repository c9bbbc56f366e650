"""The page of `watch` in a real browser, while a real run trains."""

from __future__ import annotations

import os
import re
import signal
import socket

import httpx
from playwright.sync_api import expect

from tests.conftest import free_port
from tests.integration.chromium import SECONDS_TO_START, chromium, loopback_context, needs_chromium, printed_url
from tests.integration.conftest import TIMEOUT_S, Project

SECONDS_TO_END = 30
SECONDS_TO_TRAIN = 240
# A run of this many epochs takes minutes, so it still trains when the page is read. The test ends it.
EPOCHS = 800


@needs_chromium
def test_the_page_follows_a_run_from_its_start_to_its_end_without_a_click(fresh_project: Project) -> None:
    watching = fresh_project.start("watch", "--port", str(free_port()))
    run = None
    try:
        url = printed_url(watching, r"Watching: (http://127\.0\.0\.1:\d+) \(Ctrl-C ends it\)")
        # A web site whose name resolves to this machine cannot read the page.
        assert httpx.get(url, headers={"Host": "evil.example"}, trust_env=False).status_code == 400
        with chromium() as browser:
            page = loopback_context(browser, 390, color_scheme="dark").new_page()
            page.goto(url)
            expect(page.get_by_text("No run trains on this machine.")).to_be_visible()

            # The page is not touched from here on: it loads itself again.
            epochs = f"sft.num_train_epochs={EPOCHS}"
            run = fresh_project.start("run", "sft", "--config", str(fresh_project.recipe), "--set", epochs)
            progress = page.get_by_text(re.compile(r"^sft: step [\d,]+ of 6,400, about .* left\.$"))
            expect(progress).to_be_visible(timeout=SECONDS_TO_TRAIN * 1000)
            before = progress.text_content()
            assert before
            expect(page.get_by_text(before)).not_to_be_visible(timeout=SECONDS_TO_START * 1000)
            expect(progress).to_be_visible()
            for heading in ("Loss", "Learning rate", "Speed"):
                expect(page.get_by_role("heading", name=heading, exact=True)).to_be_visible()
            assert page.locator("svg").count() == 3
            expect(page.get_by_role("columnheader", name="validation loss")).to_be_visible()
            assert page.evaluate("document.documentElement.scrollWidth") <= 390

            # A killed run cannot write that it has ended.
            os.kill(run.pid, signal.SIGKILL)
            expect(page.get_by_text("No run trains on this machine.")).to_be_visible(timeout=SECONDS_TO_START * 1000)
            expect(page.get_by_text(re.compile(r"^The last run was sft-\w+: step [\d,]+ of"))).to_be_visible()
            # The browser is still open. Its connections must not keep the server alive.
            watching.send_signal(signal.SIGINT)
            _, errors = watching.communicate(timeout=SECONDS_TO_END)
            assert (watching.returncode, errors) == (0, "")
    finally:
        watching.kill()
        watching.communicate()
        if run is not None:
            run.kill()
            run.communicate(TIMEOUT_S)


def test_a_port_in_use_is_refused(fresh_project: Project) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = fresh_project.command("watch", "--port", str(taken.getsockname()[1]))
    assert done.code == 2
    assert "make watch ARGS='--port N'" in done.stderr
