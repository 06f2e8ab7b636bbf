"""server.http.generation over a real socket: signs of life, clients that leave, and exactly one outcome."""

import json
import socket
import time
from typing import Any

import openai
import pytest

from server.errors import OutOfMemory
from server.http.sse import KEEP_ALIVE
from server.protocol import Failed, Finished, PrefillProgress, TextDelta
from tests.server.conftest import BODY, CHAT, STREAM, Serve, Served, error_of, events_of
from tests.server.scripted_engine import ENDLESS, HELLO, SILENT, USAGE, Die, ScriptedEngine, Step, Wait, eventually


@pytest.mark.parametrize(
    "prefill", [(Wait(0.7),), (PrefillProgress(1, 9), Wait(0.05)) * 14], ids=["silent", "with progress"]
)
def test_keep_alive_comments_during_a_slow_prefill(serve: Serve, prefill: tuple[Step, ...]) -> None:
    server = serve(ScriptedEngine([*prefill, *HELLO]), keepalive_seconds=0.1)
    received = server.http.post(CHAT, json=STREAM).content
    before = received.partition(b"data:")[0]
    assert before.count(KEEP_ALIVE) >= 3
    assert before.replace(KEEP_ALIVE, b"") == b""
    assert received.endswith(b"data: [DONE]\n\n")


def test_openai_client_reads_over_comments(serve: Serve) -> None:
    server = serve(ScriptedEngine([Wait(0.4), *HELLO]), keepalive_seconds=0.1)
    chunks = server.openai.chat.completions.create(
        model="default", messages=[{"role": "user", "content": "hi"}], stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Hello!"


def raw_request(server: Served, body: dict[str, Any]) -> socket.socket:
    """An open connection that has sent a whole request."""
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=5.0)
    payload = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(payload)}\r\n\r\n"
    connection.sendall(head.encode() + payload)
    return connection


@pytest.mark.parametrize("body", [BODY, STREAM], ids=["whole", "stream"])
@pytest.mark.parametrize("script", [SILENT, ENDLESS], ids=["before text", "amid text"])
def test_a_client_that_leaves_has_its_work_cancelled_once(
    serve: Serve, body: dict[str, Any], script: tuple[Step, ...]
) -> None:
    # The keep-alive is far away: noticing must not depend on having something to send.
    server = serve(ScriptedEngine(script), keepalive_seconds=30.0)
    connection = raw_request(server, body)
    assert eventually(lambda: server.engine.requests)
    time.sleep(0.1)
    connection.close()
    assert eventually(lambda: server.engine.cancelled, seconds=2.0)
    time.sleep(0.2)
    assert server.engine.cancelled == [server.engine.requests[0].request_id]
    assert server.outcomes() == {"cancelled": 1}


def test_a_client_that_leaves_a_stream_it_was_reading(serve: Serve) -> None:
    server = serve(ScriptedEngine(ENDLESS))
    with server.openai.chat.completions.create(
        model="default", messages=[{"role": "user", "content": "hi"}], stream=True
    ) as stream:
        for _, _chunk in zip(range(3), stream, strict=False):
            pass
    assert eventually(lambda: server.engine.cancelled, seconds=2.0)
    assert eventually(lambda: server.outcomes() == {"cancelled": 1})
    server.engine.script = HELLO
    assert server.http.post(CHAT, json=BODY).status_code == 200


def test_a_finished_turn_is_not_cancelled(serve: Serve) -> None:
    server = serve(ScriptedEngine())
    for body in (BODY, STREAM):
        connection = raw_request(server, body)
        assert connection.recv(65536)
        time.sleep(0.1)
        connection.close()
    time.sleep(0.2)
    assert server.engine.cancelled == []
    assert server.outcomes() == {"stop": 2}


