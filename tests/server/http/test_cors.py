"""server.http.cors: what a browser is told about other origins."""

import json

import httpx
import pytest

from server.errors import QueueFull
from tests.server.conftest import BODY, CHAT, Serve, error_of
from tests.server.scripted_engine import ScriptedEngine

PAGE = "http://localhost:3000"
DROPPED = {"x-turbocache-overflow", "x-turbocache-dropped-tokens", "x-turbocache-dropped-turns"}
EXPOSED = {"x-session-id", "x-request-id", "retry-after", *DROPPED}


def preflight(http: httpx.Client, origin: str) -> httpx.Response:
    """What a browser asks before a page of `origin` may send a chat request with an API key."""
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,x-session-id"}
    return http.options(CHAT, headers={"Origin": origin, **asked})


def listed(header: str) -> set[str]:
    return {part.strip().lower() for part in header.split(",")}


def test_without_a_list_nothing_is_said(serve: Serve) -> None:
    server = serve(ScriptedEngine())
    for response in (
        preflight(server.http, PAGE),
        server.http.post(CHAT, json=BODY, headers={"Origin": PAGE}),
    ):
        assert not [name for name in response.headers if name.startswith("access-control")]
        assert "vary" not in response.headers


def test_a_preflight_needs_no_key(serve: Serve) -> None:
    server = serve(ScriptedEngine(), cors_origins=("https://chat.example", PAGE), api_keys=("secret",))
    response = preflight(server.http, PAGE)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == PAGE
    assert {"authorization", "x-session-id"} <= listed(response.headers["access-control-allow-headers"])
    assert listed(response.headers["access-control-allow-methods"]) == {"get", "post", "delete"}
    assert "access-control-allow-credentials" not in response.headers
    # The request itself does.
    assert server.http.post(CHAT, json=BODY, headers={"Origin": PAGE}).status_code == 401


def test_a_page_in_the_list_may_read_answers_and_errors(serve: Serve) -> None:
    server = serve(ScriptedEngine(), cors_origins=(PAGE,), api_keys=("secret",))
    headers = {"Origin": PAGE, "Authorization": "Bearer secret", "X-Session-ID": "mine"}
    answer = server.http.post(CHAT, json=BODY, headers=headers)
    refused = server.http.post(CHAT, json=BODY, headers={"Origin": PAGE})
    unknown = server.http.get("/nowhere", headers=headers)
    server.engine.submit_error = QueueFull()
    full = server.http.post(CHAT, json=BODY, headers=headers)
    server.engine.tokenize_error = ZeroDivisionError()
    failed = server.http.post(CHAT, json=BODY, headers=headers)
    assert [r.status_code for r in (answer, refused, unknown, full, failed)] == [200, 401, 404, 429, 500]
    for response in (answer, refused, unknown, full, failed):
        assert response.headers["access-control-allow-origin"] == PAGE
        assert listed(response.headers["access-control-expose-headers"]) == EXPOSED
        assert "origin" in listed(response.headers["vary"])
    assert answer.headers["x-session-id"] == "mine"
    assert full.headers["retry-after"] == "1"


@pytest.mark.parametrize("origin", ["http://localhost:3001", "https://localhost:3000", "http://evil.example", "null"])
def test_a_page_that_is_not_in_the_list_may_not(serve: Serve, origin: str) -> None:
    server = serve(ScriptedEngine(), cors_origins=(PAGE,))
    response = preflight(server.http, origin)
    assert response.status_code == 400
    assert "access-control-allow-origin" not in response.headers
    answer = server.http.post(CHAT, json=BODY, headers={"Origin": origin})
    assert "access-control-allow-origin" not in answer.headers


def test_a_star_is_for_all(serve: Serve) -> None:
    server = serve(ScriptedEngine(), cors_origins=("*",))
    assert preflight(server.http, "http://any.example").headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize("origin", [PAGE, "null", "https://evil.example", "app://obsidian.md"])
def test_a_page_of_another_origin_can_have_nothing_done(serve: Serve, origin: str) -> None:
    """Not even with what browsers send without asking: a simple request, whose answer the page could not read."""
    server = serve(ScriptedEngine())
    simple = {"Origin": origin, "Content-Type": "text/plain"}
    for response in (
        server.http.post(CHAT, content=json.dumps(BODY), headers=simple),
        server.http.post("/v1/sessions/mine/fork", headers=simple),
        server.http.delete("/v1/sessions/mine", headers=simple),
    ):
        assert response.status_code == 403
        error = error_of(response)
        assert error["code"] == "origin_not_allowed"
        assert "TURBOCACHE_CORS_ORIGINS" in error["message"]
    assert not server.engine.requests
    assert not server.engine.changes
    assert server.http.get("/v1/models", headers={"Origin": origin}).status_code == 200


@pytest.mark.parametrize("allowed", [(PAGE,), ("*",)])
def test_pages_of_the_list_and_of_the_server_itself_can(serve: Serve, allowed: tuple[str, ...]) -> None:
    server = serve(ScriptedEngine(), cors_origins=allowed)
    own = f"http://127.0.0.1:{server.port}"
    for origin in (PAGE, own):
        assert server.http.post(CHAT, json=BODY, headers={"Origin": origin}).status_code == 200
    assert serve(ScriptedEngine()).http.post(CHAT, json=BODY, headers={"Origin": own}).status_code == 403
