"""Deadlines and clients that leave, at a real server: work ends within a step, and what was computed is kept."""

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.processes import patient
from tests.serving.launch import Server, endless, filler, running

pytestmark = pytest.mark.slow  # each starts a server of its own, or waits for a time limit

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def hurried(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with one place in its batch and a deadline."""
    folder: Path = tmp_path_factory.mktemp("hurried")
    with running(folder, DEADLINE="2", MAX_BATCH="1", PREFILL_CHUNK="64", KEEPALIVE_SECONDS="0.5") as server:
        yield server


def post(server: Server, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(server.url + CHAT, json=body, timeout=patient(60))


def cached(response: httpx.Response) -> int:
    return int(response.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


def test_past_the_deadline_a_stream_ends_with_an_error_and_the_batch_is_free(hurried: Server) -> None:
    missed = hurried.metric("deadlines_exceeded_total")
    body = endless("stream", stream=True)
    begun = time.monotonic()
    lines = [line for line in post(hurried, body).text.splitlines() if line.startswith("data:")]
    assert 2.0 <= time.monotonic() - begun < patient(10)
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
    assert not any('finish_reason":"' in line for line in lines)
    assert len(lines) > 5
    hurried.wait_until_idle()
    assert (
        hurried.metric("deadlines_exceeded_total", phase="answer")
        == hurried.metric("deadlines_exceeded_total")
        == missed + 1
    )
    row = hurried.sessions()["stream"]
    assert row["state"] == "resident"
    again = post(hurried, {**body, "stream": False, "max_tokens": 1})
    assert again.status_code == 200
    assert cached(again) > 0


def test_past_the_deadline_a_prompt_is_kept_as_far_as_it_was_read(hurried: Server) -> None:
    body = endless("long", max_tokens=1) | {"messages": [{"role": "user", "content": filler(550, 8)}]}
    held = [0]
    for _ in range(2):
        response = post(hurried, body)
        assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert "x-should-retry" not in response.headers
        hurried.wait_until_idle()
        held.append(hurried.sessions()["long"]["tokens_seen"])
    assert 0 < held[1] < held[2]
    assert all(n % 64 == 0 for n in held)


def test_who_waits_past_the_deadline_is_never_begun(hurried: Server) -> None:
    def never_begun() -> float:  # on a busy machine some time out before they reach the queue
        return sum(hurried.metric("deadlines_exceeded_total", phase=phase) for phase in ("arriving", "waiting"))

    before = never_begun()
    names = ["first", "second", "third", "fourth"]
    with ThreadPoolExecutor(len(names)) as clients:
        answers = list(clients.map(lambda name: post(hurried, endless(name)), names))
    assert [(answer.status_code, answer.json()["error"]["code"]) for answer in answers] == [
        (504, "deadline_exceeded")
    ] * len(names)
    hurried.wait_until_idle()
    # When the first one's time is over that of the others soon is, and only one of them can still begin.
    assert never_begun() - before >= 2
    assert len(hurried.sessions().keys() & set(names)) <= 2


def test_a_client_that_leaves_amid_an_answer_costs_no_more_than_a_step(server: Server) -> None:
    body = json.dumps(endless("leaver", stream=True, logprobs=True)).encode()
    url = httpx.URL(server.url)
    before = server.metric("generated_tokens_total")
    with closing(socket.create_connection((url.host, url.port), timeout=20)) as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        received = b""
        while received.count(b'"top_logprobs"') < 20:
            received += connection.recv(65536)
        connection.setblocking(False)
        try:
            while more := connection.recv(65536):
                received += more
        except BlockingIOError:
            pass
    server.wait_until_idle()
    # One that was computed when the client left, one that was on its way, and one for a busy machine.
    assert server.metric("generated_tokens_total") - before - received.count(b'"top_logprobs"') <= 3
