"""The one error tree of the server: what a client may be told, as plain data (no web framework here).

Every `ServerError` becomes OpenAI's envelope `{"error": {"message", "type", "param", "code"}}` with `status` as its
HTTP status. Foreign errors are translated where they enter and keep their cause (`raise X from error`).
"""

import math
from typing import Any, ClassVar, Literal

Phase = Literal["arriving", "waiting", "prefill", "answer"]
"""How far a request has come: its body is read, it waits for the batch, its prompt is read, it is answered."""


class StartupError(Exception):
    """The server cannot start. `str()` is complete sentences for a person at a terminal; no traceback is shown."""


class ServerError(Exception):
    """An error with an answer for the client.

    `message` is one or two sentences, `param` the offending field in OpenAI's style ("messages[0].role"), `code` a
    stable word for programs, `retry_after` the seconds (at least 1 when sent) after which the same request may be worth
    sending again.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    default_code: ClassVar[str | None] = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code if code is not None else self.default_code
        self.retry_after = retry_after

    def envelope(self) -> dict[str, Any]:
        """The JSON body, in OpenAI's shape."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Extra response headers. Retry-After is in whole seconds, rounded up, at least 1."""
        if self.retry_after is None:
            return {}
        return {"Retry-After": str(max(1, math.ceil(self.retry_after)))}


class InvalidRequest(ServerError):
    """400: the request itself is wrong; sending it again unchanged is useless."""

    status = 400
    type = "invalid_request_error"


class UnsupportedField(InvalidRequest):
    """400: a field (or value) of OpenAI's API that this version does not honour. Never ignored in silence."""

    default_code = "unsupported_parameter"


class ContextLengthExceeded(InvalidRequest):
    """400: prompt plus asked-for completion do not fit the model's own positions.

    `limit`, `prompt_tokens` and `max_tokens` count tokens; `max_tokens` is None when the request named no limit.
    `param` is where the prompt stands. The words are OpenAI's, because clients recognise them to shorten the
    conversation.
    """

    default_code = "context_length_exceeded"

    def __init__(self, *, limit: int, prompt_tokens: int, max_tokens: int | None, param: str = "messages") -> None:
        opening = f"This model's maximum context length is {limit} tokens. However, "
        if max_tokens is None:
            rest = f"your {param} resulted in {prompt_tokens} tokens. Please reduce the length of the {param}."
        else:
            rest = (
                f"you requested {prompt_tokens + max_tokens} tokens ({prompt_tokens} in the {param}, {max_tokens} in "
                f"the completion). Please reduce the length of the {param} or completion."
            )
        super().__init__(opening + rest, param=param)
        self.limit, self.prompt_tokens, self.max_tokens = limit, prompt_tokens, max_tokens


class Unauthorized(ServerError):
    """401: no API key, or not one of ours."""

    status = 401
    type = "invalid_request_error"
    default_code = "invalid_api_key"

    def headers(self) -> dict[str, str]:
        return {**super().headers(), "WWW-Authenticate": "Bearer"}


class OriginNotAllowed(ServerError):
    """403: a page in a browser, from an origin that is not in TURBOCACHE_CORS_ORIGINS, wants something done."""

    status = 403
    type = "invalid_request_error"
    default_code = "origin_not_allowed"

    def __init__(self, origin: str) -> None:
        super().__init__(
            f"Pages of the origin {origin[:100]!r} may not use this server. If they should, add it to "
            "TURBOCACHE_CORS_ORIGINS."
        )


class NotFound(ServerError):
    """404: no such address, or no such model (code "model_not_found")."""

    status = 404
    type = "invalid_request_error"


class SessionNotFound(NotFound):
    """404: there is no such session, or it is another API key's."""

    def __init__(self, id: str) -> None:
        super().__init__(f"There is no session '{id}'.", param="session_id", code="session_not_found")


class MethodNotAllowed(ServerError):
    """405: the address exists, the HTTP method does not."""

    status = 405
    type = "invalid_request_error"
    default_code = "method_not_allowed"


