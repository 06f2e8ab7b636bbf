"""server.http.envelopes: types by status, and the words that Claude Code acts on."""

import re

import pytest

from server import errors
from server.http.envelopes import anthropic_envelope, is_anthropic_path


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (errors.InvalidRequest("m"), "invalid_request_error"),
        (errors.Unauthorized("m"), "authentication_error"),
        (errors.NotFound("m"), "not_found_error"),
        (errors.MethodNotAllowed("m"), "invalid_request_error"),
        (errors.PayloadTooLarge("m"), "request_too_large"),
        (errors.QueueFull("m"), "rate_limit_error"),
        (errors.InternalError("m"), "api_error"),
        (errors.OutOfMemory("m"), "overloaded_error"),
        (errors.EngineDead("m"), "overloaded_error"),
    ],
)
def test_types(error: errors.ServerError, kind: str) -> None:
    body = {"type": "error", "error": {"type": kind, "message": "m"}, "request_id": "r"}
    assert anthropic_envelope(error, error.status, "r") == body


@pytest.mark.parametrize(
    ("message", "param", "said"),
    [
        ("Invalid value.", "messages[0].role", "messages[0].role: Invalid value."),
        ("Invalid 'system': too long.", "system", "Invalid 'system': too long."),
        ("No JSON.", None, "No JSON."),
    ],
)
def test_the_message_names_the_field(message: str, param: str | None, said: str) -> None:
    error = errors.InvalidRequest(message, param=param)
    assert anthropic_envelope(error, 400, None)["error"]["message"] == said


@pytest.mark.parametrize(
    ("status", "kind"),
    [(403, "permission_error"), (504, "timeout_error"), (418, "invalid_request_error"), (529, "overloaded_error")],
)
def test_other_statuses(status: int, kind: str) -> None:
    assert anthropic_envelope(errors.ServerError("m"), status, None)["error"]["type"] == kind


@pytest.mark.parametrize(
    ("path", "ours"),
    [
        ("/v1/messages", True),
        ("/v1/messages/count_tokens", True),
        ("/v1/messages/batches", True),
        ("/v1/messagesx", False),
        ("/v1/models", False),
    ],
)
def test_addresses(path: str, ours: bool) -> None:
    assert is_anthropic_path(path) is ours


@pytest.mark.parametrize(("prompt", "wanted"), [(4012, 256), (99, 1)])
def test_too_much_is_asked_for(prompt: int, wanted: int) -> None:
    error = errors.ContextLengthExceeded(limit=4097, prompt_tokens=prompt, max_tokens=wanted)
    message = anthropic_envelope(error, 400, None)["error"]["message"]
    # As Claude Code looks for it, to ask for fewer tokens.
    found = re.search(r"input length and `max_tokens` exceed context limit: (\d+) \+ (\d+) > (\d+)", message)
    assert found is not None
    assert found.groups() == (str(prompt), str(wanted), "4097")


@pytest.mark.parametrize(("prompt", "wanted"), [(4097, 256), (5000, 1), (4097, None)])
def test_a_prompt_that_leaves_no_room(prompt: int, wanted: int | None) -> None:
    error = errors.ContextLengthExceeded(limit=4097, prompt_tokens=prompt, max_tokens=wanted)
    message = anthropic_envelope(error, 400, None)["error"]["message"]
    assert message == f"prompt is too long: {prompt} tokens > 4096 maximum"
