"""The page in a browser: a conversation is held, what it shows follows, and everybody can read and use it."""

import re
from itertools import pairwise

import httpx
import pytest
from playwright.sync_api import expect

from tests.page.conftest import Visits
from tests.page.measures import CONTRASTS, SMALL, rings
from tests.serving.launch import Server, filler

PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True, "device_scale_factor": 2}
WATCH = """() => {
  window.watched = { texts: new Set(), rings: new Set() };
  const look = () => {
    const text = document.querySelector(".answer:last-child > .text")?.textContent;
    const running = document.querySelector("#stop:not([hidden])") !== null;
    const ring = document.querySelector("#ring svg")?.getAttribute("aria-label");
    if (running && text) watched.texts.add(text.length);
    if (running && ring) watched.rings.add(ring);
  };
  new MutationObserver(look).observe(document.body, { subtree: true, childList: true, characterData: true });
}"""
COUNTS = re.compile(r"([\d,]+) cached, ([\d,]+) computed, ([\d,]+) generated")


def counts(text: str) -> tuple[int, int, int]:
    """Cached, computed and generated tokens of a turn, as the page words them."""
    found = COUNTS.search(text)
    assert found is not None, text
    cached, computed, generated = (int(number.replace(",", "")) for number in found.groups())
    return cached, computed, generated


def test_a_chat_is_held_by_keyboard_and_the_ring_moves(server: Server, visits: Visits) -> None:
    with visits() as visit:
        page = visit.page
        visit.open()
        expect(page.locator("#message")).to_be_focused()
        expect(page.locator("#ring")).to_contain_text("It begins with the first turn")
        visit.answer_briefly(40)

        page.evaluate(WATCH)
        visit.send("Repeat after me: " + filler(4, 1))
        name = visit.name()
        row = server.sessions()[name]
        # It came in pieces, and the ring was drawn anew while it did.
        texts, rings = page.evaluate("[[...watched.texts], [...watched.rings]]")
        assert len(texts) > 10
        assert texts == sorted(texts)
        assert rings  # of a first turn: it was drawn before the answer had ended
        _, computed, generated = counts(page.locator(".answer .turn").inner_text())
        assert computed + generated == row["tokens_seen"]
        assert visit.part("seen") == f"{row['tokens_seen']} tokens"
        assert visit.part("sink") == "64 tokens, raw, never rotated out"
        assert visit.part("gone") == "0 pages, 0 tokens"
        assert visit.part("point") == f"reached in {192 - int(str(row['tokens_seen']))} tokens"
        before = page.locator("#ring path.point").get_attribute("d")

        # The second turn finds the first one in the cache.
        cached_before = server.metric("prompt_tokens_total", source="cached")
        visit.send("What is my locker code?")
        second = page.locator("#turns li").nth(1)
        cached, *_ = counts(second.inner_text())
        assert cached == computed + generated
        assert cached == server.metric("prompt_tokens_total", source="cached") - cached_before
        assert counts(page.locator(".answer .turn").nth(1).inner_text())[0] == cached
        widths = [second.locator(f".{kind}").evaluate("e => e.offsetWidth") for kind in ("cached", "computed")]
        assert widths[0] > widths[1] > 0

        # Until it rotates.
        visit.send("Please read this: " + filler(16, 2))
        row = server.sessions()[name]
        ring = row["ring"]
        assert isinstance(ring, dict)
        assert ring["first_page"] > 0
        assert row["tokens_seen"] == ring["offset"] > 192
        expect(page.locator("#ring .figure")).to_have_text(str(row["tokens_held"]))
        assert visit.part("gone").startswith(f"{ring['first_page']} page")
        assert visit.part("window") == f"{ring['window_tokens']} tokens, raw, the newest"
        assert visit.part("page").startswith(f"{ring['pages']} of 64 tokens")
        assert "new tokens replace the oldest" in visit.part("point")
        assert page.locator("#ring path.point").get_attribute("d") != before
        assert page.locator("#ring path.page").count() >= ring["pages"] - 1
        expect(page.get_by_text("its oldest tokens have rotated out")).to_have_count(1)
        expect(page.get_by_role("meter")).to_have_attribute("aria-valuetext", re.compile(r"\d+ %"))
        visit.picture("light")
        page.emulate_media(color_scheme="dark")
        visit.picture("dark")

        # Posts of the page come from where it is, and it comes back with its texts.
        posts = [request for request in visit.requests if request.method == "POST"]
        assert {request.all_headers()["origin"] for request in posts} == {server.url}
        assert {request.all_headers()["x-session-id"] for request in posts} == {name}
        page.reload()
        expect(page.locator(".message")).to_have_count(6)
        expect(page.locator("#turns li")).to_have_count(3)
        assert visit.name() == name


