"""server.http.open_requests over a real socket: deadlines, wherever a request has come to by then."""

import json
import socket
import threading
from contextlib import closing
from typing import Any

import openai
import pytest

from server.http.sse import KEEP_ALIVE
from server.protocol import Conversation, PrefillProgress, Prompt, TextDelta
from tests.server.conftest import BODY, CHAT, STREAM, Serve, Served, error_of, events_of
from tests.server.scripted_engine import ENDLESS, HELLO, SILENT, ScriptedEngine, Step, Wait, eventually

READING: tuple[Step, ...] = (PrefillProgress(1, 2), Wait(60.0))
ANSWERING: tuple[Step, ...] = (TextDelta("a"), Wait(60.0))


def phases(server: Served) -> dict[str, float]:
    """How many requests have missed their deadline, by phase."""
    names = ("arriving", "waiting", "prefill", "answer")
    counts = {name: server.metric(f'turbocache_deadlines_exceeded_total{{phase="{name}"}}') for name in names}
    return {name: count for name, count in counts.items() if count}


@pytest.mark.parametrize(
    ("body", "script", "phase"),
    [(BODY, SILENT, "waiting"), (STREAM, SILENT, "waiting"), (BODY, READING, "prefill")],
    ids=["whole, waiting", "stream, waiting", "whole, prefill"],
)
def test_before_anything_was_sent_it_is_a_504(
    serve: Serve, body: dict[str, Any], script: tuple[Step, ...], phase: str
) -> None:
    server = serve(ScriptedEngine(script), deadline=0.3)
    response = server.http.post(CHAT, json=body)
    error = error_of(response)
    assert (response.status_code, error["type"], error["code"]) == (504, "server_error", "deadline_exceeded")
    assert "0.3 seconds" in error["message"]
    assert "x-should-retry" not in response.headers
    assert server.engine.cancelled == [server.engine.requests[0].request_id]
    assert (server.outcomes(), phases(server)) == ({"error": 1}, {phase: 1})


def test_a_whole_answer_that_takes_too_long_is_a_504_that_is_not_worth_a_retry(serve: Serve) -> None:
    server = serve(ScriptedEngine(ANSWERING), deadline=0.3)
    response = server.http.post(CHAT, json=BODY)
    assert (response.status_code, error_of(response)["code"]) == (504, "deadline_exceeded")
    assert response.headers["x-should-retry"] == "false"
    assert phases(server) == {"answer": 1}


@pytest.mark.parametrize(
    ("script", "n_texts"),
    [(ANSWERING, 2), (READING, 0), (SILENT, 0)],
    ids=["amid text", "amid the prompt", "after comments"],
)
def test_a_stream_that_has_begun_ends_with_the_error(serve: Serve, script: tuple[Step, ...], n_texts: int) -> None:
    server = serve(ScriptedEngine(script), deadline=0.5, keepalive_seconds=0.1)
    response = server.http.post(CHAT, json=STREAM)
    *texts, last = events_of(response.text)
    assert (response.status_code, len(texts)) == (200, n_texts)
    assert json.loads(last)["error"]["code"] == "deadline_exceeded"
    assert KEEP_ALIVE in response.content
    assert server.engine.cancelled == [server.engine.requests[0].request_id]
    assert server.outcomes() == {"error": 1}


@pytest.mark.parametrize(("script", "n_tries"), [(SILENT, 2), (ANSWERING, 1)], ids=["waiting", "answer"])
def test_openai_client_asks_again_only_where_that_helps(serve: Serve, script: tuple[Step, ...], n_tries: int) -> None:
    server = serve(ScriptedEngine(script), deadline=0.2)
    with pytest.raises(openai.InternalServerError) as caught:
        server.openai.with_options(max_retries=1).chat.completions.create(
            model="default", messages=[{"role": "user", "content": "hi"}]
        )
    assert (caught.value.status_code, caught.value.code) == (504, "deadline_exceeded")
    assert len(server.engine.requests) == n_tries


def test_a_body_that_does_not_come(serve: Serve) -> None:
    server = serve(ScriptedEngine(), deadline=0.3)
    with closing(socket.create_connection(("127.0.0.1", server.port), timeout=5.0)) as connection:
        connection.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n{{".encode())
        assert connection.recv(65536).startswith(b"HTTP/1.1 504 ")
    assert server.engine.requests == []
    assert (server.outcomes(), phases(server)) == ({}, {"arriving": 1})


def test_a_prompt_that_takes_long_to_tokenise(serve: Serve) -> None:
    go_on = threading.Event()

    class Slow(ScriptedEngine):
        def tokenize(self, conversation: Conversation) -> Prompt:
            go_on.wait(10)
            return super().tokenize(conversation)

    server = serve(Slow(), deadline=0.3)
    response = server.http.post(CHAT, json=BODY)
    go_on.set()
    assert (response.status_code, error_of(response)["code"]) == (504, "deadline_exceeded")
    assert server.engine.requests == []


def test_a_change_of_a_session_that_does_not_happen(serve: Serve) -> None:
    server = serve(ScriptedEngine(), deadline=0.3)
    server.engine.stuck = True
    response = server.http.delete("/v1/sessions/one")
    assert (response.status_code, error_of(response)["code"]) == (504, "deadline_exceeded")


def test_whoever_ends_in_time_hears_nothing_of_it(serve: Serve) -> None:
    server = serve(ScriptedEngine((TextDelta("a"), Wait(0.2), *HELLO)), deadline=0.6)
    assert server.http.get("/v1/models").status_code == 200
    for _ in range(4):
        assert server.http.post(CHAT, json=BODY).status_code == 200
        assert events_of(server.http.post(CHAT, json=STREAM).text)[-1] == "[DONE]"
    assert server.engine.cancelled == []
    assert (server.outcomes(), phases(server)) == ({"stop": 8}, {})


def test_a_client_that_leaves_first_is_no_missed_deadline(serve: Serve) -> None:
    server = serve(ScriptedEngine(ENDLESS), deadline=0.5)
    with server.http.stream("POST", CHAT, json=STREAM) as response:
        next(response.iter_lines())
    assert eventually(lambda: server.outcomes() == {"cancelled": 1})
    assert phases(server) == {}
