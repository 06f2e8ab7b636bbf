"""What the server refuses, over a real socket: in the right words, and then it goes on."""

import json
import socket

import httpx
import openai
import pytest

from server.errors import ContextLengthExceeded, InvalidRequest, OutOfMemory, QueueFull, ServerError
from tests.server.api.openai.test_chat_request import BAD
from tests.server.conftest import BODY, CHAT, STREAM, Serve, error_of
from tests.server.scripted_engine import ScriptedEngine


@pytest.mark.parametrize(
    ("error", "status", "retry_after"),
    [
        (QueueFull(retry_after=2), 429, "2"),
        (OutOfMemory(), 503, "5"),
        (ContextLengthExceeded(limit=1, prompt_tokens=2, max_tokens=3), 400, None),
    ],
)
def test_refused_by_the_engine(serve: Serve, error: ServerError, status: int, retry_after: str | None) -> None:
    server = serve(ScriptedEngine(submit_error=error))
    for body in (BODY, STREAM):
        response = server.http.post(CHAT, json=body)
        assert (response.status_code, response.headers.get("retry-after")) == (status, retry_after)
        assert error_of(response)["code"] == error.code
    assert server.outcomes() == {}
    assert server.metric(f'turbocache_admission_refusals_total{{reason="{error.code}"}}') == 2


@pytest.mark.parametrize(
    ("max_tokens", "words"), [(993, "you requested 1001 tokens (8 in the messages, 993"), (10**30, "1")]
)
def test_past_the_models_positions(serve: Serve, max_tokens: int, words: str) -> None:
    server = serve(ScriptedEngine())
    error = error_of(server.http.post(CHAT, json={**BODY, "max_tokens": max_tokens}))
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    assert words in error["message"]
    assert server.engine.requests == []
    assert server.http.post(CHAT, json={**BODY, "max_completion_tokens": 992}).status_code == 200


def test_a_prompt_past_the_models_positions(serve: Serve) -> None:
    server = serve(ScriptedEngine(max_tokens=8))
    assert error_of(server.http.post(CHAT, json=BODY))["code"] == "context_length_exceeded"


def test_the_template_refuses(serve: Serve) -> None:
    server = serve(ScriptedEngine(tokenize_error=InvalidRequest("Roles must alternate.", param="messages")))
    response = server.http.post(CHAT, json=BODY)
    assert (response.status_code, error_of(response)["message"]) == (400, "Roles must alternate.")


def test_an_unexpected_error_is_a_plain_500(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    server = serve(ScriptedEngine(tokenize_error=ZeroDivisionError("inside")))
    response = server.http.post(CHAT, json=BODY)
    assert response.status_code == 500
    assert error_of(response)["code"] == "internal_error"
    assert response.headers["x-request-id"] in response.text
    assert "inside" not in response.text
    assert any(record.exc_info for record in caplog.records)
    server.engine.tokenize_error = None
    assert server.http.post(CHAT, json=BODY).status_code == 200


def test_bad_input_is_a_400_and_the_server_goes_on(serve: Serve) -> None:
    server = serve(ScriptedEngine())
    for fields, param, code, words in BAD:
        response = server.http.post(CHAT, content=json.dumps({**BODY, **fields}))
        error = error_of(response)
        assert (response.status_code, error["param"], error["code"]) == (400, param, code)
        assert words in error["message"]
        assert response.headers["x-request-id"].startswith("chatcmpl-")
    assert server.engine.requests == []
    assert server.http.post(CHAT, json=BODY).status_code == 200


def test_malformed_json(serve: Serve) -> None:
    server = serve(ScriptedEngine())
    response = server.http.post(CHAT, content=b'{"model": "default", ]')
    assert response.status_code == 400
    assert "line 1 column 22" in error_of(response)["message"]


@pytest.mark.parametrize("name", ["gpt-4o", "", "scripted", "org", "x" * 5000])
def test_unknown_models(serve: Serve, name: str) -> None:
    server = serve(ScriptedEngine())
    response = server.http.post(CHAT, json={**BODY, "model": name})
    assert (response.status_code, error_of(response)["code"]) == (404, "model_not_found")
    assert error_of(response)["message"].endswith("` does not exist or you do not have access to it.")
    assert len(response.text) < 400


def test_api_keys(serve: Serve) -> None:
    server = serve(ScriptedEngine(), api_keys=("one", "zwö"))
    for path in ("/v1/models", "/v1/backend", "/v1/sessions", "/v1/models/default"):
        assert server.http.get(path).status_code == 401
    for header in ("", "Bearer", "Bearer wrong", "Basic one", "Bearer on", "Bearer one one"):
        response = server.http.post(CHAT, json=BODY, headers={"Authorization": header})
        assert (response.status_code, error_of(response)["code"]) == (401, "invalid_api_key")
    for key in ("one", "zwö"):
        headers = httpx.Headers([(b"Authorization", f"bearer {key}".encode())])
        assert server.http.post(CHAT, json=BODY, headers=headers).status_code == 200
    assert server.http.get("/health").status_code == 200
    assert server.http.get("/metrics").status_code == 200
    with pytest.raises(openai.AuthenticationError):
        server.openai.models.list()


def test_body_limit(serve: Serve) -> None:
    server = serve(ScriptedEngine(max_tokens=10_000), body_limit=2000)
    big = {**BODY, "messages": [{"role": "user", "content": "x" * 2000}]}
    response = server.http.post(CHAT, json=big)
    assert (response.status_code, error_of(response)["code"]) == (413, "request_too_large")
    # Sent in chunks there is no Content-Length to go by.
    chunks = (chunk for chunk in [json.dumps(big).encode()[:1500], b"x" * 1500])
    assert server.http.post(CHAT, content=chunks).status_code == 413
    exact = json.dumps(BODY).encode().ljust(2000)
    assert server.http.post(CHAT, content=exact).status_code == 200
    assert server.http.post(CHAT, content=iter([exact])).status_code == 200


def test_content_length_that_lies(serve: Serve) -> None:
    server = serve(ScriptedEngine())
    for announced in (b"1" + b"0" * 30, b"20"):
        connection = socket.create_connection(("127.0.0.1", server.port), timeout=5.0)
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: ".encode()
        connection.sendall(head + announced + b"\r\n\r\n" + json.dumps(BODY).encode())
        status = int(connection.recv(65536).split(b" ", 2)[1])
        connection.close()
        assert status in (400, 413)
    assert server.http.post(CHAT, json=BODY).status_code == 200
