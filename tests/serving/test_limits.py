"""Refusals and leavings: full queue, full memory, clients that go away, and nonsense."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.processes import patient, wait_until
from tests.serving.launch import Server, filler, running

CHAT = {"model": "default", "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 8, "temperature": 0}
# The model repeats itself for ever on this, so that a request stays in the batch as long as it may.
LONG_ANSWER = {**CHAT, "messages": [{"role": "user", "content": "Continue: " + filler(20, 3)}], "temperature": 1.5}


def post(server: Server, body: Any, **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(f"{server.url}/v1/chat/completions", content=content, headers=headers, timeout=patient(60))


def wait_for(server: Server, metric: str, value: float, seconds: float = 20) -> None:
    wait_until(
        lambda: server.metric(metric) == value, seconds, lambda: f"{metric} is {server.metric(metric)}, not {value}"
    )


class Prefills:
    """Streams whose long prompts keep the engine busy; closing one is a client that goes away."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._streams: list[Any] = []

    def open(self, seed: int, name: str | None = None) -> None:
        body = {**CHAT, "messages": [{"role": "user", "content": filler(450, seed)}], "stream": True}
        if name:
            body["prompt_cache_key"] = name
        client = httpx.Client(timeout=patient(60))
        stream = client.stream("POST", f"{self._server.url}/v1/chat/completions", json=body)
        response = stream.__enter__()
        assert response.status_code == 200
        self._streams.append((client, stream))

    def close(self) -> None:
        for client, stream in self._streams:
            stream.__exit__(None, None, None)
            client.close()
        self._streams.clear()


@pytest.fixture
def prefills(small_server: Server) -> Iterator[Prefills]:
    opened = Prefills(small_server)
    yield opened
    opened.close()
    wait_for(small_server, "requests_running", 0)


@pytest.mark.slow
def test_a_full_queue_answers_429_and_takes_requests_again_later(small_server: Server, prefills: Prefills) -> None:
    prefills.open(1)
    prefills.open(2)
    wait_for(small_server, "requests_running", 2)
    waiting = threading.Thread(target=post, args=(small_server, CHAT))
    waiting.start()
    wait_for(small_server, "requests_waiting", 1)
    refused = post(small_server, CHAT)
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    prefills.close()
    waiting.join(30)
    assert post(small_server, CHAT).status_code == 200


@pytest.mark.slow
def test_a_client_that_leaves_during_prefill_frees_its_place_and_keeps_what_was_cached(
    small_server: Server, prefills: Prefills
) -> None:
    cancelled = small_server.metric("requests_finished_total", reason="cancelled")
    prefills.open(7, name="leaver")
    wait_for(small_server, "requests_running", 1)
    time.sleep(1.0)
    prefills.close()
    wait_for(small_server, "requests_running", 0)
    assert small_server.metric("requests_finished_total", reason="cancelled") == cancelled + 1
    row = small_server.sessions().get("leaver")
    again = post(small_server, {**CHAT, "messages": [{"role": "user", "content": filler(450, 7)}],
                                "prompt_cache_key": "leaver"})  # fmt: skip
    cached = again.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached == (row["tokens_seen"] if row else 0)
    assert cached > 0


@pytest.mark.slow
def test_what_cannot_fit_the_budget_is_refused_and_evicts_nobody(tmp_path: Path) -> None:
    with running(tmp_path, KV_MEMORY="16MiB") as server:
        for name in ("one", "two"):
            assert post(server, {**CHAT, "prompt_cache_key": name}).status_code == 200
        before = set(server.sessions())
        huge = post(server, {**CHAT, "max_tokens": 8000, "prompt_cache_key": "huge"})
        assert huge.status_code == 503
        assert int(huge.headers["retry-after"]) >= 1
        assert "TURBOCACHE_KV_MEMORY" in huge.json()["error"]["message"]
        assert set(server.sessions()) == before
        assert server.metric("evictions_total") == 0
        # What fits pushes out the session that was used longest ago, and no other.
        for name in ("three", "four", "five", "six"):
            assert post(server, {**CHAT, "prompt_cache_key": name}).status_code == 200
        assert server.metric("evictions_total") > 0
        left = set(server.sessions())
        assert "six" in left
        assert "one" not in left
        assert server.cache_bytes() <= 16 * 2**20


