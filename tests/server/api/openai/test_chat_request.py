"""server.schemas: what is accepted, and how each class of bad input is refused."""

import json
from typing import Any

import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsBase

from server.api.openai.chat_request import ChatCompletionRequest
from server.errors import InvalidRequest, UnsupportedField
from server.http.routing import parse as parse_body
from server.protocol import SamplingParams

USER = {"role": "user", "content": "hi"}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [USER], **fields}


def parse(**fields: Any) -> ChatCompletionRequest:
    return parse_body(ChatCompletionRequest, json.dumps(body(**fields)).encode())


def refusal(raw: bytes) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parse_body(ChatCompletionRequest, raw)
    assert caught.value.status == 400
    assert caught.value.type == "invalid_request_error"
    return caught.value


def test_everything_honoured_is_read() -> None:
    chat = parse(
        stream=True,
        stream_options={"include_usage": True},
        max_completion_tokens=5,
        temperature=0,
        top_p=0.5,
        top_k=3,
        min_p=0.1,
        frequency_penalty=0.5,
        presence_penalty=-1,
        repetition_penalty=1.1,
        logit_bias={"50256": -100},
        seed=-1,
        logprobs=True,
        top_logprobs=3,
        stop="END",
        prompt_cache_key="k",
        user="u",
        metadata={"a": "b"},
        store=False,
        n=1,
    )
    assert (chat.token_limit, chat.temperature, chat.top_p, chat.top_k, chat.min_p) == (5, 0.0, 0.5, 3, 0.1)
    assert (chat.stop_texts, chat.include_usage, chat.prompt_cache_key) == (("END",), True, "k")
    assert chat.sampling() == SamplingParams(0.0, 0.5, 3, 0.1, -1.0, 0.5, 1.1, ((50256, -100.0),), -1)


def test_null_counts_as_not_given() -> None:
    names = set(ChatCompletionRequest.model_fields) - {"model", "messages"}
    chat = parse(**dict.fromkeys(names))
    assert (chat.token_limit, chat.stop_texts, chat.include_usage) == (None, (), False)


def test_every_field_of_openais_spec_is_known() -> None:
    assert set(CompletionCreateParamsBase.__annotations__) <= set(ChatCompletionRequest.model_fields)


@pytest.mark.parametrize(
    "neutral",
    [
        {"frequency_penalty": 0},
        {"presence_penalty": 0.0},
        {"logprobs": False},
        {"top_logprobs": 0},
        {"logit_bias": {}},
        {"response_format": {"type": "text"}},
        {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True},
        {"functions": [], "function_call": "none"},
        {"tool_choice": "none"},
        {"modalities": ["text"]},
        {"service_tier": "default"},
        {"service_tier": "auto"},
        {"prompt_cache_retention": "in_memory"},
        {"prompt_cache_options": {"mode": "implicit"}},
        {"verbosity": "medium"},
        {"safety_identifier": "s"},
        {"stream": True, "stream_options": {"include_obfuscation": False}},
    ],
)
def test_neutral_values_pass(neutral: dict[str, Any]) -> None:
    parse(**neutral)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("store", True),
        ("functions", [{"name": "f"}]),
        ("function_call", {"name": "f"}),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "alloy", "format": "wav"}),
        ("prediction", {"type": "content", "content": "x"}),
        ("moderation", {"model": "m"}),
        ("web_search_options", {}),
        ("verbosity", "high"),
        ("service_tier", "flex"),
        ("prompt_cache_options", {"mode": "explicit"}),
        ("prompt_cache_retention", "24h"),
    ],
)
def test_known_but_not_honoured_yet_is_refused_by_name(field: str, value: Any) -> None:
    error = refusal(json.dumps(body(**{field: value})).encode())
    assert isinstance(error, UnsupportedField)
    assert error.param == field
    assert error.code in ("unsupported_parameter", "unsupported_value")
    assert "supported by this version" in error.message
    assert field in error.message


