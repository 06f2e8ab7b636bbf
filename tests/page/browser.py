"""A real Chromium that looks at the page, and what must hold of every visit."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import Browser, ConsoleMessage, Page, Request, Response, expect, sync_playwright

from tests.serving.launch import BUNDLED

FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE = 60_000.0
"""Milliseconds: a busy machine takes seconds for a short answer."""
PICTURES = Path("build/page")

FORBID = """(logit_bias) => {
  const plain = window.fetch;
  window.fetch = (address, options) => {
    if (!String(address).endsWith("/chat/completions")) return plain(address, options);
    return plain(address, { ...options, body: JSON.stringify({ ...JSON.parse(options.body), logit_bias }) });
  };
}"""

expect.set_options(timeout=PATIENCE)


def chromium() -> str | None:
    """Where a Chromium is: TURBOCACHE_CHROMIUM, else one on PATH, else None."""
    return os.environ.get("TURBOCACHE_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def browser(executable: str) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=executable, args=list(FLAGS), timeout=PATIENCE)
        yield running
        running.close()


@dataclass
class Visit:
    """The page of a server in a fresh browser profile. `refused` are HTTP statuses that the visit brings about on
    purpose; `offline`: it also cuts the connection.
    """

    page: Page
    origin: str
    refused: set[int] = field(default_factory=set)
    offline: bool = False
    requests: list[Request] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    answered: list[tuple[int, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.set_default_timeout(PATIENCE)
        self.page.on("request", lambda request: self.requests.append(request))
        self.page.on("response", self._note_response)
        self.page.on("requestfailed", self._note_failure)
        self.page.on("console", self._note_message)
        self.page.on("pageerror", lambda error: self.wrong.append(f"page error: {error}"))

    def _note_response(self, response: Response) -> None:
        self.answered.append((response.status, response.url))

    def _note_failure(self, request: Request) -> None:
        # The page itself ends an answer that is stopped, and requests under way end with a reload.
        if request.failure != "net::ERR_ABORTED" and not self.offline:
            self.wrong.append(f"failed: {request.method} {request.url}: {request.failure}")

    def _note_message(self, message: ConsoleMessage) -> None:
        status = re.search(r"the server responded with a status of (\d+)", message.text)
        told = (status is not None and int(status[1]) in self.refused) or (self.offline and "net::ERR_" in message.text)
        if message.type in ("error", "warning") and not told:
            self.wrong.append(f"console: {message.text}")

    def check(self) -> None:
        """Raises AssertionError for errors, failed requests and requests to anywhere else."""
        assert self.wrong == []
        assert {status for status, _ in self.answered if status >= 400} <= self.refused
        assert self.requests
        assert {"{0.scheme}://{0.netloc}".format(urlsplit(request.url)) for request in self.requests} == {self.origin}

    def open(self) -> None:
        """Load the page and wait until it knows its server."""
        self.page.goto(self.origin)
        expect(self.page.locator("#backend .chosen")).to_be_visible()

    def send(self, text: str) -> None:
        """Write a message and send it, by keyboard; returns when the answer has ended and the cache is shown."""
        self.page.locator("#message").focus()
        self.page.keyboard.insert_text(text)
        n_answers = self.page.locator(".answer").count()
        self.page.keyboard.press("Enter")
        expect(self.page.locator(".answer")).to_have_count(n_answers + 1)
        self.wait_for_answer()

    def wait_for_answer(self) -> None:
        expect(self.page.locator("#stop")).to_be_hidden()
        expect(self.page.locator("#chat-state")).to_contain_text("in memory")

    def answer_briefly(self, most: int = 24) -> None:
        """Greedy answers of at most so many tokens, set by keyboard, as the rest of a visit."""
        self.page.locator(".options summary").focus()
        for step in ("Enter", "Tab", "0", "Tab", *str(most), "Shift+Tab", "Shift+Tab", "Enter", "Shift+Tab"):
            self.page.keyboard.press(step)
        expect(self.page.locator("#message")).to_be_focused()

    def forbid_ends(self) -> None:
        """Answers from now on end at their limit: the tokens that end one are forbidden, which the page can't ask."""
        ends = json.loads((BUNDLED / "generation_config.json").read_text())["eos_token_id"]
        self.page.evaluate(FORBID, {str(token): -100 for token in ends})

    def part(self, name: str) -> str:
        """A line of the ring's legend: what it says of one part."""
        return self.page.locator(f'.legend [data-part="{name}"] dd').inner_text()

    def name(self) -> str:
        """Of the selected session."""
        return self.page.locator("#chat-state").inner_text().partition(" · ")[0]

    def picture(self, name: str) -> None:
        PICTURES.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=PICTURES / f"{name}.png")


@contextmanager
def visiting(browser: Browser, origin: str, **context: Any) -> Iterator[Visit]:
    """A visit with a profile of its own; `context` as Playwright's, such as a viewport. What must hold of it is checked
    at its end.
    """
    options: dict[str, Any] = {"viewport": {"width": 1280, "height": 800}, "reduced_motion": "reduce"} | context
    profile = browser.new_context(**options)
    visit = Visit(profile.new_page(), origin)
    try:
        yield visit
        visit.check()
    except Exception as error:
        visit.picture("failed")
        error.add_note(f"The page showed:\n{visit.page.locator('body').inner_text()}\nNoted: {visit.wrong}")
        raise
    finally:
        profile.close()
