"""The page of a server that wants an API key and whose GPU failed its checks."""

import httpx
from playwright.sync_api import Browser, expect

from tests.page.browser import visiting
from tests.serving.launch import Server

KEY = {"Authorization": "Bearer schlüssel".encode()}


def test_a_key_is_asked_for_and_the_fallback_is_shown_with_its_reason(chrome: Browser, guarded: Server) -> None:
    with visiting(chrome, guarded.url) as visit:
        page = visit.page
        visit.refused = {401}
        page.goto(guarded.url)
        asked = page.get_by_role("dialog")
        expect(asked).to_contain_text("You didn't provide an API key.")
        expect(page.locator("#key")).to_be_focused()
        page.keyboard.press("Escape")
        page.keyboard.press("Escape")
        expect(asked).to_be_visible()
        page.keyboard.insert_text("wrong")
        page.keyboard.press("Enter")
        expect(asked).to_contain_text("Incorrect API key provided.")
        page.keyboard.insert_text("schlüssel")
        page.keyboard.press("Enter")
        expect(asked).to_be_hidden()

        told = httpx.get(f"{guarded.url}/v1/backend", headers=KEY).json()
        [fallback] = [one for one in told["fallbacks"] if one["from"] == "cuda"]
        assert (fallback["to"], fallback["code"]) == ("packed", "does_not_compile")
        shown = page.locator("#backend")
        expect(shown).to_contain_text("packed runs; the setting is auto.")
        expect(shown.locator(".reason")).to_have_text(told["reason"])
        entry = shown.locator(".fallbacks li").filter(has_text="cuda → packed")
        expect(entry.locator("code")).to_have_text("does_not_compile")
        expect(entry.locator("p")).to_have_text(fallback["reason"])
        assert "Unable to build metal library" in fallback["reason"]
        checks = {check["check"]: check for check in told["checks"]}
        assert shown.locator(".checks li").count() == len(told["checks"])
        for item in shown.locator(".checks li").all():
            check = checks.pop(item.locator(".name").inner_text())
            assert item.locator(".verdict").inner_text() == ("passed" if check["passed"] else "failed")
            assert item.locator("p").all_inner_texts() == [check["reason"]] * bool(check["reason"])
        assert not checks
        assert page.locator("#cache").evaluate("e => e.scrollWidth <= e.clientWidth")
        entry.scroll_into_view_if_needed()
        visit.picture("fallback")

        # It answers, and the key is this tab's alone.
        visit.answer_briefly(8)
        visit.send("Hello!")
        assert visit.name() in {
            row["id"] for row in httpx.get(f"{guarded.url}/v1/sessions", headers=KEY).json()["data"]
        }
        assert "schlüssel" in page.evaluate("Object.values(sessionStorage)")
        assert "schlüssel" not in str(page.evaluate("Object.values(localStorage)"))
        n_refused = sum(status == 401 for status, _ in visit.answered)
        page.reload()
        expect(page.locator("#backend .chosen")).to_be_visible()
        expect(asked).to_be_hidden()
        assert sum(status == 401 for status, _ in visit.answered) == n_refused