# Fields of a request, then param, code and words of the error they get.
BAD: list[tuple[dict[str, Any], str, str | None, str]] = [
    ({"foo": 1}, "foo", "unknown_parameter", "Unrecognized request argument supplied: foo"),
    (
        {"messages": [{**USER, "foo": 1}]},
        "messages[0].foo",
        "unknown_parameter",
        "Unknown parameter: 'messages[0].foo'.",
    ),
    ({"logit_bias": {"5": 101}}, "logit_bias.5", "decimal_above_max_value", "Expected a value <= 100"),
    ({"logit_bias": {"a": 1}}, "logit_bias.a", "invalid_value", "token id"),
    ({"logit_bias": {"-1": 1}}, "logit_bias.-1", "invalid_value", "token id"),
    ({"logit_bias": {"9" * 10: 1}}, "logit_bias.9999999999", "invalid_value", "token id"),
    ({"top_logprobs": 2}, "top_logprobs", None, "only allowed when 'logprobs'"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "integer_above_max_value", "<= 20"),
    ({"seed": 2**63}, "seed", "integer_above_max_value", "Expected a value <"),
    ({"seed": 0.5}, "seed", "invalid_type", "expected an integer"),
    ({"presence_penalty": -2.1}, "presence_penalty", "decimal_below_min_value", ">= -2"),
    ({"repetition_penalty": 0}, "repetition_penalty", "decimal_below_min_value", ">= 0.01"),
    ({"messages": []}, "messages", "empty_array", "Invalid 'messages': empty array."),
    ({"messages": None}, "messages", "invalid_type", "expected an array, but got null"),
    ({"messages": "hi"}, "messages", "invalid_type", "expected an array, but got a string"),
    ({"messages": ["hi"]}, "messages[0]", "invalid_type", "expected an object, but got a string"),
    ({"messages": [USER, {"role": "wizard", "content": ""}]}, "messages[1].role", "invalid_value", "'wizard'"),
    ({"messages": [{"role": 3, "content": ""}]}, "messages[0].role", "invalid_value", "Supported values are"),
    ({"messages": [{"content": ""}]}, "messages[0].role", "missing_required_parameter", "'messages[0].role'"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter", "messages[0].content"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "invalid_type", "but got null"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "invalid_type", "array of objects"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "empty_array", "empty array"),
    ({"messages": [{"role": "user", "content": [3]}]}, "messages[0].content[0]", "invalid_type", "an object"),
    (
        {"messages": [{"role": "user", "content": [{"type": "zzz", "text": "a"}]}]},
        "messages[0].content[0].type",
        "invalid_value",
        "'zzz'",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content[0].type",
        "unsupported_value",
        "supported by this version",
    ),
    ({"messages": [{"role": "assistant", "content": None}]}, "messages[0]", "invalid_value", "tool_calls"),
    ({"messages": [{"role": "assistant"}]}, "messages[0]", "invalid_value", "tool_calls"),
    (
        {"messages": [{"role": "tool", "content": "x"}]},
        "messages[0].tool_call_id",
        "missing_required_parameter",
        "tool",
    ),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "", "arguments": ""}}]}]},
        "messages[0].tool_calls[0].function.name",
        "invalid_value",
        "non-empty",
    ),
    ({"temperature": float("nan")}, "temperature", "invalid_value", "NaN"),
    ({"temperature": float("inf")}, "temperature", "invalid_value", "Infinity"),
    ({"temperature": -0.1}, "temperature", "decimal_below_min_value", "below minimum"),
    ({"temperature": 2.1}, "temperature", "decimal_above_max_value", "Expected a value <= 2, but got 2.1 instead"),
    ({"temperature": True}, "temperature", "invalid_type", "but got a boolean"),
    ({"temperature": "1"}, "temperature", "invalid_type", "but got a string"),
    ({"top_p": 0}, "top_p", "decimal_below_min_value", "> 0"),
    ({"top_p": 1.5}, "top_p", "decimal_above_max_value", "<= 1"),
    ({"top_k": -1}, "top_k", "integer_below_min_value", ">= 0"),
    ({"top_k": 2**70}, "top_k", "integer_above_max_value", "<= 2147483647"),
    ({"min_p": 2}, "min_p", "decimal_above_max_value", "<= 1"),
    ({"max_tokens": 0}, "max_tokens", "integer_below_min_value", ">= 1"),
    ({"max_tokens": True}, "max_tokens", "invalid_type", "but got a boolean"),
    ({"max_tokens": 1.5}, "max_tokens", "invalid_type", "but got a decimal number"),
    ({"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens", "invalid_parameter_combination", "at the same time"),
    ({"stream": 1}, "stream", "invalid_type", "expected a boolean"),
    ({"stream_options": {"include_usage": True}}, "stream_options", None, "only allowed when 'stream'"),
    ({"stop": ["a"] * 5}, "stop", "array_above_max_length", "maximum length 4"),
    ({"stop": [1]}, "stop[0]", "invalid_type", "expected a string"),
    ({"stop": {"a": 1}}, "stop", "invalid_type", "array of strings"),
    ({"stop": ["a", ""]}, "stop[1]", "invalid_value", "non-empty"),
    ({"n": True}, "n", "invalid_type", "expected an integer"),
    ({"user": 3}, "user", "invalid_type", "expected a string"),
    ({"metadata": {"a": 1}}, "metadata.a", "invalid_type", "expected a string"),
    ({"metadata": {str(i): "" for i in range(17)}}, "metadata", "object_above_max_length", "maximum length 16"),
    ({"metadata": {"a": "x" * 513}}, "metadata.a", "string_above_max_length", "maximum length 512"),
    ({"model": None}, "model", "invalid_type", "expected a string"),
]


