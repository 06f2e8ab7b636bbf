"""Tools, choices among them, response formats and several answers, from the wire to the engine's rules and back."""

import json
from typing import Any

import pytest
from openai.types.chat import ChatCompletionMessageFunctionToolCall

from server.api.openai.chat_request import ChatCompletionRequest
from server.errors import InvalidRequest, OutOfMemory
from server.http.routing import parse
from server.protocol import AnswerRules, Failed, Finished, TextDelta, Tool, ToolCall, Usage
from tests.server.conftest import BODY, CHAT, STREAM, Serve, error_of, events_of
from tests.server.scripted_engine import ScriptedEngine

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {"name": "weather", "description": "Tells it.", "parameters": PARAMETERS, "strict": True},
}
CLOCK: dict[str, Any] = {"type": "function", "function": {"name": "clock"}}
TOOLS = [WEATHER, CLOCK]
KNOWN = (
    Tool("weather", PARAMETERS, strict=True, param="tools[0].function.parameters"),
    Tool("clock", param="tools[1].function.parameters"),
)
NAMED = {"type": "function", "function": {"name": "clock"}}


def rules(**fields: Any) -> AnswerRules:
    return parse(ChatCompletionRequest, json.dumps({**BODY, **fields}).encode()).rules()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, AnswerRules()),
        ({"tools": TOOLS}, AnswerRules(KNOWN)),
        ({"tools": TOOLS, "tool_choice": "required"}, AnswerRules(KNOWN, "required")),
        ({"tools": TOOLS, "tool_choice": "none"}, AnswerRules(KNOWN, "none")),
        ({"tools": TOOLS, "tool_choice": NAMED}, AnswerRules(KNOWN, "required", frozenset({"clock"}))),
        (
            {
                "tools": TOOLS,
                "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NAMED]}},
            },
            AnswerRules(KNOWN, "auto", frozenset({"clock"})),
        ),
        ({"tools": TOOLS, "parallel_tool_calls": False}, AnswerRules(KNOWN, parallel=False)),
        ({"response_format": {"type": "text"}}, AnswerRules()),
        ({"response_format": {"type": "json_object"}}, AnswerRules(schema={"type": "object"})),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": PARAMETERS}}},
            AnswerRules(schema=PARAMETERS),
        ),
    ],
)
def test_rules_of_a_request(fields: dict[str, Any], expected: AnswerRules) -> None:
    assert rules(**fields) == expected


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"tool_choice": "required"}, "tool_choice", "only allowed when 'tools' are specified"),
        ({"tools": [CLOCK], "tool_choice": {"type": "function", "function": {"name": "weather"}}}, "tool_choice",
         "'weather' not found"),
        ({"tools": [CLOCK, CLOCK]}, "tools", "called 'clock'"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type", "'custom'. Supported values are"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "match pattern"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "Missing required parameter"),
        ({"tools": [{"type": "function", "function": {"name": "a", "colour": 1}}]}, "tools[0].function.colour",
         "Unknown parameter"),
        ({"tools": [CLOCK], "tool_choice": "maybe"}, "tool_choice", "'none', 'auto'"),
        ({"tools": [CLOCK], "tool_choice": 3}, "tool_choice", "one of a string or an object"),
        ({"tools": [CLOCK], "tool_choice": {"type": "custom", "custom": {}}}, "tool_choice.type", "'custom'"),
        ({"response_format": {"type": "grammar"}}, "response_format.type", "'json_schema'"),
        ({"response_format": {}}, "response_format.type", "Missing required parameter"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "Missing required parameter"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": []}}},
         "response_format.json_schema.schema", "expected an object"),
        ({"n": 0}, "n", "below minimum"),
        ({"n": 129}, "n", "above maximum"),
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_refused(fields: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        rules(**fields)
    assert refused.value.param == param
    assert words in refused.value.message


def test_templates_get_tools_without_what_is_meant_for_the_server() -> None:
    chat = parse(ChatCompletionRequest, json.dumps({**BODY, "tools": TOOLS}).encode())
    weather = {"name": "weather", "description": "Tells it.", "parameters": PARAMETERS}
    assert chat.conversation().tools == [{"type": "function", "function": weather}, CLOCK]


def test_calls_in_history_have_their_arguments_as_objects() -> None:
    """As templates write them, which would quote a string again; what is no object stays as it was written."""
    calls = [
        {"id": f"c{i}", "type": "function", "function": {"name": "f", "arguments": text}}
        for i, text in enumerate(['{"a": [1]}', "[1]", "{broken", ""])
    ]
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": calls}]
    chat = parse(ChatCompletionRequest, json.dumps({**BODY, "messages": messages}).encode())
    sent = chat.conversation().messages[1]["tool_calls"]
    assert [call["function"]["arguments"] for call in sent] == [{"a": [1]}, "[1]", "{broken", ""]


USAGE = Usage(12, 8, 30)
CALLING = (
    TextDelta("Let me look."),
    ToolCall("call_1", "weather", '{"city": "Oslo"}'),
    ToolCall("call_2", "clock", "{}"),
    Finished("tool_calls", USAGE),
)


def test_calls_in_one_answer(serve: Serve) -> None:
    served = serve(ScriptedEngine(CALLING))
    choice = served.openai.chat.completions.create(**BODY, tools=TOOLS).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Let me look.")
    found = choice.message.tool_calls or []
    calls = [call for call in found if isinstance(call, ChatCompletionMessageFunctionToolCall)]
    assert len(calls) == len(found)
    assert [(call.id, call.function.name, call.function.arguments) for call in calls] == [
        ("call_1", "weather", '{"city": "Oslo"}'),
        ("call_2", "clock", "{}"),
    ]
    assert served.outcomes() == {"tool_calls": 1}


def test_an_answer_of_calls_alone_has_no_content(serve: Serve) -> None:
    served = serve(ScriptedEngine(CALLING[1:]))
    body = served.http.post(CHAT, json={**BODY, "tools": TOOLS}).json()
    message = body["choices"][0]["message"]
    assert message["content"] is None
    assert len(message["tool_calls"]) == 2


def test_calls_in_a_stream(serve: Serve) -> None:
    served = serve(ScriptedEngine(CALLING))
    events = [json.loads(event) for event in events_of(served.http.post(CHAT, json=STREAM).text)[:-1]]
    deltas = [event["choices"][0]["delta"] for event in events]
    assert deltas == [
        {"role": "assistant", "content": ""},
        {"content": "Let me look."},
        {"tool_calls": [{"index": 0, "id": "call_1", "type": "function",
                         "function": {"name": "weather", "arguments": ""}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"city": "Oslo"}'}}]},
        {"tool_calls": [{"index": 1, "id": "call_2", "type": "function",
                         "function": {"name": "clock", "arguments": ""}}]},
        {"tool_calls": [{"index": 1, "function": {"arguments": "{}"}}]},
        {},
    ]  # fmt: skip
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_several_answers_have_their_index_and_one_usage(serve: Serve) -> None:
    served = serve(ScriptedEngine())
    answer = served.openai.chat.completions.create(**BODY, n=3, seed=2**63 - 1)
    assert [(choice.index, choice.message.content) for choice in answer.choices] == [(i, "Hello!") for i in range(3)]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (12, 9)
    requests = served.engine.requests
    assert [request.sampling.seed for request in requests] == [2**63 - 1, -(2**63), -(2**63) + 1]
    assert [request.shares_prompt_of for request in requests] == [None, *[requests[0].request_id] * 2]
    assert len({request.request_id for request in requests}) == 3


def test_several_answers_in_a_stream(serve: Serve) -> None:
    served = serve(ScriptedEngine())
    options = {"include_usage": True}
    lines = events_of(served.http.post(CHAT, json={**STREAM, "n": 2, "stream_options": options}).text)
    assert lines[-1] == "[DONE]"
    events = [json.loads(event) for event in lines[:-1]]
    assert [event["choices"] for event in events].count([]) == 1
    assert events[-1]["usage"]["completion_tokens"] == 6
    texts = {0: "", 1: ""}
    for event in events[:-1]:
        choice = event["choices"][0]
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == {0: "Hello!", 1: "Hello!"}
    assert served.outcomes() == {"stop": 1}


def test_one_answer_that_fails_ends_them_all(serve: Serve) -> None:
    served = serve(ScriptedEngine((TextDelta("a"), Failed(OutOfMemory()))))
    error = error_of(served.http.post(CHAT, json={**BODY, "n": 2}))
    assert error["code"] == "out_of_memory"
    assert served.outcomes() == {"error": 1}
    assert set(served.engine.cancelled) <= {request.request_id for request in served.engine.requests[1:]}
