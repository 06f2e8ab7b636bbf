"""server.api.responses.request and its input: what is accepted, what is refused by name, what reaches the template."""

import json
from typing import Any

import pytest
from openai.types.responses import input_token_count_params, response_create_params

from server.api.responses.input import ItemReference
from server.api.responses.items import messages_of
from server.api.responses.request import InputTokensRequest, ResponsesRequest
from server.errors import InvalidRequest
from server.http.routing import parse as parse_body
from server.protocol import SamplingParams

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string", "default": None}}}
TOOL = {"type": "function", "name": "weather", "description": "Tells it.", "parameters": PARAMETERS}
CALL = {"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": '{"city": "Rome"}'}
RESULT = {"type": "function_call_output", "call_id": "call_1", "output": "sunny"}
CODEX: dict[str, Any] = {
    "instructions": "You are a coding agent.",
    "input": [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Sandbox: none."}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "What is here?"}]},
        {
            "type": "reasoning",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "I look."}],
            "encrypted_content": None,
        },
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Looking."}]},
        {"type": "function_call", "name": "shell", "arguments": '{"command":["ls"]}', "call_id": "call_a"},
        {"type": "function_call", "name": "shell", "arguments": '{"command":["pwd"]}', "call_id": "call_b"},
        {"type": "function_call_output", "call_id": "call_a", "output": "README.md"},
        {"type": "function_call_output", "call_id": "call_b", "output": "/src"},
    ],
    "tools": [{"type": "function", "name": "shell", "description": "Runs it.", "strict": False, "parameters": {}}],
    "tool_choice": "auto",
    "parallel_tool_calls": False,
    "reasoning": {"effort": "medium", "summary": "auto"},
    "store": False,
    "stream": True,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "0199-codex",
    "client_metadata": {"x-codex-installation-id": "1"},
}
"""A later request of Codex CLI's."""


def parse(**fields: Any) -> ResponsesRequest:
    return parse_body(ResponsesRequest, json.dumps({"model": "m", "input": "hi", **fields}).encode())


def messages(asked: ResponsesRequest) -> list[dict[str, Any]]:
    return messages_of(asked.instructions, [item for item in asked.items() if not isinstance(item, ItemReference)])


def test_every_field_of_openais_spec_is_known() -> None:
    create = response_create_params.ResponseCreateParamsStreaming.__annotations__
    assert set(create) | set(response_create_params.ResponseCreateParamsBase.__annotations__) <= set(
        ResponsesRequest.model_fields
    )
    count = input_token_count_params.InputTokenCountParams.__annotations__
    assert set(count) <= set(InputTokensRequest.model_fields)


def test_null_counts_as_not_given() -> None:
    asked = parse(**dict.fromkeys(set(ResponsesRequest.model_fields) - {"model", "input"}))
    assert (asked.stored, asked.wants_logprobs, asked.functions) == (True, False, [])
    assert asked.sampling() == SamplingParams(1.0, 1.0)
    assert asked.format.type == "text"
    rules = asked.rules()
    assert (rules.tools, rules.tool_choice, rules.allowed_tools, rules.parallel, rules.schema) == (
        (),
        "auto",
        None,
        True,
        None,
    )


