"""The pictures of docs/page.md: `python -m tests.page.screenshots [folder]`, by default docs/images.

A conversation with the bundled model that goes on until its session rotates, beside a few others.
"""

import io
import sys
import tempfile
from pathlib import Path

import httpx
from PIL import Image
from playwright.sync_api import ViewportSize, expect

from tests.page.browser import Visit, browser, chromium, visiting
from tests.serving.launch import Server, filler, running

DESK: ViewportSize = {"width": 1360, "height": 880}
PHONE: ViewportSize = {"width": 390, "height": 844}
TOLD = "My name is Anna and my locker code is 5917."


def main(folder: Path) -> None:
    if (executable := chromium()) is None:
        raise SystemExit("No Chromium: install one, or name it in TURBOCACHE_CHROMIUM.")
    folder.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as logs,
        running(Path(logs), MAX_SIZE="768", KV_MEMORY="96MiB") as server,
        browser(executable) as chrome,
        visiting(chrome, server.url, viewport=DESK) as visit,
    ):
        _others(server)
        _talk(visit)
        for scheme in ("light", "dark"):
            visit.page.emulate_media(color_scheme=scheme)
            _write(folder / f"page-{scheme}.png", visit.page.screenshot())
        visit.page.emulate_media(color_scheme="light")
        visit.page.locator("#backend-title").evaluate("e => e.scrollIntoView()")
        _write(folder / "page-backend.png", visit.page.locator("#cache").screenshot())
        visit.page.set_viewport_size(PHONE)
        visit.page.get_by_role("navigation").get_by_role("button", name="Cache").click()
        visit.page.locator("#cache").evaluate("e => e.scrollTo(0, 0)")
        _write(folder / "page-phone.png", visit.page.screenshot())


def _write(path: Path, picture: bytes) -> None:
    """As a PNG of 256 colours, a third of the bytes."""
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    image.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def _others(server: Server) -> None:
    """What other clients have begun."""
    for name, n_sentences in (("research/notes", 70), ("code-review", 24), ("title", 2)):
        messages = [{"role": "user", "content": f"Please read this: {filler(n_sentences, n_sentences)}"}]
        body = {"model": "default", "messages": messages, "max_tokens": 8, "prompt_cache_key": name}
        httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120).raise_for_status()


def _talk(visit: Visit) -> None:
    visit.open()
    visit.answer_briefly(40)
    visit.send(TOLD)
    for turn in range(4):
        visit.send(f"Please read this: {filler(16, turn)}")
    visit.send("Repeat after me: the river runs by the mill, and the mill runs by the river.")
    visit.send("What is my locker code?")
    expect(visit.page.locator("#turns li")).to_have_count(7)
    visit.page.locator("h1").click()  # nothing has the focus


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("docs/images"))
