"""POST /v1/completions: what it asks of the engine, and the older API's form of answers."""

import json
import math
from typing import Any

import httpx
import pytest
from openai.types.completion_create_params import CompletionCreateParamsBase

from server.api.openai.completions_request import CompletionRequest
from server.protocol import DrawnToken, Finished, TextDelta, TokenLogprob, Usage
from tests.server.conftest import Serve, Served, error_of, events_of
from tests.server.scripted_engine import USAGE, ScriptedEngine

PATH = "/v1/completions"
BODY: dict[str, Any] = {"model": "default", "prompt": "ab"}


def post(server: Served, **fields: Any) -> httpx.Response:
    return server.http.post(PATH, json={**BODY, **fields})


def test_every_field_of_openais_spec_is_known() -> None:
    assert set(CompletionCreateParamsBase.__annotations__) <= set(CompletionRequest.model_fields)


def test_openai_client(serve: Serve) -> None:
    server = serve(ScriptedEngine())
    answer = server.openai.completions.create(model="default", prompt="ab", stop="END", best_of=1, user="me")
    assert (answer.object, answer.choices[0].text, answer.choices[0].finish_reason) == (
        "text_completion",
        "Hello!",
        "stop",
    )
    assert answer.choices[0].logprobs is None
    assert answer.usage is not None
    assert answer.usage.total_tokens == 15
    [request] = server.engine.requests
    assert answer.id == request.request_id
    assert answer.id.startswith("cmpl-")
    assert (list(request.prompt.tokens), request.max_tokens, request.stop) == ([97, 98], 16, ("END",))
    assert request.rules.raw
    assert server.engine.messages == []


def test_openai_client_streaming(serve: Serve) -> None:
    server = serve(ScriptedEngine())
    chunks = list(
        server.openai.completions.create(
            model="default", prompt="ab", echo=True, stream=True, stream_options={"include_usage": True}
        )
    )
    assert [chunk.choices[0].text for chunk in chunks[:-1]] == ["ab", "Hel", "lo", "!", ""]
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * 4 + ["stop"]
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * 5
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.prompt_tokens == 12