def test_what_codex_sends_becomes_one_conversation() -> None:
    asked = parse(**CODEX)

    def call(id: str, command: str) -> dict[str, Any]:
        function = {"name": "shell", "arguments": {"command": [command]}}
        return {"id": id, "type": "function", "function": function}

    assert messages(asked) == [
        {"role": "system", "content": "You are a coding agent.\n\nSandbox: none."},
        {"role": "user", "content": "What is here?"},
        {
            "role": "assistant",
            "content": "Looking.",
            "reasoning_content": "I look.",
            "tool_calls": [call("call_a", "ls"), call("call_b", "pwd")],
        },
        {"role": "tool", "tool_call_id": "call_a", "content": "README.md"},
        {"role": "tool", "tool_call_id": "call_b", "content": "/src"},
    ]
    assert (asked.stored, asked.rules().parallel, asked.rules().tools[0].strict) == (False, False, False)


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ([{"role": "user", "content": "a"}], [("user", "a")]),
        ([{"role": "user", "content": [{"type": "input_text", "text": t} for t in "ab"]}], [("user", "a\nb")]),
        (
            [
                {"role": "system", "content": "a"},
                {"role": "developer", "content": "b"},
                {"role": "user", "content": ""},
            ],
            [("system", "a\n\nb"), ("user", "")],
        ),
        ([{"role": "user", "content": "a"}, {"role": "developer", "content": "b"}], [("user", "a"), ("system", "b")]),
        # Two answers in a row stay two; what surrounds a call is one.
        ([{"role": "assistant", "content": t} for t in "ab"], [("assistant", "a"), ("assistant", "b")]),
        ([{"role": "assistant", "content": "a"}, CALL, {"role": "assistant", "content": "b"}], [("assistant", "ab")]),
        ([CALL, RESULT, CALL], [("assistant", ""), ("tool", "sunny"), ("assistant", "")]),
        ([{**RESULT, "output": [{"type": "input_text", "text": t} for t in "ab"]}], [("tool", "a\nb")]),
        (
            [{"role": "assistant", "content": "a"}, {"type": "reasoning", "summary": []}, CALL],
            [("assistant", "a"), ("assistant", "")],
        ),
    ],
)
def test_items_as_a_template_takes_them(items: list[Any], expected: list[tuple[str, str]]) -> None:
    assert [(message["role"], message["content"]) for message in messages(parse(input=items))] == expected


def test_thoughts_go_on_by_their_words_or_their_summary() -> None:
    summary = [{"type": "summary_text", "text": "short"}]
    words = [{"type": "reasoning_text", "text": "long"}]
    for fields, thought in (({"summary": summary}, "short"), ({"summary": summary, "content": words}, "long")):
        [message] = messages(parse(input=[{"type": "reasoning", "id": "rs_1", **fields}]))
        assert message == {"role": "assistant", "content": "", "reasoning_content": thought}


def test_ids_are_kept_or_made() -> None:
    given, made = parse(input=[{"role": "user", "content": "a", "id": "msg_mine"}, CALL]).items()
    assert given.id == "msg_mine"
    assert made.id.startswith("fc_")


def test_tools_are_strict_unless_they_say_otherwise() -> None:
    named = [{**TOOL, "name": name, "strict": strict} for name, strict in (("a", None), ("b", True), ("c", False))]
    asked = parse(tools=[TOOL, *named])
    assert [tool.strict for tool in asked.rules().tools] == [True, True, True, False]
    assert [tool.strict for tool in asked.rules(strict=False).tools] == [False, False, True, False]
    assert asked.strict_by_default
    assert not parse(tools=named[1:]).strict_by_default
    assert asked.functions[0].template()["function"] == {
        key: TOOL[key] for key in ("name", "description", "parameters")
    }


@pytest.mark.parametrize(
    ("choice", "mode", "allowed"),
    [
        ("none", "none", None),
        ("required", "required", None),
        ({"type": "function", "name": "weather"}, "required", {"weather"}),
        (
            {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "weather"}]},
            "auto",
            {"weather"},
        ),
    ],
)
def test_choices(choice: Any, mode: str, allowed: set[str] | None) -> None:
    rules = parse(tools=[TOOL], tool_choice=choice).rules()
    assert (rules.tool_choice, rules.allowed_tools) == (mode, allowed)


