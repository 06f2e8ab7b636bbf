"""The short form of `python -m tests.soak openapi`, and what it lets pass."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.soak.fuzz.openapi_bodies import sendable, unforeseeable

LIMITS = {"max_tokens": 8191, "token": 16383}
CHAT = "/v1/chat/completions"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"


@pytest.fixture
def run() -> Callable[..., Any]:
    pytest.importorskip("schemathesis")
    from tests.soak.fuzz import openapi

    return openapi.run


def test_the_server_keeps_to_its_document(run: Callable[..., Any]) -> None:
    result = run(60, 1, say=lambda text: None, phases=("fuzzing", "stateful"), examples=2, step=37)
    assert result.wrong == []
    statuses = {status for _, status in result.answers}
    assert {200, 400, 401, 404} <= statuses


@pytest.mark.parametrize(
    ("body", "sent"),
    [
        ({}, {"max_tokens": 6}),
        ({"max_tokens": 500, "n": 128}, {"max_tokens": 6, "n": 3}),
        ({"max_completion_tokens": 2}, {"max_completion_tokens": 2}),
        ({"max_tokens": 9000, "n": 0}, {"max_tokens": 9000, "n": 0}),
        ({"max_tokens": "5", "n": True}, {"max_tokens": "5", "n": True}),
        ([1], [1]),
    ],
)
def test_what_is_to_be_refused_is_sent_as_it_is(body: Any, sent: Any) -> None:
    assert sendable(CHAT, body, positive=False, limits=LIMITS) == sent


def test_a_valid_body_is_made_to_agree() -> None:
    body = {"n": 7.0, "best_of": 100, "temperature": 0.5, "logit_bias": {"16385": 1, "3": 2}}
    assert sendable("/v1/completions", body, positive=True, limits=LIMITS) == {
        "n": 3,
        "best_of": 3,
        "temperature": 0.5,
        "logit_bias": {"1": 1, "3": 2},
        "max_tokens": 6,
    }


@pytest.mark.parametrize(
    ("path", "body", "sent"),
    [
        (RESPONSES, {}, {"max_output_tokens": 6}),
        (RESPONSES, {"max_output_tokens": 10**9}, {"max_output_tokens": 6}),
        (RESPONSES, {"max_output_tokens": 0}, {"max_output_tokens": 0}),
        (f"{RESPONSES}/input_tokens", {}, {}),
        (MESSAGES, {}, {}),
        (MESSAGES, {"max_tokens": 500}, {"max_tokens": 6}),
        (MESSAGES, {"max_tokens": 9000}, {"max_tokens": 9000}),
    ],
)
def test_other_apis_answers_are_short(path: str, body: Any, sent: Any) -> None:
    assert sendable(path, body, positive=False, limits=LIMITS) == sent


def test_other_apis_valid_bodies_are_made_to_agree() -> None:
    body = {"input": "a", "previous_response_id": "x", "tools": [{"name": "f"}], "tool_choice": {"name": "g"}}
    sent = sendable(RESPONSES, body, positive=True, limits=LIMITS)
    assert "previous_response_id" not in sent
    assert sent["tool_choice"] == {"type": "function", "name": "f"}
    body = {"input": "a", "previous_response_id": "resp_1"}
    assert sendable(RESPONSES, body, positive=True, limits=LIMITS) == {**body, "max_output_tokens": 6}
    body = {"messages": [], "tools": [{"name": "f"}], "tool_choice": {"type": "tool", "name": "g"}}
    assert sendable(MESSAGES, body, positive=True, limits=LIMITS)["tool_choice"] == {"type": "tool", "name": "f"}


@pytest.mark.parametrize(
    ("message", "passes"),
    [
        ("prompt is too long: 9000 tokens > 8191 maximum", True),
        ("messages: The model's chat template refuses these messages: no", True),
        ("Invalid schema for 'tools[3].input_schema': its type must be 'object'.", True),
        ("Invalid schema for 'output_config.format.schema': unknown.", True),
        ("Invalid schema for 'output_format.schema': unknown.", True),
        ("Tool choice 'f' not found in 'tools' parameter.", False),
        ("tool_choice: Tool choice 'f' not found in 'tools' parameter.", True),
        ("Invalid 'max_tokens': integer below minimum value. Expected a value >= 1, but got 0 instead.", False),
    ],
)
def test_only_unforeseeable_refusals_of_anthropics_api_pass(message: str, passes: bool) -> None:
    error = {"type": "error", "error": {"type": "invalid_request_error", "message": message}, "request_id": "msg_1"}
    assert unforeseeable(400, json.dumps(error).encode()) is passes


@pytest.mark.parametrize(
    ("param", "code", "passes"),
    [
        ("messages", "context_length_exceeded", True),
        ("response_format", "null", True),
        ("tools[3].function.parameters", "null", True),
        ("chat_template_kwargs.a", "unsupported_parameter", True),
        ("text.format.schema", "null", True),
        ("tools[0].parameters", "null", True),
        ("reasoning.effort", "unsupported_parameter", True),
        ("previous_response_id", "previous_response_not_found", True),
        ("input", "missing_required_parameter", False),
        ("messages", "invalid_value", False),
        ("tools[0].function.name", "invalid_value", False),
        ("n", "integer_below_min_value", False),
    ],
)
def test_only_unforeseeable_refusals_pass(param: str, code: str, passes: bool) -> None:
    content = f'{{"error": {{"message": "m", "type": "t", "param": "{param}", "code": "{code}"}}}}'.encode()
    assert unforeseeable(400, content) is passes
    assert not unforeseeable(422, content)