def test_the_stream_on_the_wire(serve: Serve) -> None:
    server = serve(ScriptedEngine())
    response = post(server, stream=True)
    *chunks, done = events_of(response.text)
    assert done == "[DONE]"
    assert {json.loads(chunk)["id"] for chunk in chunks} == {response.headers["x-request-id"]}
    assert all("usage" not in json.loads(chunk) for chunk in chunks)


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [
        ("ab", [[97, 98]]),
        (["ab", "c"], [[97, 98], [99]]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
def test_prompts_of_every_kind(serve: Serve, prompt: Any, tokens: list[list[int]]) -> None:
    server = serve(ScriptedEngine())
    choices = post(server, prompt=prompt, echo=True).json()["choices"]
    assert [list(request.prompt.tokens) for request in server.engine.requests] == tokens
    texts = ["".join(map(chr, one)) for one in tokens]
    assert [choice["text"] for choice in choices] == [f"{text}Hello!" for text in texts]


def test_each_answer_to_each_prompt_is_a_choice(serve: Serve) -> None:
    server = serve(ScriptedEngine())
    answer = post(server, prompt=["a", "b"], n=2, best_of=2, seed=7, max_tokens=3).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    requests = server.engine.requests
    assert [request.choice for request in requests] == [0, 1, 2, 3]
    assert [request.prompt.tokens[0] for request in requests] == [97, 97, 98, 98]
    assert [request.sampling.seed for request in requests] == [7, 8, 7, 8]
    ids = [request.request_id for request in requests]
    assert [request.shares_prompt_of for request in requests] == [None, ids[0], None, ids[2]]
    assert len(set(ids)) == 4
    # A prompt that two answers share counts once.
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (24, 12)


TOKENS = (
    DrawnToken(b"F", -0.5, (TokenLogprob(b"F", -0.5), TokenLogprob(b"G", -1.5))),
    DrawnToken("ü".encode()[:1], -math.inf, (TokenLogprob(b"x", -0.1),)),
    DrawnToken("ü".encode()[1:], -0.2, (TokenLogprob("ü".encode()[1:], -0.2),)),
    DrawnToken(b"!", -0.3, (TokenLogprob(b"?", -0.2),)),
)
SCRIPT = (
    TextDelta("F", tokens=TOKENS[:1]),
    TextDelta("ü", tokens=TOKENS[1:3]),
    TextDelta("!", tokens=TOKENS[3:]),
    Finished("stop", USAGE),
)


def test_logprobs_in_the_older_shape(serve: Serve) -> None:
    server = serve(ScriptedEngine(SCRIPT))
    shown = post(server, logprobs=2).json()["choices"][0]["logprobs"]
    assert shown == {
        "tokens": ["F", "bytes:\\xc3", "bytes:\\xbc", "!"],
        "token_logprobs": [-0.5, -9999.0, -0.2, -0.3],
        "top_logprobs": [
            {"F": -0.5, "G": -1.5},
            {"x": -0.1, "bytes:\\xc3": -9999.0},
            {"bytes:\\xbc": -0.2},
            {"?": -0.2, "!": -0.3},
        ],
        "text_offset": [0, 1, 1, 2],
    }
    assert server.engine.requests[0].logprobs == 2


def test_logprobs_in_a_stream_go_on_where_the_text_was(serve: Serve) -> None:
    server = serve(ScriptedEngine(SCRIPT))
    *chunks, _ = events_of(post(server, logprobs=0, stream=True).text)
    shown = [json.loads(chunk)["choices"][0]["logprobs"] for chunk in chunks]
    assert [one["text_offset"] for one in shown if one] == [[0], [1, 1], [2]]
    assert all(one["top_logprobs"] is None for one in shown if one)
    assert shown[-1] is None


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"prompt": ""}, "prompt", "invalid_value"),
        ({"prompt": []}, "prompt", "empty_array"),
        ({"prompt": None}, "prompt", "invalid_type"),
        ({"prompt": {}}, "prompt", "invalid_type"),
        ({"prompt": ["a", 1]}, "prompt[1]", "invalid_type"),
        ({"prompt": [1, "a"]}, "prompt[1]", "invalid_type"),
        ({"prompt": [True]}, "prompt[0]", "invalid_type"),
        ({"prompt": [-1]}, "prompt[0]", "integer_below_min_value"),
        ({"prompt": [[1], []]}, "prompt[1]", "empty_array"),
        ({"prompt": ["a"] * 129}, "prompt", "array_above_max_length"),
        ({"prompt": ["a"] * 65, "n": 2}, "n", "integer_above_max_value"),
        ({"suffix": "b"}, "suffix", "unsupported_parameter"),
        ({"best_of": 2}, "best_of", "unsupported_value"),
        ({"n": 2, "best_of": 1}, "best_of", "unsupported_value"),
        ({"echo": True, "logprobs": 0}, "logprobs", "unsupported_parameter"),
        ({"logprobs": 6}, "logprobs", "integer_above_max_value"),
        ({"logprobs": True}, "logprobs", "invalid_type"),
        ({"max_tokens": 0}, "max_tokens", "integer_below_min_value"),
        ({"max_tokens": 999}, "prompt", "context_length_exceeded"),
        ({"stream_options": {"include_usage": True}}, "stream_options", None),
        ({"messages": []}, "messages", "unknown_parameter"),
    ],
)
def test_refused(serve: Serve, fields: dict[str, Any], param: str, code: str | None) -> None:
    response = post(serve(ScriptedEngine()), **fields)
    assert response.status_code == 400
    error = error_of(response)
    assert (error["param"], error["code"]) == (param, code)


def test_text_calls_no_tools(serve: Serve) -> None:
    server = serve(ScriptedEngine([Finished("tool_calls", Usage(1, 0, 0))]))
    # Whatever ended it, text calls nothing.
    assert post(server).json()["choices"][0]["finish_reason"] == "stop"