def test_a_client_that_leaves_amid_its_body(serve: Serve) -> None:
    server = serve(ScriptedEngine())
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=5.0)
    connection.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n{{".encode())
    time.sleep(0.1)
    connection.close()
    counted = 'turbocache_http_requests_total{path="/v1/chat/completions",status="499"}'
    assert eventually(lambda: server.metric(counted) == 1)
    assert server.engine.requests == []


@pytest.mark.parametrize("body", [BODY, STREAM], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("script", "outcome"),
    [
        (HELLO, "stop"),
        ((*HELLO, Finished("length", USAGE)), "stop"),
        ((*HELLO, Failed(OutOfMemory())), "stop"),
        ((*HELLO, TextDelta("AFTERWARDS")), "stop"),
        ((Finished("length", USAGE),), "length"),
        ((Failed(OutOfMemory()), *HELLO), "error"),
        ((TextDelta("a"), Failed(OutOfMemory()), Failed(OutOfMemory())), "error"),
        ((TextDelta("a"), Wait(0.05), Failed(ValueError("inside"))), "error"),
        ((TextDelta("a"), Die()), "error"),
        ((Die(),), "error"),
    ],
)
def test_exactly_one_outcome(serve: Serve, script: tuple[Step, ...], outcome: str, body: dict[str, Any]) -> None:
    server = serve(ScriptedEngine(script), keepalive_seconds=0.2)
    response = server.http.post(CHAT, json=body)
    time.sleep(0.1)
    assert server.outcomes() == {outcome: 1}
    assert server.metric("turbocache_request_duration_seconds_count") == 1
    if body is STREAM and response.status_code == 200:
        ends = [event for event in events_of(response.text) if event == "[DONE]" or "error" in json.loads(event)]
        finishes = [event for event in events_of(response.text) if '"finish_reason":"' in event]
        assert (len(ends), len(finishes)) == (1, 0 if outcome == "error" else 1)
        assert "AFTERWARDS" not in response.text
    else:
        assert (response.status_code == 200) == (outcome != "error")


def test_an_early_failure_of_a_stream_has_its_status(serve: Serve) -> None:
    server = serve(ScriptedEngine([Failed(OutOfMemory(retry_after=3))]))
    response = server.http.post(CHAT, json=STREAM)
    assert (response.status_code, response.headers["retry-after"]) == (503, "3")
    assert error_of(response)["code"] == "out_of_memory"


def test_a_failure_amid_a_stream(serve: Serve) -> None:
    server = serve(ScriptedEngine([TextDelta("a"), Wait(0.05), Failed(OutOfMemory("No room."))]))
    response = server.http.post(CHAT, json=STREAM)
    assert response.status_code == 200
    assert json.loads(events_of(response.text)[-1])["error"]["message"] == "No room."
    with pytest.raises(openai.APIError, match=r"No room\."):
        list(
            server.openai.chat.completions.create(
                model="default", messages=[{"role": "user", "content": "hi"}], stream=True
            )
        )


def test_a_foreign_failure_tells_the_client_nothing_but_the_id(serve: Serve) -> None:
    server = serve(ScriptedEngine([TextDelta("a"), Failed(ValueError("a secret"))]))
    response = server.http.post(CHAT, json=BODY)
    assert response.status_code == 500
    assert response.headers["x-request-id"] in error_of(response)["message"]
    assert "secret" not in response.text


@pytest.mark.parametrize("body", [BODY, STREAM], ids=["whole", "stream"])
def test_an_engine_that_dies_or_sticks_fails_its_requests(serve: Serve, body: dict[str, Any]) -> None:
    server = serve(ScriptedEngine(SILENT))
    assert server.http.get("/health").json() == {"status": "ok", "detail": "running"}
    server.engine.stuck = True
    response = server.http.post(CHAT, json=body)
    assert (response.status_code, error_of(response)["code"]) == (503, "engine_dead")
    assert server.engine.cancelled == [server.engine.requests[0].request_id]
    health = server.http.get("/health")
    assert (health.status_code, health.json()["status"]) == (503, "unavailable")
    assert "stuck" in health.json()["detail"]


def test_health_of_a_dead_engine(serve: Serve) -> None:
    server = serve(ScriptedEngine([Die()]))
    assert server.http.post(CHAT, json=BODY).status_code == 503
    health = server.http.get("/health")
    assert (health.status_code, "dead" in health.json()["detail"]) == (503, True)
