"""Cross-origin requests: what a browser may send to this server for a page of another origin."""

from collections.abc import Sequence
from typing import Any

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import OriginNotAllowed

EXPOSED = (
    "X-Session-ID",
    "X-Request-Id",
    "X-Turbocache-Overflow",
    "X-Turbocache-Dropped-Tokens",
    "X-Turbocache-Dropped-Turns",
    "Retry-After",
)
METHODS = ("GET", "POST", "DELETE")
_READING = ("GET", "HEAD", "OPTIONS")


def check_origin(scope: Scope, allowed: Sequence[str]) -> None:
    """Raises OriginNotAllowed when a page of another origin tries to change something.

    Any page can make a browser send a simple POST to any address, even to a server without keys on the user's own
    machine. CORS only hides the answer from the page. Clients other than browsers send no Origin.
    """
    headers = Headers(scope=scope)
    origin = headers.get("origin")
    if origin is None or scope["method"] in _READING or "*" in allowed or origin in allowed:
        return
    if origin.partition("://")[2] != headers.get("host"):  # without the scheme: a proxy may have ended TLS
        raise OriginNotAllowed(origin)


class CrossOrigin:
    """ASGI middleware: starlette's CORS for the origins in TURBOCACHE_CORS_ORIGINS. Without any it does nothing.

    The settings are read when the server starts, after the middleware is built. There are no credentials: API keys
    are in a header that the page sets, and there are no cookies. Preflights are answered here and need no key.
    """

    def __init__(self, app: ASGIApp, state: Any) -> None:
        self._plain = app
        self._state = state
        self._chosen: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._plain(scope, receive, send)
            return
        if self._chosen is None:
            self._chosen = self._choose(self._state.context.settings.cors_origins)
        await self._chosen(scope, receive, send)

    def _choose(self, origins: tuple[str, ...]) -> ASGIApp:
        if not origins:
            return self._plain
        return CORSMiddleware(
            self._plain,
            allow_origins=origins,
            allow_methods=METHODS,
            allow_headers=("*",),
            expose_headers=EXPOSED,
            # A listed page from the internet may reach a server at home.
            allow_private_network=True,
        )
