"""The addresses the server answers."""

from fastapi.routing import APIRoute

from server.routes.chat import router as chat_router
from server.routes.completions import router as completions_router
from server.routes.messages import router as messages_router
from server.routes.openapi import openapi_router
from server.routes.page import router as page_router
from server.routes.responses import router as responses_router
from server.routes.sessions import router as sessions_router
from server.routes.status import open_router
from server.routes.status import router as status_router
from server.routes.tokens import router as tokens_router

_ROUTERS = (
    chat_router,
    completions_router,
    responses_router,
    messages_router,
    tokens_router,
    sessions_router,
    status_router,
    open_router,
)
ROUTERS = (*_ROUTERS, openapi_router(_ROUTERS), page_router)


def methods_at(path: str) -> list[str]:
    """What an address may be asked for with, in order."""
    routes = [route for router in ROUTERS for route in router.routes if isinstance(route, APIRoute)]
    return sorted({method for route in routes if route.path_regex.match(path) for method in route.methods or ()})
