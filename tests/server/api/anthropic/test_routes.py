"""server.api.anthropic.routes over a real socket: whole answers, the order of a stream's events, refusals, names."""

import json
from typing import Any

import httpx
import pytest

from server.errors import KernelFault, OutOfMemory, QueueFull, ServerError
from server.protocol import Failed, Finished, PrefillProgress, SamplingParams, TextDelta, ToolCall, Usage
from tests.server.conftest import CHAT, Serve
from tests.server.scripted_engine import HELLO, USAGE, ScriptedEngine, Step

MESSAGES = "/v1/messages"
COUNT = "/v1/messages/count_tokens"
BODY: dict[str, Any] = {"model": "default", "max_tokens": 7, "messages": [{"role": "user", "content": "hi there"}]}
STREAM = {**BODY, "stream": True}
COUNTED = {
    "input_tokens": 4,
    "cache_creation_input_tokens": 0,
    "cache_read_input_tokens": 8,
    "output_tokens": 3,
    "output_tokens_details": {"thinking_tokens": 0},
}
UUID = "57a121ec-f78c-48c3-a745-e3036a3ecc33"
CALL = ToolCall("call_0123456789abcdef01234567", "weather", '{"city": "Oslo"}')


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error in an answer, which holds nothing else, and names the request as the header does."""
    body = response.json()
    assert set(body) == {"type", "error", "request_id"}
    assert set(body["error"]) == {"type", "message"}
    assert (body["type"], body["request_id"]) == ("error", response.headers["request-id"])
    error: dict[str, Any] = body["error"]
    return error


def events_of(text: str) -> list[dict[str, Any]]:
    """A stream's events, each of which is named by its type."""
    events = []
    for part in text.split("\n\n"):
        if part and not part.startswith(":"):
            name, data = part.split("\n")
            events.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {events[-1]['type']}"
    return events


