"""The JSON bodies of errors: OpenAI's envelope, and Anthropic's with its own words on the addresses of its API."""

from typing import Any, Literal

from pydantic import BaseModel

from server.errors import ContextLengthExceeded, ServerError

MESSAGES_PATH = "/v1/messages"

_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    """The field that is wrong."""
    code: str | None
    """A stable word for programs."""


class ErrorEnvelope(BaseModel):
    """Every error, in OpenAI's shape."""

    error: ErrorDetail


class AnthropicErrorDetail(BaseModel):
    type: str
    message: str


class AnthropicErrorEnvelope(BaseModel):
    """Every error on the addresses of Anthropic's API, in its shape."""

    type: Literal["error"]
    error: AnthropicErrorDetail
    request_id: str | None


def is_anthropic_path(path: str) -> bool:
    """Whether a path belongs to Anthropic's API."""
    return path == MESSAGES_PATH or path.startswith(f"{MESSAGES_PATH}/")


def anthropic_envelope(error: ServerError, status: int, request_id: str | None) -> dict[str, Any]:
    """An AnthropicErrorEnvelope as JSON, for an error with this HTTP status."""
    kind = _ANTHROPIC_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": _message(error)}, "request_id": request_id}


def _message(error: ServerError) -> str:
    """The message names the wrong field, because this envelope has no `param`.

    A context that is too long is described in Anthropic's words. Claude Code looks for them: then it asks for fewer
    tokens or shortens the conversation.
    """
    if not isinstance(error, ContextLengthExceeded):
        named = error.param is None or error.param in error.message
        return error.message if named else f"{error.param}: {error.message}"
    limit, prompt, wanted = error.limit, error.prompt_tokens, error.max_tokens
    if wanted is None or prompt >= limit:  # one token of an answer must fit
        return f"prompt is too long: {prompt} tokens > {limit - 1} maximum"
    return (
        f"input length and `max_tokens` exceed context limit: {prompt} + {wanted} > {limit}, decrease input length or "
        "`max_tokens` and try again"
    )