class Conflict(ServerError):
    """409: a session is not in a state for what is asked. `retry` in seconds if it soon may be."""

    status = 409
    type = "invalid_request_error"
    default_code = "conflict"

    def __init__(self, message: str, *, code: str, param: str | None = None, retry: float | None = None) -> None:
        super().__init__(message, param=param, code=code, retry_after=retry)


class PayloadTooLarge(ServerError):
    """413: the body is larger than TURBOCACHE_BODY_LIMIT bytes."""

    status = 413
    type = "invalid_request_error"
    default_code = "request_too_large"


class QueueFull(ServerError):
    """429: TURBOCACHE_QUEUE_LIMIT requests wait already. Always carries Retry-After (seconds)."""

    status = 429
    type = "requests"
    default_code = "rate_limit_exceeded"

    def __init__(
        self,
        message: str = "The server's queue is full. Please try again later.",
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float = 1.0,
    ) -> None:
        super().__init__(message, param=param, code=code, retry_after=retry_after)


class OutOfMemory(ServerError):
    """503: the request does not fit the cache's memory budget now. Always carries Retry-After (seconds)."""

    status = 503
    default_code = "out_of_memory"

    def __init__(
        self,
        message: str = "The request does not fit the cache's memory budget right now. Please try again later.",
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float = 5.0,
    ) -> None:
        super().__init__(message, param=param, code=code, retry_after=retry_after)


class SessionNotSaved(ServerError):
    """503: a session could not be written to disk or read back; nothing is lost."""

    status = 503
    default_code = "session_not_saved"


class DeadlineExceeded(ServerError):
    """504: TURBOCACHE_DEADLINE seconds have passed since the request arrived, which had come to `phase`.

    504 is what gRPC's DEADLINE_EXCEEDED is over HTTP. 408 would blame the client's sending and makes browsers repeat a
    request on an old connection by themselves; 503 says that the server is overloaded. SDKs send a 504 again, which is
    right while a request waits or its prompt is read: the next attempt goes on from what is cached by then. An answer
    is begun anew each time, so they are told not to.
    """

    status = 504
    default_code = "deadline_exceeded"

    def __init__(self, seconds: float, phase: Phase) -> None:
        was = {
            "arriving": "it had not arrived",
            "waiting": "it was waiting for its turn",
            "prefill": "its prompt was being read",
            "answer": "it was being answered",
        }
        super().__init__(f"The request has not ended within the server's limit of {seconds:g} seconds; {was[phase]}.")
        self._is_wasted = phase == "answer"

    def headers(self) -> dict[str, str]:
        return {**super().headers(), **({"X-Should-Retry": "false"} if self._is_wasted else {})}


class ShuttingDown(ServerError):
    """503: the server is being stopped."""

    status = 503
    default_code = "shutting_down"

    def __init__(self) -> None:
        super().__init__("The server is shutting down.", retry_after=5.0)


class EngineDead(ServerError):
    """503: the engine thread is dead or stuck; the server must be restarted."""

    status = 503
    default_code = "engine_dead"


class InternalError(ServerError):
    """500: a fault of the server. The message names the request, never what went wrong inside."""

    status = 500
    default_code = "internal_error"

    @classmethod
    def of(cls, request_id: str) -> "InternalError":
        return cls(f"The server had an error while processing your request. The request id is {request_id}.")


class GrammarFailed(InternalError):
    """500: an answer could not be held to its schema or its calls any further."""

    default_code = "grammar_failed"

    @classmethod
    def of(cls, request_id: str) -> "GrammarFailed":
        return cls(
            "The answer ends here: its schema has become too complex to hold the answer to it. Simplify the schema, "
            f"for example its patterns or its nested unions. The request id is {request_id}."
        )


class KernelFault(InternalError):
    """500: a step failed, or its result is not a number. Nothing that it computed was sent."""

    default_code = "kernel_fault"

    @classmethod
    def of(cls, request_id: str) -> "KernelFault":
        return cls(
            "The computation of this answer failed, so it ends here instead of going on wrong. The server's log has "
            f"the details. The request id is {request_id}."
        )