@pytest.mark.parametrize(("fields", "param", "code", "words"), BAD)
def test_bad_fields(fields: dict[str, Any], param: str, code: str | None, words: str) -> None:
    error = refusal(json.dumps(body(**fields)).encode())
    assert (error.param, error.code) == (param, code)
    assert words in error.message
    assert "\n" not in error.message


def test_missing_fields() -> None:
    assert refusal(b"{}").param == "model"
    assert refusal(b'{"model": "m"}').param == "messages"


@pytest.mark.parametrize(
    ("raw", "where"),
    [
        (b"", "EOF while parsing a value at line 1 column 0"),
        (b'{"model": ', "EOF while parsing a value at line 1 column 10"),
        (b'{"model": "m",\n "messages": [}', "line 2 column 15"),
        (b"{'model': 'm'}", "line 1 column 2"),
        (b'{"model": "\xff"}', "invalid unicode code point"),
        (b'{"model": "\\ud800"}', "hex escape"),
        (b'{"model": "\\ud800\\u0041"}', "surrogate"),
        (b'{"model": "\\udc00"}', "surrogate"),
        (b'{"model": "a\x01"}', "control character"),
        (b'{"model": "m", "max_tokens": ' + b"9" * 5000 + b"}", "number out of range"),
        (b"[" * 5000, "recursion limit"),
        (b'{"model": "m"} trailing', "trailing characters"),
    ],
)
def test_malformed_json_says_where_it_broke(raw: bytes, where: str) -> None:
    error = refusal(raw)
    assert error.message.startswith("We could not parse the JSON body of your request: ")
    assert where in error.message
    assert (error.param, error.code) == (None, "invalid_json")


@pytest.mark.parametrize("raw", [b"3", b"null", b'"text"', b"[]", b"true"])
def test_json_that_is_no_object(raw: bytes) -> None:
    assert refusal(raw).message.startswith("The body must be an object, but is ")


def test_nan_literals_and_overflowing_floats() -> None:
    for literal in (b"NaN", b"Infinity", b"-Infinity", b"1e999"):
        raw = b'{"model": "m", "messages": [{"role": "user", "content": "a"}], "temperature": ' + literal + b"}"
        assert refusal(raw).param == "temperature"


def test_long_values_are_not_echoed_whole() -> None:
    assert len(refusal(json.dumps(body(**{"x" * 10_000: 1})).encode()).message) < 300
    role = {"role": "y" * 10_000, "content": ""}
    assert len(refusal(json.dumps(body(messages=[role])).encode()).message) < 300


def test_control_characters_in_text_are_text() -> None:
    chat = parse(messages=[{"role": "user", "content": "a\x00b\x1b[0m"}])
    assert chat.conversation().messages == [{"role": "user", "content": "a\x00b\x1b[0m"}]


def test_a_huge_max_tokens_is_for_the_context_check() -> None:
    assert parse(max_tokens=10**30).token_limit == 10**30


def test_template_messages() -> None:
    chat = parse(
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "Ann"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{**CALL, "index": 0}],
                "refusal": None,
                "annotations": [],
            },
            {"role": "tool", "content": "4", "tool_call_id": "c1"},
            {"role": "assistant", "content": "four", "reasoning_content": "2+2"},
        ]
    )
    assert chat.conversation().messages == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "a\nb", "name": "Ann"},
        {"role": "assistant", "content": "", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": {}}}]},
        {"role": "tool", "content": "4", "tool_call_id": "c1"},
        {"role": "assistant", "content": "four", "reasoning_content": "2+2"},
    ]


@pytest.mark.parametrize(
    "arguments",
    ['{"a": "\\ud800"}', '{"a": ' * 5000 + "1" + "}" * 5000, '{"a": NaN}', '{"a": ' + "9" * 5000 + "}"],
)
def test_arguments_that_templates_choke_on_stay_text(arguments: str) -> None:
    call = {**CALL, "function": {"name": "f", "arguments": arguments}}
    chat = parse(messages=[USER, {"role": "assistant", "tool_calls": [call]}])
    assert chat.conversation().messages[1]["tool_calls"][0]["function"]["arguments"] == arguments
