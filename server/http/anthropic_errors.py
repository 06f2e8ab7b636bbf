"""Errors in Anthropic's envelope and words, for the addresses of its API."""

from typing import Any

from server.errors import ContextLengthExceeded, ServerError

MESSAGES_PATH = "/v1/messages"

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}


def is_anthropics(path: str) -> bool:
    """Whether an address is one of Anthropic's API."""
    return path == MESSAGES_PATH or path.startswith(f"{MESSAGES_PATH}/")


def envelope(error: ServerError, status: int, request_id: str | None) -> dict[str, Any]:
    """The JSON body of an error with this HTTP status."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": _message(error)}, "request_id": request_id}


def _message(error: ServerError) -> str:
    """Names the field, for which this envelope has no place of its own. Of a context that is too long it speaks in
    Anthropic's words: by these Claude Code knows that it has to ask for fewer tokens, or to shorten the conversation.
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