def test_an_answer_is_stopped_and_sessions_are_forked_and_deleted(server: Server, visits: Visits) -> None:
    with visits() as visit:
        page = visit.page
        visit.open()
        visit.forbid_ends()
        page.keyboard.insert_text("Please read this: " + filler(14, 4))
        with page.expect_request("**/v1/chat/completions") as asked:
            page.keyboard.press("Enter")
        assert "logit_bias" in (asked.value.post_data or "")
        # While it answers the ring moves.
        ring = page.get_by_role("img", name=re.compile("^Ring: "))
        first = ring.get_attribute("aria-label")
        assert first is not None
        expect(ring).not_to_have_attribute("aria-label", first)
        expect(page.locator("#stop")).to_be_visible()
        expect(page.locator("#delete")).to_be_disabled()
        expect(page.locator("#session-list button[aria-current] .about")).to_contain_text("answering")
        page.keyboard.press("Escape")
        expect(page.locator(".answer .hint")).to_contain_text("Stopped")
        visit.wait_for_answer()
        name = visit.name()
        expect(page.locator("#message")).to_be_focused()
        server.wait_until_idle()

        page.get_by_role("button", name="Fork").press("Enter")
        expect(page.locator("#chat-state")).not_to_contain_text(name)
        fork = visit.name()
        expect(page.locator(".message")).to_have_count(2)
        expect(page.locator("#session-list button[aria-current] .title")).to_have_text(re.compile("Please read this"))
        both = server.sessions()
        assert both[fork]["tokens_seen"] == both[name]["tokens_seen"]

        delete = page.locator("#delete")
        expect(delete).to_be_enabled()
        delete.press("Enter")
        expect(page.get_by_role("button", name="Keep")).to_be_focused()
        page.keyboard.press("Escape")
        expect(delete).to_be_focused()
        assert fork in server.sessions()
        page.keyboard.press("Enter")
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        expect(page.locator("#chat-state")).to_contain_text(name)
        assert fork not in server.sessions()
        assert name in server.sessions()
        assert [key for key in page.evaluate("Object.keys(localStorage)") if fork in key] == []


