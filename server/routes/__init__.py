"""The addresses the server answers."""

from server.routes.chat import router as chat_router
from server.routes.completions import router as completions_router
from server.routes.sessions import router as sessions_router
from server.routes.status import open_router
from server.routes.status import router as status_router
from server.routes.tokens import router as tokens_router

ROUTERS = (chat_router, completions_router, tokens_router, sessions_router, status_router, open_router)
