"""server.api over a real socket: whole answers, streams, and what the server says about itself."""

import json
import logging
import math
import re
from functools import partial
from typing import Any

import pytest

from server.protocol import DrawnToken, Finished, SamplingParams, TextDelta, TokenLogprob, Usage
from tests.server.conftest import BODY, CHAT, STREAM, Serve, error_of, events_of
from tests.server.scripted_engine import USAGE, ScriptedEngine, eventually


def test_openai_client_without_streaming(serve: Serve) -> None:
    server = serve(ScriptedEngine())
    answer = server.openai.chat.completions.create(
        model="scripted-model",
        messages=[{"role": "developer", "content": "be brief"}, {"role": "user", "content": "hi"}],
        max_tokens=7,
        temperature=0.5,
        top_p=0.9,
        stop=["END"],
        prompt_cache_key="my session",
    )
    assert answer.choices[0].message.content == "Hello!"
    assert (answer.choices[0].finish_reason, answer.object, answer.model) == (
        "stop",
        "chat.completion",
        "org/scripted-model",
    )
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (12, 3, 15)
    assert answer.usage.prompt_tokens_details.cached_tokens == 8
    [request] = server.engine.requests
    assert (request.request_id, request.session, request.stop) == (answer.id, "my session", ("END",))
    assert (request.max_tokens, request.sampling) == (7, SamplingParams(temperature=0.5, top_p=0.9))
    assert server.engine.messages[0][0] == {"role": "system", "content": "be brief"}
    assert server.engine.cancelled == []
    assert server.outcomes() == {"stop": 1}