BAD: list[tuple[Any, int, str | None]] = [
    (b"{not json", 400, None),
    (b"", 400, None),
    ({**CHAT, "messages": []}, 400, "messages"),
    ({**CHAT, "messages": "hello"}, 400, "messages"),
    ({**CHAT, "messages": [{"role": "wizard", "content": "x"}]}, 400, "messages[0].role"),
    ({**CHAT, "messages": [{"role": "user", "content": 7}]}, 400, "messages[0].content"),
    ({**CHAT, "temperature": "hot"}, 400, "temperature"),
    (json.dumps({**CHAT, "temperature": float("nan")}).encode(), 400, "temperature"),
    (json.dumps({**CHAT, "temperature": float("inf")}).encode(), 400, "temperature"),
    ({**CHAT, "max_tokens": -1}, 400, "max_tokens"),
    ({**CHAT, "max_tokens": 10**30}, 400, None),
    ({**CHAT, "colour": "green"}, 400, "colour"),
    ({**CHAT, "prompt_cache_key": "a\u0000b"}, 400, "prompt_cache_key"),
]


@pytest.mark.parametrize(("body", "status", "param"), BAD)
def test_bad_input_gets_a_clear_4xx_and_the_server_goes_on(
    server: Server, body: Any, status: int, param: str | None
) -> None:
    answer = post(server, body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error["message"]
    assert param is None or error["param"] == param
    assert post(server, CHAT).status_code == 200


def test_control_characters_in_text_are_text(server: Server) -> None:
    body = {**CHAT, "messages": [{"role": "user", "content": "a\u0000b\u0007c\u202ed \ud83d\ude00"}]}
    assert post(server, body).status_code == 200


def test_past_the_models_positions_it_is_context_length_exceeded(server: Server) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        server.client().chat.completions.create(model="default", messages=[{"role": "user", "content": filler(800, 1)}])
    assert caught.value.code == "context_length_exceeded"
    assert "8192" in caught.value.message
    refused = post(server, {**CHAT, "max_tokens": 8190})
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "context_length_exceeded"


def test_sampling_stop_strings_and_limits_are_honoured(server: Server) -> None:
    tell = [{"role": "user", "content": "Repeat after me: alpha beta gamma delta"}]
    whole = post(server, {**CHAT, "messages": tell, "max_tokens": 30}).json()["choices"][0]
    assert "gamma" in whole["message"]["content"]
    cut = post(server, {**CHAT, "messages": tell, "max_tokens": 30, "stop": ["gam"]}).json()["choices"][0]
    assert cut["message"]["content"] == whole["message"]["content"].split("gam")[0]
    assert cut["finish_reason"] == "stop"
    short = post(server, {**CHAT, "messages": tell, "max_tokens": 2}).json()
    assert short["choices"][0]["finish_reason"] == "length"
    assert short["usage"]["completion_tokens"] == 2
    assert post(server, {**LONG_ANSWER, "top_p": 0.9, "top_k": 40, "min_p": 0.01}).status_code == 200


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("BACKEND", "metal", "no Metal device"),
        ("KV_PRESET", "k5v1", "k4v4"),
        ("MAX_SIZE", "100", "TURBOCACHE_WINDOW=128"),
        ("MODEL", "/nowhere/at/all", "/nowhere/at/all"),
        ("KV_MEMORY", "1MiB", "one session"),
        ("MAX_SIZES", "100", "TURBOCACHE_MAX_SIZE"),
    ],
)
def test_a_bad_setting_stops_the_start_with_a_sentence(tmp_path: Path, name: str, value: str, said: str) -> None:
    with pytest.raises(AssertionError, match="did not start") as caught, running(tmp_path, **{name: value}):
        pass
    text = str(caught.value)
    assert said in text
    assert "Traceback" not in text
