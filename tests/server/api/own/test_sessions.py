"""/v1/sessions over HTTP: names, keys, errors, and what comes back. The engine's side is in engine/."""

from typing import Any

import pytest

from server.errors import QueueFull
from tests.server.conftest import BODY, CHAT, STREAM, Serve, error_of
from tests.server.scripted_engine import ScriptedEngine

A, B = {"Authorization": "Bearer key-a"}, {"Authorization": "Bearer key-b"}


def test_a_session_is_listed_and_looked_at(serve: Serve) -> None:
    server = serve(ScriptedEngine())
    server.http.post(CHAT, json=BODY)
    assert server.http.get("/v1/sessions").json() == {"object": "list", "data": [{"id": "s0", "tokens": 8}]}
    assert server.http.get("/v1/sessions/s0").json() == {"id": "s0", "tokens": 8}
    missing = server.http.get("/v1/sessions/s1")
    assert (missing.status_code, error_of(missing)["code"]) == (404, "session_not_found")


@pytest.mark.parametrize("name", ["plain", "team%2Fa", "team/a", "a%20b", "F%C3%BC%C3%9Fe", "x/fork", "save"])
def test_changes_reach_the_engine_with_the_name_that_was_meant(serve: Serve, name: str) -> None:
    server = serve(ScriptedEngine())
    meant = name.replace("%2F", "/").replace("%20", " ").replace("F%C3%BC%C3%9Fe", "Füße")
    for change in ("fork", "save", "restore"):
        assert server.http.post(f"/v1/sessions/{name}/{change}").json() == {"id": meant}
    assert server.http.delete(f"/v1/sessions/{name}").json() == {"id": meant}
    assert server.engine.changes == [(change, "", meant, None) for change in ("fork", "save", "restore", "delete")]


def test_a_fork_can_be_named(serve: Serve) -> None:
    server = serve(ScriptedEngine())
    assert server.http.post("/v1/sessions/a/fork", json={"id": "b"}).json() == {"id": "b"}
    assert server.engine.changes == [("fork", "", "a", "b")]


BAD_NAMES = ["..%2F..%2Fetc%2Fpasswd", "%2Fetc%2Fpasswd", "..%5Cx", "a%00b", "a%0Ab", "x" * 10_000, "%FF%FE"]


@pytest.mark.parametrize("name", BAD_NAMES)
@pytest.mark.parametrize(("method", "suffix"), [("GET", ""), ("DELETE", ""), ("POST", "/fork"), ("POST", "/save")])
def test_bad_names_go_no_further(serve: Serve, name: str, method: str, suffix: str) -> None:
    server = serve(ScriptedEngine())
    # As bytes on the wire: clients would tidy the dots away.
    request = server.http.build_request(method, "/v1/sessions/x")
    request.url = request.url.copy_with(raw_path=f"/v1/sessions/{name}{suffix}".encode())
    answer = server.http.send(request)
    assert 400 <= answer.status_code < 500
    error_of(answer)
    assert server.engine.changes == []


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"id": "../x"}, "invalid_value"),
        ({"id": "x" * 257}, "string_above_max_length"),
        ({"id": "a\nb"}, "invalid_value"),
        ({"id": 5}, "invalid_type"),
        ({"name": "b"}, "unknown_parameter"),
        ([], "invalid_type"),
    ],
)
def test_a_bad_fork_is_refused(serve: Serve, body: Any, code: str) -> None:
    server = serve(ScriptedEngine())
    answer = server.http.post("/v1/sessions/a/fork", json=body)
    assert (answer.status_code, error_of(answer)["code"]) == (400, code)
    assert server.engine.changes == []


def test_sessions_belong_to_their_key(serve: Serve) -> None:
    server = serve(ScriptedEngine(), api_keys=("key-a", "key-b"))
    server.http.post(CHAT, json={**BODY, "prompt_cache_key": "mine"}, headers=A)
    assert len(server.http.get("/v1/sessions", headers=A).json()["data"]) == 1
    assert server.http.get("/v1/sessions", headers=B).json()["data"] == []
    assert server.http.get("/v1/sessions/s0", headers=A).status_code == 200
    assert server.http.get("/v1/sessions/s0", headers=B).status_code == 404
    assert server.http.get("/v1/sessions").status_code == 401
    server.http.delete("/v1/sessions/mine", headers=A)
    server.http.delete("/v1/sessions/mine", headers=B)
    owners = [owner for _, owner, _, _ in server.engine.changes]
    assert owners[0] == server.engine.requests[0].owner != owners[1]
    assert not any(owner in ("", "key-a", "key-b") for owner in owners)


@pytest.mark.parametrize("body", [BODY, STREAM])
def test_the_name_comes_back(serve: Serve, body: dict[str, Any]) -> None:
    """Whichever way it was given, and with an error that comes after it was read."""
    server = serve(ScriptedEngine())
    answer = server.http.post(CHAT, json=body, headers={"X-Session-Affinity": "mine"})
    assert answer.headers["x-session-id"] == "mine"
    answer = server.http.post(CHAT, json={**body, "prompt_cache_key": " Füße 🦶 "})
    assert (b"x-session-id", "Füße 🦶".encode()) in answer.headers.raw
    assert "x-session-id" not in server.http.post(CHAT, json=body).headers
    full = serve(ScriptedEngine(submit_error=QueueFull()))
    answer = full.http.post(CHAT, json=body, headers={"X-Session-ID": "mine"})
    assert (answer.status_code, answer.headers["x-session-id"]) == (429, "mine")


def test_an_engine_that_stops_answering_is_noticed(serve: Serve) -> None:
    engine = ScriptedEngine()
    server = serve(engine)
    engine.stuck = True
    answer = server.http.post("/v1/sessions/a/save")
    assert (answer.status_code, error_of(answer)["code"]) == (503, "engine_dead")
