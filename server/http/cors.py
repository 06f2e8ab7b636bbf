"""Cross-origin requests: what pages of other origins may ask, in a browser, of this server."""

from collections.abc import Sequence
from typing import Any

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import OriginNotAllowed

EXPOSED = ("X-Session-ID", "X-Request-Id", "X-Turbocache-Overflow", "Retry-After")
METHODS = ("GET", "POST", "DELETE")


_READING = ("GET", "HEAD", "OPTIONS")


def check_origin(scope: Scope, allowed: Sequence[str]) -> None:
    """Raises OriginNotAllowed for a request by which a page of another origin would have something done.

    Browsers send simple POSTs of any page to any address, also to a server on the user's own machine that asks for no
    key; what CORS keeps from the page is the answer alone. Clients that are no browser send no Origin.
    """
    headers = Headers(scope=scope)
    origin = headers.get("origin")
    if origin is None or scope["method"] in _READING or "*" in allowed or origin in allowed:
        return
    if origin.partition("://")[2] != headers.get("host"):  # a proxy may have taken the TLS off
        raise OriginNotAllowed(origin)


class CrossOrigin:
    """ASGI middleware: starlette's CORS for the origins in TURBOCACHE_CORS_ORIGINS, nothing without any.

    Settings are read when the server starts, which is after middleware is put together. No credentials: API keys travel
    in a header that pages must know, and cookies there are none. Preflights are answered here, so they need no key.
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
            # A page from the internet that is in the list may reach a server at home.
            allow_private_network=True,
        )
