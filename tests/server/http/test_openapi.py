"""GET /openapi.json: it says what the parser does, of every route, for the loaded model."""

import json
import math
from typing import Any

import pytest
from fastapi.routing import APIRoute

from server.api import ROUTERS
from server.api.anthropic.request import CountTokensRequest, MessagesRequest
from server.api.openai.chat_request import ChatCompletionRequest
from server.api.openai.completions_request import CompletionRequest
from server.api.own.tokens_request import TokenizeRequest
from server.api.responses.request import LOGPROBS, InputTokensRequest, ResponsesRequest
from server.errors import InvalidRequest
from server.http.openapi import document
from server.http.routing import parse
from server.http.session_name import checked_name
from server.http.wire import MODEL_FACT
from server.protocol import ModelInfo
from tests.server.api.anthropic.test_request import NOT_HONOURED, WRONG
from tests.server.api.openai.test_chat_request import BAD, CALL, USER, body
from tests.server.api.responses.test_request import BAD as BAD_RESPONSES
from tests.server.api.responses.test_request import CODEX
from tests.server.conftest import Serve
from tests.server.scripted_engine import ScriptedEngine

jsonschema_rs = pytest.importorskip("jsonschema_rs")

MODEL = ModelInfo(id="org/m", created=1, max_tokens=1000, n_tokens=500)
ROUTES = [route for router in ROUTERS for route in router.routes]
DOCUMENT = document(ROUTES, MODEL, keys=True)
CHAT, TEXT, TOKENS = "ChatCompletionRequest", "CompletionRequest", "TokenizeRequest"
RESPONSE, LENGTH, MESSAGE, COUNT = "ResponsesRequest", "InputTokensRequest", "MessagesRequest", "CountTokensRequest"
KINDS = {
    CHAT: ChatCompletionRequest,
    TEXT: CompletionRequest,
    TOKENS: TokenizeRequest,
    RESPONSE: ResponsesRequest,
    LENGTH: InputTokensRequest,
    MESSAGE: MessagesRequest,
    COUNT: CountTokensRequest,
}
ASK = {"model": "m", "prompt": "a"}
TOOLS = [{"type": "function", "function": {"name": "f"}}]
COUNTED = {"model": "m", "messages": [USER]}
TALK = {**COUNTED, "max_tokens": 9}
FORMAT = {"type": "json_schema", "schema": {}}
OWN_TOOLS = [{"name": "f", "input_schema": {}}]
RESPONSE_TOOLS = [{"type": "function", "name": "f"}]
ALLOWED = {"type": "allowed_tools", "mode": "auto", "tools": RESPONSE_TOOLS}


def response(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "input": "a", **fields}


def valid(name: str, instance: Any) -> bool:
    schema = {"$ref": f"#/components/schemas/{name}", "components": DOCUMENT["components"]}
    return bool(jsonschema_rs.Draft202012Validator(schema).is_valid(instance))


def accepted(name: str, instance: Any) -> bool:
    try:
        found: Any = parse(KINDS[name], json.dumps(instance).encode())
        if hasattr(found, "rules"):
            found.rules()
    except InvalidRequest:
        return False
    return True


def test_every_route_is_in_it(serve: Serve) -> None:
    every = [route for route in ROUTES if isinstance(route, APIRoute)]
    assert {route.path for route in every if not route.include_in_schema} == {"/", "/page/{name}"}  # for people
    routes = [route for route in every if route.include_in_schema]
    said = {(path, method.upper()) for path, methods in DOCUMENT["paths"].items() for method in methods}
    assert said == {(route.path_format, method) for route in routes for method in route.methods or ()}
    operations = {one["operationId"]: one for methods in DOCUMENT["paths"].values() for one in methods.values()}
    assert len(operations) == len(said)
    for link in DOCUMENT["paths"]["/v1/responses"]["post"]["responses"]["200"]["links"].values():
        variables = {one["name"] for one in operations[link["operationId"]]["parameters"] if one["in"] == "path"}
        assert set(link["parameters"]) == variables
    served = serve(ScriptedEngine()).http.get("/openapi.json").json()
    assert set(served["paths"]) == set(DOCUMENT["paths"])
    assert "401" not in json.dumps(served)