def test_other_clients_sessions_are_shown_and_every_text_stays_text(server: Server, visits: Visits) -> None:
    markup = "<script>document.title = 'gone'</script><img src=x onerror=\"document.title = 'gone'\">"
    body = {"model": "default", "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 4}
    httpx.post(f"{server.url}/v1/chat/completions", json=body | {"prompt_cache_key": markup}).raise_for_status()
    with visits() as visit:
        page = visit.page
        visit.open()
        visit.answer_briefly(16)
        visit.send(f"Repeat after me: {markup}")
        expect(page.locator(".user .text")).to_have_text(f"Repeat after me: {markup}")
        page.get_by_role("button", name=markup).press("Enter")
        expect(page.locator("#chat-title")).to_have_text(markup)
        expect(page.locator("#log")).to_contain_text("it can't be continued here")
        expect(page.locator("#composer")).to_be_hidden()
        expect(page.get_by_role("img", name=re.compile("^Ring: "))).to_be_visible()
        assert visit.part("seen") == f"{server.sessions()[markup]['tokens_seen']} tokens"
        assert page.title() == "turbocache"
        assert page.locator("body script, #log img, #sessions img").count() == 0


def test_refusals_are_shown_in_the_servers_words(visits: Visits) -> None:
    with visits() as visit:
        page = visit.page
        visit.refused = {400}
        visit.open()
        page.locator(".options summary").press("Enter")
        page.locator("#temperature").fill("9")
        page.locator("#most-tokens").fill("8")
        page.locator("#message").fill("Hello!")
        page.keyboard.press("Enter")
        words = "Invalid 'temperature': decimal above maximum value. Expected a value <= 2, but got 9 instead."
        expect(page.locator(".answer .error")).to_have_text(words)
        page.locator("#temperature").fill("0")
        page.get_by_role("button", name="Try again").click()
        expect(page.locator(".answer .turn")).to_be_visible()
        expect(page.locator(".error")).to_have_count(0)
        assert page.locator(".message").count() == 2


def test_a_lost_connection_is_told_and_found_again(visits: Visits) -> None:
    with visits() as visit:
        visit.open()
        visit.offline = True
        visit.page.context.set_offline(True)
        expect(visit.page.get_by_role("alert")).to_have_text("The server can't be reached.")
        visit.page.context.set_offline(False)
        expect(visit.page.get_by_role("alert")).to_be_hidden()


STREAM = """data: {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}

: keep-alive

data: {"choices": [{"index": 0, "delta": {"reasoning_content": "First, a thought."}}]}

data: {"choices": [{"index": 0, "delta": {"content": "Then a word"}}]}

data: {"error": {"message": "A step failed.", "type": "server_error", "param": null, "code": "kernel_fault"}}

"""


def test_thoughts_are_folded_and_an_error_amid_an_answer_is_shown(visits: Visits) -> None:
    """Neither is to be had from the bundled model: the stream is played to the page."""
    with visits() as visit:
        page = visit.page
        visit.open()
        page.route("**/v1/chat/completions", lambda route: route.fulfill(body=STREAM, content_type="text/event-stream"))
        page.locator("#message").fill("Hello!")
        page.keyboard.press("Enter")
        expect(page.locator(".answer .error")).to_have_text("A step failed.")
        expect(page.locator(".answer > .text")).to_have_text("Then a word")
        thought = page.locator(".thought .text")
        expect(thought).to_be_hidden()
        page.locator(".thought summary").press("Enter")
        expect(thought).to_have_text("First, a thought.")


def test_the_model_s_licence_and_origin_are_shown(visits: Visits) -> None:
    with visits() as visit:
        visit.open()
        expect(visit.page.locator("#model")).to_have_text("tiny-recall-4bit · other")
        figures = visit.page.locator("#backend .figures")
        for name, value in (("Model", "tiny-recall-4bit"), ("Licence", "other"), ("Origin", "made for turbocache")):
            expect(figures.locator("div", has=visit.page.get_by_text(name, exact=True))).to_contain_text(value)


@pytest.mark.parametrize(("origin", "n_links"), [("https://example.org/a/model", 1), ("javascript:alert(1)", 0)])
def test_only_an_address_of_the_web_is_a_link(visits: Visits, origin: str, n_links: int) -> None:
    """A model's card is somebody else's text."""
    with visits(**PHONE) as visit:
        listing = {"data": [{"id": "a/model", "max_model_len": 512, "license": None, "origin": origin}]}
        visit.page.route("**/v1/models", lambda route: route.fulfill(json=listing))
        visit.page.goto(visit.origin)
        visit.page.get_by_role("navigation").get_by_role("button", name="Cache").tap()
        expect(visit.page.locator("#backend .figures")).to_contain_text(origin.removeprefix("https://"))
        assert visit.page.locator("#backend a").count() == n_links


def test_a_phone_shows_all_of_it(visits: Visits) -> None:
    with visits(**PHONE) as visit:
        page = visit.page
        page.goto(visit.origin)
        page.locator(".options summary").tap()
        page.locator("#most-tokens").fill("8")
        page.locator("#message").fill("x" * 300)
        page.get_by_role("button", name="Send").tap()
        expect(page.locator(".answer .turn, .answer .error")).to_be_visible()
        for view in ("Sessions", "Chat", "Cache"):
            page.get_by_role("navigation").get_by_role("button", name=view).tap()
            expect(page.locator(f"#{view.lower()}")).to_be_visible()
            assert page.evaluate("document.documentElement.scrollWidth") == 390
            inner = page.evaluate(
                "[...document.querySelectorAll('main > *')].filter(e => e.scrollWidth > e.clientWidth).length"
            )
            assert inner == 0
            assert page.evaluate(SMALL) == []
            visit.picture(f"phone-{view.lower()}")
        expect(page.locator("#whose")).to_be_visible()


def test_every_text_stands_out_in_light_and_dark(visits: Visits) -> None:
    with visits() as visit:
        visit.open()
        visit.answer_briefly(8)
        visit.send("Hello!")
        visit.page.locator("details").evaluate_all("all => all.forEach((one) => (one.open = true))")
        grounds = set()
        for scheme in ("light", "dark"):
            visit.page.emulate_media(color_scheme=scheme)
            contrasts = visit.page.evaluate(CONTRASTS)
            assert len(contrasts) > 40
            assert {text: ratio for text, ratio in contrasts.items() if ratio < 4.5} == {}
            grounds.add(visit.page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert len(grounds) == 2


def test_everything_has_a_name_and_a_place_in_the_order_of_tabs(visits: Visits) -> None:
    with visits() as visit:
        page = visit.page
        visit.open()
        nameless = page.get_by_role("button", name="", exact=True).or_(page.get_by_role("textbox", name="", exact=True))
        assert [node.inner_text() for node in nameless.all() if not node.inner_text().strip()] == []
        page.locator(".skip").focus()
        reached = ["skip"]
        for _ in range(20):
            page.keyboard.press("Tab")
            reached.append(page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
            outlined = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            assert outlined != "none", reached
            if reached[-1].endswith("compressed with k6v4"):
                break
        wanted = ["skip", "new", "log", "message", "Options", "send", "cache"]
        assert [name for name in reached if name in wanted] == wanted


def test_rings_of_any_length_close_without_overlap(visits: Visits) -> None:
    limit = 131_072
    with visits() as visit:
        visit.open()
        told = rings()
        shapes = visit.page.evaluate(
            "async ([rings, limit]) => { const { shapeOf } = await import(document.baseURI + 'page/ring-shape.js');"
            " return rings.map((ring) => shapeOf(ring, limit)); }",
            [told, limit],
        )
    for ring, shape in zip(told, shapes, strict=True):
        arcs = shape["arcs"]
        size = ring["max_size"] or limit
        assert len(arcs) <= 96 + 4
        assert all(0 <= arc["from"] < arc["to"] <= 1 for arc in arcs), ring
        ages = [arc["age"] for arc in arcs if arc["kind"] == "page"]
        assert ages == sorted(ages)
        assert not ages or min(ages) >= 0 >= max(ages) - 1
        # What is held fills its share of the circle; a tiny sink or window is drawn larger than it is.
        held = min(ring["offset"], size)
        assert sum(arc["to"] - arc["from"] for arc in arcs) == pytest.approx(held / size, abs=0.035), ring
        ordered = sorted(arcs, key=lambda arc: arc["from"])
        for one, other in pairwise(ordered):
            widened = 0.0121 if "window" in (one["kind"], other["kind"]) else 0.0
            assert one["to"] <= other["from"] + 1e-9 + widened, ring
        assert (shape["point"] is None) is (ring["max_size"] is None)
        if ring["max_size"] is not None and ring["offset"] > size:
            assert shape["point"] == pytest.approx(shape["head"], abs=64 / size), ring
