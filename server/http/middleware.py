"""What every request gets: an id, a log line, metrics, the check of its API key, and an answer to any exception."""

import asyncio
import hashlib
import hmac
import logging
import uuid
from dataclasses import dataclass
from typing import cast

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import InternalError, ServerError, ShuttingDown, Unauthorized
from server.http.cors import check_origin
from server.http.envelopes import MESSAGES_PATH, is_anthropic_path
from server.http.error_handlers import error_response
from server.http.open_requests import OpenRequests
from server.http.request_context import RequestContext
from server.metrics import Metrics
from server.protocol import Engine
from server.settings import Settings

logger = logging.getLogger("server.requests")

CHAT_PATH = "/v1/chat/completions"
COMPLETIONS_PATH = "/v1/completions"
RESPONSES_PATH = "/v1/responses"
_ID_PREFIXES = {CHAT_PATH: "chatcmpl-", COMPLETIONS_PATH: "cmpl-", RESPONSES_PATH: "resp_", MESSAGES_PATH: "msg_"}
"""Paths where the request's id is also the id of the answer."""
_QUIET_PATHS = frozenset({"/health", "/metrics", "/", "/page/{name}", "/v1/sessions", "/v1/status"})
"""Route templates that monitors poll. Their lines are logged at DEBUG."""


@dataclass(frozen=True, slots=True)
class AppContext:
    """What the endpoints need. It is on `app.state.context` once the engine runs."""

    engine: Engine
    settings: Settings
    metrics: Metrics


def app_context(request: Request) -> AppContext:
    return cast(AppContext, request.app.state.context)


def request_context(request: Request) -> RequestContext:
    return cast(RequestContext, request.state.context)


async def require_key(request: Request) -> None:
    """Raises Unauthorized unless the request has one of TURBOCACHE_API_KEYS, or none are set. Sets the owner."""
    keys = app_context(request).settings.api_keys
    if not keys:
        return
    all_presented = _presented_keys(request)
    if not all_presented:
        raise Unauthorized(
            "You didn't provide an API key. You need to provide your API key in an Authorization header using Bearer "
            "auth (i.e. Authorization: Bearer YOUR_KEY) or in an x-api-key header."
        )
    for presented in all_presented:
        # Compare with all keys, each in constant time: the time must tell nothing about them.
        if sum(hmac.compare_digest(presented, key.encode()) for key in keys):
            request_context(request).owner = hashlib.sha256(b"turbocache owner " + presented).hexdigest()[:32]
            return
    raise Unauthorized("Incorrect API key provided.")


def _presented_keys(request: Request) -> list[bytes]:
    """The bearer token and x-api-key. Some of Anthropic's clients send both, one of them for another server."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    keys = (token if scheme.lower() == "bearer" else "", request.headers.get("x-api-key", ""))
    return [key.strip().encode("latin-1") for key in keys if key.strip()]


class RequestMiddleware:
    """ASGI middleware: gives each request a `RequestContext`, an x-request-id header, a log line and a count, and
    tracks it among the open requests.

    It logs an exception that nothing else handled and answers 500. A response that has begun ends instead.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, requests: OpenRequests) -> None:
        self._app = app
        self._metrics = metrics
        self._requests = requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        context = RequestContext(f"{_ID_PREFIXES.get(scope['path'], 'req-')}{uuid.uuid4().hex}")
        scope.setdefault("state", {})["context"] = context

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                context.status = message["status"]
                headers = [*message.get("headers", []), (b"x-request-id", context.request_id.encode())]
                if is_anthropic_path(scope["path"]):
                    headers.append((b"request-id", context.request_id.encode()))
                if context.session_name is not None:
                    headers.append((b"x-session-id", context.session_name.encode()))
                if context.dropped_tokens:
                    headers.append((b"x-turbocache-overflow", b"rotate"))
                    headers.append((b"x-turbocache-dropped-tokens", b"%d" % context.dropped_tokens))
                    headers.append((b"x-turbocache-dropped-turns", b"%d" % context.dropped_turns))
                message = {**message, "headers": headers}
            await send(message)

        async def refuse(error: ServerError) -> None:
            if context.status is None:
                await error_response(error, scope)(scope, receive, send_with_id)

        try:
            check_origin(scope, scope["app"].state.context.settings.cors_origins)
            async with self._requests.track(context.generations):
                await self._app(scope, receive, send_with_id)
        except ServerError as error:
            context.error = error.code or error.type
            await refuse(error)
        except asyncio.CancelledError:
            # At a stop uvicorn cancels what takes too long.
            context.error = ShuttingDown.default_code
            await refuse(ShuttingDown())
        except Exception as error:
            logger.exception("%s ended with an unexpected error", context.request_id)
            context.error = type(error).__name__
            await refuse(InternalError.of(context.request_id))
        finally:
            # The route's template: an address itself is text from users.
            path = getattr(scope.get("route"), "path", "unmatched")
            self._metrics.http_requests.labels(path=path, status=str(context.status or 0)).inc()
            level = logging.DEBUG if path in _QUIET_PATHS else logging.INFO
            logger.log(level, context.line(scope["method"], path))
