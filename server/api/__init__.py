"""The endpoints, by API."""

from fastapi.routing import APIRoute

from server.api.anthropic.routes import router as messages_router
from server.api.openai.chat import router as chat_router
from server.api.openai.completions import router as completions_router
from server.api.own.page import router as page_router
from server.api.own.sessions import router as sessions_router
from server.api.own.status import open_router
from server.api.own.status import router as status_router
from server.api.own.tokens import router as tokens_router
from server.api.responses.routes import router as responses_router
from server.http.openapi import router as openapi_router

ROUTERS = (
    chat_router,
    completions_router,
    responses_router,
    messages_router,
    tokens_router,
    sessions_router,
    status_router,
    open_router,
    openapi_router,
    page_router,
)


def methods_at(path: str) -> list[str]:
    """The methods of a path, sorted."""
    routes = [route for router in ROUTERS for route in router.routes if isinstance(route, APIRoute)]
    return sorted({method for route in routes if route.path_regex.match(path) for method in route.methods or ()})
