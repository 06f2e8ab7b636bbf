"""The addresses the server answers."""

from server.routes.chat import router as chat_router
from server.routes.messages import router as messages_router
from server.routes.responses import router as responses_router
from server.routes.sessions import router as sessions_router
from server.routes.status import open_router
from server.routes.status import router as status_router

ROUTERS = (chat_router, responses_router, messages_router, sessions_router, status_router, open_router)