def test_formats() -> None:
    schema = {"type": "object", "properties": {"a": {"default": None}}}
    named = {"type": "json_schema", "name": "x", "schema": schema, "strict": True}
    rules = parse(text={"format": named}).rules()
    assert (rules.schema, rules.param) == (schema, "text.format.schema")
    assert parse(text={"format": {"type": "json_object"}, "verbosity": "medium"}).rules().schema == {"type": "object"}
    assert parse(text={"format": {"type": "text"}}).rules().schema is None


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"input": None}, "input", "missing_required_parameter"),
    ({"input": []}, "input", "missing_required_parameter"),
    ({"input": 5}, "input", "invalid_type"),
    ({"input": [5]}, "input[0]", "invalid_type"),
    ({"input": [{"content": "a"}]}, "input[0].type", "missing_required_parameter"),
    ({"input": [{"role": "robot", "content": "a"}]}, "input[0].role", "invalid_value"),
    ({"input": [{"role": "user", "content": "a", "x": 1}]}, "input[0].x", "unknown_parameter"),
    ({"input": [{"role": "user", "content": []}]}, "input[0].content", "empty_array"),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:,"}]}]},
        "input[0].content[0].type",
        "unsupported_value",
    ),
    (
        {"input": [{"role": "user", "content": [{"text": "a"}]}]},
        "input[0].content[0].type",
        "missing_required_parameter",
    ),
    ({"input": [{"type": "web_search_call", "id": "ws_1"}]}, "input[0].type", "unsupported_value"),
    ({"input": [{**RESULT, "output": [{"type": "input_file"}]}]}, "input[0].output[0].type", "unsupported_value"),
    ({"input": [{**CALL, "async": True}]}, "input[0].async", "unsupported_value"),
    ({"input": [{**CALL, "call_id": ""}]}, "input[0].call_id", "invalid_value"),
    (
        {"input": [{"type": "reasoning", "summary": [], "encrypted_content": "gAAAA"}]},
        "input[0].encrypted_content",
        "unsupported_parameter",
    ),
    ({"background": True}, "background", "unsupported_value"),
    ({"conversation": "conv_1"}, "conversation", "unsupported_parameter"),
    ({"prompt": {"id": "p"}}, "prompt", "unsupported_parameter"),
    ({"truncation": "auto"}, "truncation", "unsupported_value"),
    ({"service_tier": "flex"}, "service_tier", "unsupported_value"),
    ({"moderation": {"model": "m"}}, "moderation", "unsupported_parameter"),
    ({"context_management": [{"type": "compaction"}]}, "context_management", "unsupported_parameter"),
    ({"include": ["file_search_call.results"]}, "include[0]", "unsupported_value"),
    ({"top_logprobs": 2}, "top_logprobs", ""),
    ({"stream_options": {}}, "stream_options", ""),
    ({"reasoning": {"summary": "detailed"}}, "reasoning.summary", "unsupported_value"),
    ({"reasoning": {"effort": "extreme"}}, "reasoning.effort", "invalid_value"),
    ({"text": {"verbosity": "low"}}, "text.verbosity", "unsupported_value"),
    ({"text": {"format": {"type": "grammar"}}}, "text.format.type", "invalid_value"),
    ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema", "missing_required_parameter"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type", "unsupported_value"),
    ({"tools": [{"type": "custom", "name": "a"}]}, "tools[0].type", "unsupported_value"),
    ({"tools": [{"name": "a"}]}, "tools[0].type", "missing_required_parameter"),
    ({"tools": [{**TOOL, "name": "a b"}]}, "tools[0].name", "invalid_value"),
    ({"tools": [{**TOOL, "defer_loading": True}]}, "tools[0].defer_loading", "unsupported_value"),
    ({"tool_choice": {"type": "mcp", "server_label": "a"}}, "tool_choice.type", "unsupported_value"),
    ({"tool_choice": "any"}, "tool_choice", "invalid_value"),
    (
        {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "mcp"}]}},
        "tool_choice.tools[0].type",
        "unsupported_value",
    ),
    ({"max_output_tokens": 0}, "max_output_tokens", "integer_below_min_value"),
    ({"temperature": 2.1}, "temperature", "decimal_above_max_value"),
    ({"max_tool_calls": 0}, "max_tool_calls", "integer_below_min_value"),
    ({"messages": []}, "messages", "unknown_parameter"),
]


@pytest.mark.parametrize(("fields", "param", "code"), BAD, ids=[param for _, param, _ in BAD])
def test_refusals_name_the_field(fields: dict[str, Any], param: str, code: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(**fields)
    assert (caught.value.param, caught.value.code or "") == (param, code)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "other"}}, "tool_choice"),
        ({"tools": [TOOL, TOOL]}, "tools"),
    ],
)
def test_rules_that_contradict_each_other(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(**fields).rules()
    assert caught.value.param == param
