"""The application: `uvicorn server.app:app`. Importing this module loads no model and no MLX."""

try:
    import turbocache  # isort: skip  # first: it loads the fast BLAS, which must come before MLX
except ValueError as error:  # a bad TURBOCACHE_BLAS: show only the message
    raise SystemExit(str(error)) from None

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, closing
from typing import Any, Protocol

from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api import ROUTERS, methods_at
from server.api.responses.store import open_store
from server.errors import StartupError
from server.http import error_handlers
from server.http.cors import CrossOrigin
from server.http.middleware import AppContext, RequestMiddleware
from server.http.open_requests import OpenRequests
from server.logs import configure_logging
from server.metrics import Metrics
from server.process.exposure import warn_when_exposed
from server.process.loop_lag import watch_loop
from server.process.stopping import Stopping
from server.protocol import Engine
from server.settings import Settings, load_settings
from turbocache.machine.launched import launched_rank

logger = logging.getLogger(__name__)

__all__ = ["RunnableEngine", "app", "create_app", "turbocache"]


class RunnableEngine(Engine, Protocol):
    """An engine whose thread the application starts and stops."""

    def start(self) -> None:
        """Start the thread. Returns when requests may be submitted. Raises StartupError."""
        ...

    def when_asked_to_stop(self, ask: Callable[[], None]) -> None:
        """Set what the engine calls, from any thread, when something other than a signal asks for a stop."""
        ...

    def stop(self) -> None:
        """End the thread and wait for it. Running requests get a terminal event."""
        ...


EngineFactory = Callable[[Settings, Metrics], RunnableEngine]


def create_app(engine_factory: EngineFactory | None = None, settings: Settings | None = None) -> FastAPI:
    """The app. Without arguments it reads the settings and builds the real engine when the server starts.

    A StartupError of the settings, the factory or the engine ends the start with its message and no traceback.
    """
    metrics = Metrics()
    requests = OpenRequests(metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        chosen = settings if settings is not None else load_settings()
        configure_logging(chosen.log_level, chosen.log_format)
        metrics.exemplars = chosen.metrics_exemplars
        engine = (engine_factory or _build_engine)(chosen, metrics)
        with closing(open_store(chosen.session_dir)) as responses:
            engine.start()
            app.state.context = AppContext(engine, chosen, metrics)
            app.state.responses = responses
            requests.deadline = chosen.deadline
            try:
                async with _background(watch_loop(metrics), warn_when_exposed(chosen)):
                    stopping = Stopping(requests, chosen.stop_grace, engine.stop)
                    engine.when_asked_to_stop(stopping.ask)
                    with stopping.listening():
                        yield
            finally:
                # In a thread: writing sessions takes time, and clients still receive their final events.
                await asyncio.to_thread(engine.stop)

    @asynccontextmanager
    async def explained(app: FastAPI) -> AsyncIterator[None]:
        try:
            async with lifespan(app):
                yield
        except StartupError as error:
            app.state.startup_error = str(error)
            raise

    # server.http.openapi serves the document, for the loaded model. Documentation pages would load scripts from
    # elsewhere.
    app = FastAPI(title="turbocache", lifespan=explained, openapi_url=None)
    app.state.startup_error = None
    app.add_middleware(RequestMiddleware, metrics=metrics, requests=requests)
    app.add_middleware(CrossOrigin, state=app.state)
    app.add_middleware(_PlainStartupErrors, state=app.state)
    app.state.methods_at = methods_at
    error_handlers.install(app)
    for router in ROUTERS:
        app.include_router(router)
    return app


def _build_engine(settings: Settings, metrics: Metrics) -> RunnableEngine:
    if (rank := launched_rank()) > 0:
        raise StartupError(
            f"This process is rank {rank} of a group, and only rank 0 serves HTTP. Start groups with "
            "`turbocache serve`, which starts every rank."
        )
    # Not at the top: it loads MLX.
    from server.engine import build_engine

    return build_engine(settings, metrics)


@asynccontextmanager
async def _background(*work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run coroutines during a block and cancel them after it. A failure is logged and does not end the block."""

    async def logged(one: Coroutine[Any, Any, None]) -> None:
        try:
            await one
        except Exception:
            logger.exception("a background task has failed")

    tasks = [asyncio.create_task(logged(one)) for one in work]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _PlainStartupErrors:
    """ASGI middleware: the web server prints a StartupError's message instead of a traceback."""

    def __init__(self, app: ASGIApp, state: object) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_plainly(message: Message) -> None:
            sentences = getattr(self._state, "startup_error", None)
            if message["type"] == "lifespan.startup.failed" and sentences is not None:
                message = {**message, "message": sentences}
            await send(message)

        await self._app(scope, receive, send_plainly if scope["type"] == "lifespan" else send)


app = create_app()