def test_openai_client_streaming(serve: Serve) -> None:
    server = serve(ScriptedEngine())
    chunks = list(
        server.openai.chat.completions.create(
            model="org/scripted-model",
            messages=[{"role": "user", "content": "hi"}],
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "Hello!"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 15
    assert len({chunk.id for chunk in chunks}) == 1
    assert server.engine.cancelled == []
    assert server.outcomes() == {"stop": 1}


def test_the_stream_on_the_wire(serve: Serve) -> None:
    server = serve(ScriptedEngine([TextDelta("hm", "reasoning"), TextDelta("ü"), Finished("length", USAGE)]))
    response = server.http.post(CHAT, json=STREAM)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    *chunks, done = events_of(response.text)
    assert done == "[DONE]"
    parsed = [json.loads(chunk) for chunk in chunks]
    assert {chunk["id"] for chunk in parsed} == {response.headers["x-request-id"]}
    assert all("usage" not in chunk for chunk in parsed)
    assert [chunk["choices"][0]["delta"] for chunk in parsed] == [
        {"role": "assistant", "content": ""},
        {"reasoning_content": "hm"},
        {"content": "ü"},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in parsed] == [None, None, None, "length"]


def test_usage_is_null_until_the_last_chunk(serve: Serve) -> None:
    server = serve(ScriptedEngine())
    response = server.http.post(CHAT, json={**STREAM, "stream_options": {"include_usage": True}})
    *chunks, last, _done = events_of(response.text)
    assert all(json.loads(chunk)["usage"] is None for chunk in chunks)
    assert json.loads(last)["usage"]["prompt_tokens_details"] == {"cached_tokens": 8}


def test_reasoning_is_apart_from_content(serve: Serve) -> None:
    server = serve(ScriptedEngine([TextDelta("2+2", "reasoning"), TextDelta("4"), Finished("stop", USAGE)]))
    message = server.http.post(CHAT, json=BODY).json()["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "4", "refusal": None, "reasoning_content": "2+2"}
    again = server.http.post(CHAT, json={**BODY, "messages": [*BODY["messages"], message, *BODY["messages"]]})
    assert again.status_code == 200


def test_session_header(serve: Serve) -> None:
    server = serve(ScriptedEngine())
    server.http.post(CHAT, json=BODY, headers={"X-Claude-Code-Session-Id": "abc"})
    server.http.post(CHAT, json=BODY)
    assert [request.session for request in server.engine.requests] == ["abc", None]
    refused = server.http.post(CHAT, json=BODY, headers={"X-Session-ID": "x" * 300})
    assert (refused.status_code, error_of(refused)["param"]) == (400, "X-Session-ID")


def test_tokenising_leaves_the_event_loop_free(serve: Serve) -> None:
    server = serve(ScriptedEngine())
    server.http.post(CHAT, json=BODY)
    assert server.engine.tokenized_in != ["uvicorn"]


def test_models(serve: Serve) -> None:
    server = serve(ScriptedEngine())
    [model] = server.openai.models.list().data
    assert (model.id, model.created, model.owned_by) == ("org/scripted-model", 1_700_000_000, "turbocache")
    assert server.http.get("/v1/models").json()["data"][0]["max_model_len"] == 1000
    for name in ("org/scripted-model", "scripted-model", "default"):
        assert server.http.get(f"/v1/models/{name}").json()["id"] == "org/scripted-model"
    assert server.openai.models.retrieve("org/scripted-model").id == "org/scripted-model"
    missing = server.http.get("/v1/models/other")
    assert (missing.status_code, error_of(missing)["code"]) == (404, "model_not_found")


def test_what_a_request_leaves_open_is_the_model_s_suggestion(serve: Serve) -> None:
    server = serve(ScriptedEngine(sampling=SamplingParams(temperature=0.3, top_p=0.9, frequency_penalty=0.2)))
    for path, body in (
        (CHAT, BODY),
        ("/v1/completions", {"model": "default", "prompt": "a"}),
        ("/v1/messages", {**BODY, "max_tokens": 3}),
        ("/v1/responses", {"model": "default", "input": "a"}),
    ):
        answer = server.http.post(path, json={**body, "top_p": 0.5})
        assert answer.status_code == 200
        assert server.engine.requests[-1].sampling == SamplingParams(0.3, 0.5, frequency_penalty=0.2), path
    assert (answer.json()["temperature"], answer.json()["top_p"]) == (0.3, 0.5)


def test_a_model_s_licence_and_origin(serve: Serve) -> None:
    [model] = serve(ScriptedEngine(license="apache-2.0", origin="org/base")).openai.models.list().data
    assert (model.model_extra or {}) | {"license": "apache-2.0", "origin": "org/base"} == model.model_extra
    [unknown] = serve(ScriptedEngine()).http.get("/v1/models").json()["data"]
    assert (unknown["license"], unknown["origin"]) == (None, None)


def test_backend_sessions_and_unknown_addresses(serve: Serve) -> None:
    server = serve(ScriptedEngine())
    server.http.post(CHAT, json=BODY)
    assert server.http.get("/v1/backend").json()["name"] == "scripted"
    assert server.http.get("/v1/sessions").json() == {"object": "list", "data": [{"id": "s0", "tokens": 8}]}
    missing = server.http.get("/v1/nothing")
    assert (missing.status_code, error_of(missing)["message"]) == (404, "Invalid URL (GET /v1/nothing)")
    wrong = server.http.get(CHAT)
    assert (wrong.status_code, error_of(wrong)["code"], wrong.headers["allow"]) == (405, "method_not_allowed", "POST")
    assert server.http.put("/v1/sessions/a").headers["allow"] == "DELETE, GET"
    assert server.http.put("/v1/sessions/a/fork").headers["allow"] == "DELETE, GET, POST"
    assert missing.headers["x-request-id"].startswith("req-")


def test_metrics(serve: Serve) -> None:
    server = serve(ScriptedEngine())
    server.http.post(CHAT, json=STREAM)
    server.http.get("/v1/models/a/b?secret=1")
    server.http.get("/private/address")
    counted = 'turbocache_http_requests_total{path="%s",status="%s"}'
    scrape = server.http.get("/metrics")
    assert scrape.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert eventually(lambda: server.metric(counted % ("/v1/chat/completions", "200")) == 1)
    assert eventually(lambda: server.metric(counted % ("/v1/models/{model_id:path}", "404")) == 1)
    assert eventually(lambda: server.metric(counted % ("unmatched", "404")) == 1)
    for name in ("time_to_first_token", "request_queue", "request_prefill", "request_decode", "request_duration"):
        assert server.metric(f"turbocache_{name}_seconds_count") == 1, name
    assert server.metric("turbocache_request_prompt_tokens_sum") == 12
    assert server.metric("turbocache_engine_up") == 1
    assert "private" not in scrape.text
    assert "secret" not in scrape.text


def test_one_log_line_per_request_without_text(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    server = serve(ScriptedEngine(), log_level="debug")
    body = {**STREAM, "prompt_cache_key": "my private session"}

    def lines() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.name == "server.requests"]

    # A client may have the whole answer before the server has written its line.
    answer = server.http.post(CHAT, json=body)
    assert eventually(lambda: len(lines()) == 1)
    refused = server.http.post(CHAT, json={**BODY, "store": True})
    assert eventually(lambda: len(lines()) == 2)
    first, second = lines()
    assert first.startswith(f"{answer.headers['x-request-id']} POST /v1/chat/completions 200 total_s=")
    assert "finish=stop stream=yes session=" in first
    assert re.search(r" queue_s=\d+\.\d{3} prefill_s=\d+\.\d{3} decode_s=\d+\.\d{3} first_s=", first)
    assert first.endswith("cached=8 prefilled=4 generated=3")
    assert second.startswith(f"{refused.headers['x-request-id']} POST /v1/chat/completions 400 total_s=")
    assert second.endswith("error=unsupported_value")
    ours = [record for record in caplog.records if not record.name.startswith(("httpx", "httpcore"))]
    everything = "\n".join(record.getMessage() for record in ours)
    assert not any(text in everything for text in ("private session", "hi there", "Hello"))


def test_usage_without_cache(serve: Serve) -> None:
    server = serve(ScriptedEngine([Finished("stop", Usage(5, 0, 0))]))
    usage = server.http.post(CHAT, json=BODY).json()["usage"]
    assert (usage["prompt_tokens_details"], usage["total_tokens"]) == ({"cached_tokens": 0}, 5)


TOKENS = (
    DrawnToken(b"F", -0.5, (TokenLogprob(b"F", -0.5), TokenLogprob(b"G", -1.5))),
    DrawnToken("ü".encode()[:1], -math.inf, (TokenLogprob(b"x", -0.1),)),
)


def test_logprobs_are_shown_as_openai_does(serve: Serve) -> None:
    script = [TextDelta("F", tokens=TOKENS[:1]), TextDelta("ü", tokens=TOKENS[1:]), Finished("stop", USAGE)]
    server = serve(ScriptedEngine(script))
    messages = [{"role": "user", "content": "hi"}]
    ask = partial(server.openai.chat.completions.create, model="default", messages=messages)
    whole = ask(logprobs=True, top_logprobs=2).choices[0].logprobs
    assert server.engine.requests[0].logprobs == 2
    assert whole.content[0].model_dump() == {
        "token": "F",
        "logprob": -0.5,
        "bytes": [70],
        "top_logprobs": [
            {"token": "F", "logprob": -0.5, "bytes": [70]},
            {"token": "G", "logprob": -1.5, "bytes": [71]},
        ],
    }
    assert (whole.content[1].token, whole.content[1].bytes, whole.content[1].logprob) == ("\ufffd", [0xC3], -9999.0)
    with ask(logprobs=True, stream=True) as stream:
        shown = [token for chunk in stream if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content]
    assert shown == whole.content
    assert server.engine.requests[1].logprobs == 0


def test_no_logprobs_unless_asked_for(serve: Serve) -> None:
    server = serve(ScriptedEngine())
    answer = server.http.post(CHAT, json=BODY).json()
    assert answer["choices"][0]["logprobs"] is None
    assert server.engine.requests[0].logprobs is None


@pytest.mark.parametrize("body", [BODY, STREAM])
def test_a_conversation_that_rotates_is_told_so(serve: Serve, body: dict[str, Any]) -> None:
    headers = serve(ScriptedEngine(rotates_at=5)).http.post(CHAT, json=body).headers
    told = {name: value for name, value in headers.items() if name.startswith("x-turbocache")}
    assert told == {
        "x-turbocache-overflow": "rotate",
        "x-turbocache-dropped-tokens": "3",
        "x-turbocache-dropped-turns": "1",
    }
    assert "x-turbocache-overflow" not in serve(ScriptedEngine(rotates_at=8)).http.post(CHAT, json=body).headers
    assert "x-turbocache-overflow" not in serve(ScriptedEngine()).http.post(CHAT, json=body).headers
