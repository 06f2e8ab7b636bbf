"""The server's error tree: what a client may be told, as plain data without a web framework.

Every `ServerError` becomes OpenAI's envelope `{"error": {"message", "type", "param", "code"}}` with `status` as the
HTTP status. Foreign errors are translated where they enter and keep their cause (`raise X from error`).
"""

import math
from typing import Any, ClassVar, Literal, Self

Phase = Literal["arriving", "waiting", "prefill", "answer"]
"""How far a request is: its body arrives, it waits for the batch, its prompt is prefilled, it is answered."""


class StartupError(Exception):
    """The server cannot start. `str()` gives full sentences for a person at a terminal. No traceback is shown."""


class ServerError(Exception):
    """An error that is sent to the client.

    message: one or two sentences.
    param: the offending field in OpenAI's style, such as "messages[0].role".
    code: a stable word for programs.
    retry_after: seconds after which the same request may succeed.
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
        """Extra response headers. Retry-After is whole seconds, rounded up, at least 1."""
        if self.retry_after is None:
            return {}
        return {"Retry-After": str(max(1, math.ceil(self.retry_after)))}


class InvalidRequest(ServerError):
    """400: the request is wrong, and wrong again if it is sent unchanged."""

    status = 400
    type = "invalid_request_error"


class UnsupportedField(InvalidRequest):
    """400: a field or value of the API that this version does not support. It is never ignored in silence."""

    default_code = "unsupported_parameter"


class ContextLengthExceeded(InvalidRequest):
    """400: the prompt and the requested completion exceed the model's positions.

    All counts are tokens. `max_tokens` is None when the request has no limit. `param` is where the prompt stands. The
    words are OpenAI's: clients recognise them and shorten the conversation.
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
    """401: the API key is missing or unknown."""

    status = 401
    type = "invalid_request_error"
    default_code = "invalid_api_key"

    def headers(self) -> dict[str, str]:
        return {**super().headers(), "WWW-Authenticate": "Bearer"}


class OriginNotAllowed(ServerError):
    """403: a browser sends a request for a page whose origin is not in TURBOCACHE_CORS_ORIGINS."""

    status = 403
    type = "invalid_request_error"
    default_code = "origin_not_allowed"

    def __init__(self, origin: str) -> None:
        super().__init__(
            f"Pages of the origin {origin[:100]!r} may not use this server. If they should, add it to "
            "TURBOCACHE_CORS_ORIGINS."
        )


class NotFound(ServerError):
    """404: the address or the model (code "model_not_found") does not exist."""

    status = 404
    type = "invalid_request_error"


class SessionNotFound(NotFound):
    """404: the session does not exist, or it belongs to another API key."""

    def __init__(self, id: str) -> None:
        super().__init__(f"There is no session '{id}'.", param="session_id", code="session_not_found")


class MethodNotAllowed(ServerError):
    """405: the address does not have this HTTP method."""

    status = 405
    type = "invalid_request_error"
    default_code = "method_not_allowed"


class Conflict(ServerError):
    """409: the state of a session does not allow the change."""

    status = 409
    type = "invalid_request_error"
    default_code = "conflict"


class PayloadTooLarge(ServerError):
    """413: the body is larger than TURBOCACHE_BODY_LIMIT bytes."""

    status = 413
    type = "invalid_request_error"
    default_code = "request_too_large"


class QueueFull(ServerError):
    """429: TURBOCACHE_QUEUE_LIMIT requests wait already. Always has Retry-After."""

    status = 429
    type = "requests"
    default_code = "rate_limit_exceeded"

    def __init__(
        self, message: str = "The server's queue is full. Please try again later.", *, retry_after: float = 1.0
    ) -> None:
        super().__init__(message, retry_after=retry_after)


class OutOfMemory(ServerError):
    """503: the request does not fit the cache's memory budget now. Always has Retry-After."""

    status = 503
    default_code = "out_of_memory"

    def __init__(
        self,
        message: str = "The request does not fit the cache's memory budget right now. Please try again later.",
        *,
        retry_after: float = 5.0,
    ) -> None:
        super().__init__(message, retry_after=retry_after)


class SessionNotSaved(ServerError):
    """503: a session could not be written to disk or read back. Nothing is lost."""

    status = 503
    default_code = "session_not_saved"


class DeadlineExceeded(ServerError):
    """504: TURBOCACHE_DEADLINE seconds have passed since the request arrived. `phase`: how far it was.

    gRPC's DEADLINE_EXCEEDED is 504 over HTTP. 408 would blame the client, and browsers repeat such a request by
    themselves. 503 would mean that the server is overloaded. SDKs repeat a request after a 504. That helps while the
    request waits or is prefilled, because the next attempt continues from the cached part. An answer starts anew each
    time, so `X-Should-Retry: false` tells SDKs not to repeat it.
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
    """503: the engine's thread is dead or stuck. The server must be restarted."""

    status = 503
    default_code = "engine_dead"


class InternalError(ServerError):
    """500: a fault of the server. The message names the request, never the internal cause."""

    status = 500
    default_code = "internal_error"

    text: ClassVar[str] = "The server had an error while processing your request."

    @classmethod
    def of(cls, request_id: str) -> Self:
        return cls(f"{cls.text} The request id is {request_id}.")


class GrammarFailed(InternalError):
    """500: the grammar could no longer hold the answer to its schema or calls."""

    default_code = "grammar_failed"
    text = (
        "The answer ends here: its schema has become too complex to hold the answer to it. Simplify the schema, for "
        "example its patterns or its nested unions."
    )


class KernelFault(InternalError):
    """500: a step failed, or its result is not a number. None of its results was sent."""

    default_code = "kernel_fault"
    text = (
        "The computation of this answer failed, so it ends here instead of going on wrong. The server's log has the "
        "details."
    )