def test_a_whole_answer(serve: Serve) -> None:
    server = serve(ScriptedEngine())
    response = server.http.post(
        f"{MESSAGES}?beta=true", json={**BODY, "temperature": 0.5, "top_k": 3, "stop_sequences": ["END"]}
    )
    [request] = server.engine.requests
    assert response.json() == {
        "id": request.request_id,
        "type": "message",
        "role": "assistant",
        "model": "org/scripted-model",
        "content": [{"type": "text", "text": "Hello!"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": COUNTED,
    }
    assert request.request_id.startswith("msg_")
    assert {response.headers["request-id"], response.headers["x-request-id"]} == {request.request_id}
    assert (request.max_tokens, request.stop) == (7, ("END",))
    assert request.sampling == SamplingParams(temperature=0.5, top_k=3)
    assert server.outcomes() == {"stop": 1}


def test_a_stream(serve: Serve) -> None:
    server = serve(ScriptedEngine())
    start, ping, *blocks, delta, stop = events_of(server.http.post(MESSAGES, json=STREAM).text)
    # The prompt has 8 tokens, of which the script reads 4.
    usage = {**COUNTED, "cache_read_input_tokens": 4, "output_tokens": 0}
    assert (start["message"]["content"], start["message"]["stop_reason"]) == ([], None)
    assert start["message"]["usage"] == usage
    assert ping == {"type": "ping"}
    assert blocks == [
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        *(
            {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}}
            for text in ("Hel", "lo", "!")
        ),
        {"type": "content_block_stop", "index": 0},
    ]
    assert delta == {
        "type": "message_delta",
        "delta": {"stop_reason": "end_turn", "stop_sequence": None},
        "usage": COUNTED,
    }
    assert stop == {"type": "message_stop"}
    assert server.engine.cancelled == []


def test_a_message_starts_once_and_with_the_first_chunk_of_its_prompt(serve: Serve) -> None:
    server = serve(ScriptedEngine([PrefillProgress(1, 3), PrefillProgress(3, 3), Finished("length", USAGE)]))
    types = [event["type"] for event in events_of(server.http.post(MESSAGES, json=STREAM).text)]
    assert types == ["message_start", "ping", "message_delta", "message_stop"]


def test_thoughts_texts_and_calls(serve: Serve) -> None:
    script: list[Step] = [
        TextDelta("hm", "reasoning"),
        TextDelta("\nSee."),
        TextDelta("\n"),
        CALL,
        Finished("tool_calls", Usage(12, 8, 5, 2)),
    ]
    server = serve(ScriptedEngine(script))
    whole = server.http.post(MESSAGES, json=BODY).json()
    content: list[dict[str, Any]] = [
        {"type": "thinking", "thinking": "hm", "signature": "turbocache"},
        {"type": "text", "text": "\nSee.\n"},
        {"type": "tool_use", "id": "toolu_0123456789abcdef01234567", "name": "weather", "input": {"city": "Oslo"}},
    ]
    assert (whole["content"], whole["stop_reason"]) == (content, "tool_use")
    assert whole["usage"]["output_tokens_details"] == {"thinking_tokens": 2}
    events = events_of(server.http.post(MESSAGES, json=STREAM).text)
    assert [event["delta"] for event in events if event["type"] == "content_block_delta"] == [
        {"type": "thinking_delta", "thinking": "hm"},
        {"type": "signature_delta", "signature": "turbocache"},
        {"type": "text_delta", "text": "\nSee."},
        {"type": "text_delta", "text": "\n"},
        {"type": "input_json_delta", "partial_json": '{"city": "Oslo"}'},
    ]
    assert events[-2]["delta"]["stop_reason"] == "tool_use"
    # What came back may be sent again, with results.
    result = {"type": "tool_result", "tool_use_id": content[2]["id"], "content": "rain"}
    talk = [*BODY["messages"], {"role": "assistant", "content": content}, {"role": "user", "content": [result]}]
    assert server.http.post(MESSAGES, json={**BODY, "messages": talk}).status_code == 200
    assert server.engine.messages[-1][-1]["content"] == "rain"


def test_thoughts_that_are_not_to_be_shown(serve: Serve) -> None:
    server = serve(ScriptedEngine([TextDelta("secret", "reasoning"), TextDelta("Yes"), Finished("stop", USAGE)]))
    thinking = {"thinking": {"type": "adaptive", "display": "omitted"}}
    for body in (BODY, STREAM):
        answer = server.http.post(MESSAGES, json={**body, **thinking}).text
        assert '"thinking"' in answer
        assert "secret" not in answer


@pytest.mark.parametrize(
    ("end", "reason", "sequence"),
    [
        (Finished("stop", USAGE), "end_turn", None),
        (Finished("stop", USAGE, stop="END"), "stop_sequence", "END"),
        (Finished("length", USAGE), "max_tokens", None),
        (Finished("tool_calls", USAGE), "tool_use", None),
    ],
)
def test_stop_reasons(serve: Serve, end: Finished, reason: str, sequence: str | None) -> None:
    server = serve(ScriptedEngine([TextDelta("a"), end]))
    whole = server.http.post(MESSAGES, json=BODY).json()
    assert (whole["stop_reason"], whole["stop_sequence"]) == (reason, sequence)
    delta = events_of(server.http.post(MESSAGES, json=STREAM).text)[-2]["delta"]
    assert delta == {"stop_reason": reason, "stop_sequence": sequence}


def test_counting_tokens_asks_nothing_of_the_engine(serve: Serve) -> None:
    server = serve(ScriptedEngine())
    body = {key: value for key, value in BODY.items() if key != "max_tokens"}
    response = server.http.post(COUNT, json={**body, "system": "abc"})
    assert response.json() == {"input_tokens": 11}
    assert server.engine.requests == []
    assert error_of(server.http.post(COUNT, json=BODY))["message"].endswith("supplied: max_tokens")
    assert server.http.post(COUNT, json={**body, "model": "gpt"}).status_code == 404


@pytest.mark.parametrize(
    ("headers", "user_id", "name"),
    [
        ({}, None, None),
        ({}, "somebody", None),
        ({}, f"user_0f_account__session_{UUID}", UUID),
        ({}, json.dumps({"device_id": "d", "account_uuid": "", "session_id": UUID}), UUID),
        ({}, json.dumps({"session_id": 5}), None),
        ({}, '{"session_id": ', None),
        ({"X-Claude-Code-Session-Id": "other"}, f"user_0f_account__session_{UUID}", "other"),
    ],
)
def test_session_names(serve: Serve, headers: dict[str, str], user_id: str | None, name: str | None) -> None:
    server = serve(ScriptedEngine())
    response = server.http.post(MESSAGES, json={**BODY, "metadata": {"user_id": user_id}}, headers=headers)
    assert response.headers.get("x-session-id") == name
    assert server.engine.requests[0].session == name


def test_a_session_name_that_is_none(serve: Serve) -> None:
    server = serve(ScriptedEngine())
    metadata = {"user_id": json.dumps({"session_id": "../etc"})}
    error = error_of(server.http.post(MESSAGES, json={**BODY, "metadata": metadata}))
    assert error["message"].startswith("Invalid 'metadata.user_id': a session name must not read as a path")


def test_diagnostics_are_unavailable(serve: Serve) -> None:
    server = serve(ScriptedEngine())
    asked = {"diagnostics": {"previous_message_id": "msg_1"}}
    unavailable = {"cache_miss_reason": {"type": "unavailable"}}
    assert server.http.post(MESSAGES, json={**BODY, **asked}).json()["diagnostics"] == unavailable
    [start, *_] = events_of(server.http.post(MESSAGES, json={**STREAM, **asked}).text)
    assert start["message"]["diagnostics"] == unavailable


@pytest.mark.parametrize(
    ("error", "status", "kind"), [(QueueFull(), 429, "rate_limit_error"), (OutOfMemory(), 503, "overloaded_error")]
)
def test_refused_by_the_engine(serve: Serve, error: ServerError, status: int, kind: str) -> None:
    server = serve(ScriptedEngine(submit_error=error))
    for body in (BODY, STREAM):
        response = server.http.post(MESSAGES, json=body)
        assert (response.status_code, error_of(response)["type"]) == (status, kind)
        assert "retry-after" in response.headers


def test_a_fault_before_the_first_text_has_its_own_status(serve: Serve) -> None:
    server = serve(ScriptedEngine([Failed(KernelFault("It broke."))]))
    for body in (BODY, STREAM):
        response = server.http.post(MESSAGES, json=body)
        assert (response.status_code, error_of(response)) == (500, {"type": "api_error", "message": "It broke."})


def test_a_fault_within_a_stream_is_its_last_event(serve: Serve) -> None:
    server = serve(ScriptedEngine([*HELLO[:2], Failed(KernelFault("It broke."))]))
    response = server.http.post(MESSAGES, json=STREAM)
    assert events_of(response.text)[-1] == {
        "type": "error",
        "error": {"type": "api_error", "message": "It broke."},
        "request_id": response.headers["request-id"],
    }


def test_unexpected_errors_have_the_envelope(serve: Serve) -> None:
    server = serve(ScriptedEngine(tokenize_error=ZeroDivisionError("inside")))
    response = server.http.post(MESSAGES, json=BODY)
    assert (response.status_code, error_of(response)["type"]) == (500, "api_error")
    assert "inside" not in response.text


def test_refusals_have_the_envelope(serve: Serve) -> None:
    server = serve(ScriptedEngine(), body_limit=2000)
    for body, status, kind, words in (
        (b'{"model": ', 400, "invalid_request_error", "could not parse the JSON"),
        (json.dumps({**BODY, "top_p": "x"}).encode(), 400, "invalid_request_error", "'top_p'"),
        (json.dumps({**BODY, "model": "claude-x"}).encode(), 404, "not_found_error", "`claude-x`"),
        (json.dumps({**BODY, "max_tokens": 993}).encode(), 400, "invalid_request_error", "limit: 8 + 993 > 1000"),
        (b" " * 2001, 413, "request_too_large", "2000 bytes"),
    ):
        response = server.http.post(MESSAGES, content=body)
        error = error_of(response)
        assert (response.status_code, error["type"]) == (status, kind)
        assert words in error["message"]
    assert error_of(server.http.get(MESSAGES))["type"] == "invalid_request_error"
    assert error_of(server.http.post(f"{MESSAGES}/batches"))["type"] == "not_found_error"
    assert server.engine.requests == []


def test_api_keys_by_both_headers(serve: Serve) -> None:
    server = serve(ScriptedEngine(), api_keys=("one", "two"))
    refused: tuple[dict[str, str], ...] = ({}, {"x-api-key": "on"}, {"x-api-key": "", "Authorization": "Bearer three"})
    for headers in refused:
        for path in (MESSAGES, COUNT):
            response = server.http.post(path, json=BODY, headers=headers)
            assert (response.status_code, error_of(response)["type"]) == (401, "authentication_error")
    accepted: tuple[dict[str, str], ...] = (
        {"x-api-key": "one"},
        {"Authorization": "Bearer one"},
        {"x-api-key": "one", "Authorization": "Bearer a token of somebody else's"},
        {"x-api-key": "two"},
    )
    for headers in accepted:
        assert server.http.post(MESSAGES, json=BODY, headers=headers).status_code == 200
    owners = [request.owner for request in server.engine.requests]
    assert owners[0] == owners[1] == owners[2] != owners[3]
    assert server.http.post(CHAT, json={**BODY}, headers={"x-api-key": "two"}).status_code == 200


def test_metrics_name_the_addresses(serve: Serve) -> None:
    server = serve(ScriptedEngine())
    server.http.post(MESSAGES, json=BODY)
    server.http.post(COUNT, json=BODY)
    assert server.metric(f'turbocache_http_requests_total{{path="{MESSAGES}",status="200"}}') == 1
    assert server.metric(f'turbocache_http_requests_total{{path="{COUNT}",status="400"}}') == 1


def test_tokens_of_the_prompt_are_counted_once(serve: Serve) -> None:
    server = serve(ScriptedEngine([PrefillProgress(8, 8), TextDelta("a"), Finished("stop", Usage(8, 0, 1))]))
    events = events_of(server.http.post(MESSAGES, json=STREAM).text)
    for usage in (events[0]["message"]["usage"], events[-2]["usage"]):
        assert usage["input_tokens"] + usage["cache_read_input_tokens"] == 8
