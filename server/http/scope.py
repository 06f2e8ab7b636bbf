"""What surrounds every request: its id, its one log line, its metrics, its API key, and the last net for exceptions."""

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
from server.http.record import RequestRecord
from server.metrics import Metrics
from server.protocol import Engine
from server.settings import Settings

logger = logging.getLogger("server.requests")

CHAT_PATH = "/v1/chat/completions"
COMPLETIONS_PATH = "/v1/completions"
RESPONSES_PATH = "/v1/responses"
_ID_PREFIXES = {CHAT_PATH: "chatcmpl-", COMPLETIONS_PATH: "cmpl-", RESPONSES_PATH: "resp_", MESSAGES_PATH: "msg_"}
"""Where a request's id is the id of its answer."""
_QUIET_PATHS = frozenset({"/health", "/metrics", "/", "/page/{name}", "/v1/sessions", "/v1/status"})
"""Asked for again and again by those who watch: templates, of which the sessions' takes nothing but GET."""


@dataclass(frozen=True, slots=True)
class AppContext:
    """What the routes need; put on `app.state.context` when the engine runs."""

    engine: Engine
    settings: Settings
    metrics: Metrics


def context_of(request: Request) -> AppContext:
    return cast(AppContext, request.app.state.context)


def record_of(request: Request) -> RequestRecord:
    return cast(RequestRecord, request.state.record)


async def require_key(request: Request) -> None:
    """Raises Unauthorized unless the request carries one of TURBOCACHE_API_KEYS, or none are set. Notes whose it is."""
    keys = context_of(request).settings.api_keys
    if not keys:
        return
    all_presented = _presented_keys(request)
    if not all_presented:
        raise Unauthorized(
            "You didn't provide an API key. You need to provide your API key in an Authorization header using Bearer "
            "auth (i.e. Authorization: Bearer YOUR_KEY) or in an x-api-key header."
        )
    for presented in all_presented:
        # All keys are compared, each in constant time, so the time taken tells nothing about them.
        if sum(hmac.compare_digest(presented, key.encode()) for key in keys):
            record_of(request).owner = hashlib.sha256(b"turbocache owner " + presented).hexdigest()[:32]
            return
    raise Unauthorized("Incorrect API key provided.")


def _presented_keys(request: Request) -> list[bytes]:
    """As a bearer, and as Anthropic's clients send it; some send both, of which one may be for somebody else."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    keys = (token if scheme.lower() == "bearer" else "", request.headers.get("x-api-key", ""))
    return [key.strip().encode("latin-1") for key in keys if key.strip()]


class RequestScope:
    """ASGI middleware: gives each request a `RequestRecord`, the x-request-id header, a log line and a count, and has
    it watched among the open ones.

    An exception that nothing else handled is logged and answered with 500, or ends the response if it has begun.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, requests: OpenRequests) -> None:
        self._app = app
        self._metrics = metrics
        self._requests = requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = RequestRecord(f"{_ID_PREFIXES.get(scope['path'], 'req-')}{uuid.uuid4().hex}")
        scope.setdefault("state", {})["record"] = record

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                headers = [*message.get("headers", []), (b"x-request-id", record.request_id.encode())]
                if is_anthropic_path(scope["path"]):
                    headers.append((b"request-id", record.request_id.encode()))
                if record.session_name is not None:
                    headers.append((b"x-session-id", record.session_name.encode()))
                if record.rotated:
                    headers.append((b"x-turbocache-overflow", b"rotate"))
                message = {**message, "headers": headers}
            await send(message)

        async def refuse(error: ServerError) -> None:
            if record.status is None:
                await error_response(error, scope)(scope, receive, send_with_id)

        try:
            check_origin(scope, scope["app"].state.context.settings.cors_origins)
            async with self._requests.watched(record.turns):
                await self._app(scope, receive, send_with_id)
        except ServerError as error:
            record.error = error.code or error.type
            await refuse(error)
        except asyncio.CancelledError:
            # uvicorn's own patience at a stop has an end.
            record.error = ShuttingDown.default_code
            await refuse(ShuttingDown())
        except Exception as error:
            logger.exception("%s ended with an unexpected error", record.request_id)
            record.error = type(error).__name__
            await refuse(InternalError.of(record.request_id))
        finally:
            # The template, not the address: addresses are text from users.
            path = getattr(scope.get("route"), "path", "unmatched")
            self._metrics.http_requests.labels(path=path, status=str(record.status or 0)).inc()
            level = logging.DEBUG if path in _QUIET_PATHS else logging.INFO
            logger.log(level, record.line(scope["method"], path))