def test_what_the_parser_refuses_is_invalid() -> None:
    for fields, param, *_ in BAD:
        if all(not isinstance(value, float) or math.isfinite(value) for value in fields.values()):
            assert not valid(CHAT, body(**fields)), param
    for fields, param, _ in BAD_RESPONSES:
        assert not valid(RESPONSE, response(**fields)), param
    for fields, param in (*NOT_HONOURED, *WRONG):
        assert not valid(MESSAGE, {**TALK, **fields}), param


@pytest.mark.parametrize(
    ("name", "instance"),
    [
        (CHAT, body()),
        (CHAT, body(stream=True, stream_options={"include_usage": True}, stop=["a", "b"], logit_bias={"7": -100})),
        (CHAT, body(stream_options=None, max_tokens=1, max_completion_tokens=None, top_logprobs=0)),
        (CHAT, body(logprobs=True, top_logprobs=3, functions=[], prompt_cache_options={"mode": "implicit"})),
        (CHAT, body(messages=[{"role": "assistant", "content": None, "tool_calls": [CALL]}])),
        (CHAT, body(messages=[{"role": "user", "content": [{"type": "text", "text": "a"}]}])),
        (CHAT, body(tools=TOOLS, tool_choice={"type": "function", "function": {"name": "f"}})),
        (CHAT, body(response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": {}}})),
        (CHAT, body(prompt_cache_key=" a/b..c/.d ", metadata={"a": "b"})),
        (TEXT, ASK),
        (TEXT, {**ASK, "prompt": ["a", "b"], "echo": True, "suffix": None}),
        (TEXT, {**ASK, "prompt": [499, 0], "logprobs": 5, "best_of": 1}),
        (TEXT, {**ASK, "prompt": [[1], [2, 3]], "echo": False, "logprobs": 0}),
        (TOKENS, {"prompt": ""}),
        (TOKENS, {"messages": [USER], "add_generation_prompt": False, "add_special_tokens": False}),
        (RESPONSE, response(previous_response_id=None, include=None, max_output_tokens=10**9)),
        (RESPONSE, response(**CODEX)),
        (RESPONSE, response(top_logprobs=2, include=[LOGPROBS], stream=True, stream_options={})),
        (RESPONSE, {"model": "m", "previous_response_id": "resp_1"}),
        (RESPONSE, response(input="")),
        (RESPONSE, response(input=[{"id": "msg_1"}, {"role": "user", "content": "a", "type": None}])),
        (RESPONSE, response(tools=RESPONSE_TOOLS, tool_choice="required")),
        (RESPONSE, response(tools=RESPONSE_TOOLS, tool_choice=ALLOWED, text={"format": {**FORMAT, "name": "s"}})),
        (LENGTH, {"input": [{"id": "msg_1", "type": "item_reference"}], "model": None}),
        (
            MESSAGE,
            {**TALK, "system": [{"type": "text", "text": "a"}], "thinking": {"type": "enabled", "budget_tokens": 9}},
        ),
        (MESSAGE, {**TALK, "tools": OWN_TOOLS, "tool_choice": {"type": "tool", "name": "f"}}),
        (MESSAGE, {**TALK, "tool_choice": {"type": "none"}, "thinking": {"type": "adaptive", "budget_tokens": None}}),
        (MESSAGE, {**TALK, "output_config": {"format": FORMAT}, "output_format": None}),
        (COUNT, {**COUNTED, "tools": [{"type": "custom", **OWN_TOOLS[0]}], "output_format": FORMAT}),
    ],
)
def test_what_the_parser_accepts_is_valid(name: str, instance: Any) -> None:
    assert accepted(name, instance)
    assert valid(name, instance)


@pytest.mark.parametrize(
    ("name", "instance"),
    [
        (CHAT, body(tool_choice="required")),
        (CHAT, body(tools=[], tool_choice={"type": "function", "function": {"name": "f"}})),
        (CHAT, body(stream=False, stream_options={})),
        (CHAT, body(logit_bias={"x": 1})),
        (TEXT, {**ASK, "prompt": []}),
        (TEXT, {**ASK, "prompt": ["a", 1]}),
        (TEXT, {**ASK, "prompt": [[]]}),
        (TEXT, {**ASK, "suffix": ""}),
        (TEXT, {**ASK, "echo": True, "logprobs": 0}),
        (TOKENS, {"prompt": "", "messages": [USER]}),
        (TOKENS, {"messages": [USER], "add_special_tokens": True}),
        (RESPONSE, response(input=[])),
        (RESPONSE, response(include=[None])),
        (RESPONSE, response(top_logprobs=1, include=["reasoning.encrypted_content"])),
        (RESPONSE, response(stream=None, stream_options={})),
        (RESPONSE, response(tools=[], tool_choice="required")),
        (RESPONSE, response(tool_choice=ALLOWED)),
        (LENGTH, {"input": None}),
        (MESSAGE, COUNTED),
        (MESSAGE, {**TALK, "tools": None, "tool_choice": {"type": "tool", "name": "f"}}),
        (COUNT, {**COUNTED, "tools": [], "tool_choice": {"type": "any"}}),
        (COUNT, {**COUNTED, "output_format": FORMAT, "output_config": {"format": FORMAT}}),
        (COUNT, {**COUNTED, "thinking": {"type": "enabled", "budget_tokens": None}}),
    ],
)
def test_conditions_are_the_parsers(name: str, instance: Any) -> None:
    assert not accepted(name, instance)
    assert not valid(name, instance)


def test_it_is_true_of_the_loaded_model() -> None:
    assert MODEL_FACT not in json.dumps(DOCUMENT)
    assert [valid(TEXT, {**ASK, "model": name}) for name in ("org/m", "m", "default", "org", "")] == [True] * 3 + [
        False
    ] * 2
    assert not valid(TEXT, {**ASK, "prompt": [500]})
    assert valid(TEXT, {**ASK, "max_tokens": 999})
    assert not valid(TEXT, {**ASK, "max_tokens": 1000})
    assert not valid(MESSAGE, {**TALK, "max_tokens": 1000})
    assert not any(valid(name, {**ASK, **TALK, "model": "other"}) for name in (RESPONSE, LENGTH, MESSAGE, COUNT))


@pytest.mark.parametrize(
    "name", ["a", "a/b", ".a", "..a", "a.", "größe", "🙂", "a//b", "a b", "/a", ".", "..", "a/..", "", "a\n"]
)
def test_session_names(name: str) -> None:
    [parameter] = DOCUMENT["paths"]["/v1/sessions/{session_id}"]["get"]["parameters"]
    try:
        checked_name(name, "id")
    except InvalidRequest:
        assert not jsonschema_rs.is_valid(parameter["schema"], name)
    else:
        assert jsonschema_rs.is_valid(parameter["schema"], name)


def test_headers_and_queries() -> None:
    counted, asked = (DOCUMENT["paths"][path]["post"]["responses"] for path in ("/v1/messages", "/v1/responses"))
    assert all({"request-id", "x-request-id"} <= set(one["headers"]) for one in counted.values())
    assert not any("request-id" in one["headers"] for one in asked.values())
    query = {
        one["name"]: one["schema"] for one in DOCUMENT["paths"]["/v1/responses/{response_id}"]["get"]["parameters"]
    }
    assert query["stream"] == {"enum": ["false"]}
    assert "starting_after" not in query


def test_keys(serve: Serve) -> None:
    assert DOCUMENT["components"]["securitySchemes"] == {"bearer": {"type": "http", "scheme": "bearer"}}
    keyed = {path for path, methods in DOCUMENT["paths"].items() for one in methods.values() if "security" in one}
    assert set(DOCUMENT["paths"]) - keyed == {"/health", "/metrics"}
    server = serve(ScriptedEngine(), api_keys=("one",))
    assert server.http.get("/openapi.json").status_code == 401
    served = server.http.get("/openapi.json", headers={"Authorization": "Bearer one"}).json()
    assert served["paths"]["/v1/models"]["get"]["security"] == [{"bearer": []}]
