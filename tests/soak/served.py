"""The real HTTP server over an engine of this process, so that both ends can be looked at."""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import uvicorn

from server.app import create_app
from server.engine.engine import MlxEngine
from server.metrics import Metrics
from server.settings import Settings

START_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Served:
    """Where a server listens, its engine, and what it has logged as an error."""

    url: str
    engine: MlxEngine
    metrics: Metrics
    errors: list[str]


@dataclass(slots=True)
class _Made:
    """Keeps the engine that the application makes when it starts."""

    engine: MlxEngine | None = None
    metrics: Metrics = field(default_factory=Metrics)

    def make(self, settings: Settings, metrics: Metrics) -> MlxEngine:
        self.engine, self.metrics = MlxEngine(settings, metrics), metrics
        return self.engine


class _Errors(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(f"{record.name}: {record.getMessage()}")


@contextmanager
def serving(settings: Settings) -> Iterator[Served]:
    """uvicorn in a thread, until the block ends. Raises AssertionError when it does not start or stop."""
    made, errors = _Made(), _Errors()
    config = uvicorn.Config(
        create_app(made.make, settings), host="127.0.0.1", port=0, log_config=None, lifespan="on", access_log=False
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, name="uvicorn")
    logging.getLogger().addHandler(errors)
    thread.start()
    try:
        deadline = time.monotonic() + START_SECONDS
        while not server.started and thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server.started, f"the server did not start: {errors.texts}"
        assert made.engine is not None
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Served(f"http://127.0.0.1:{port}", made.engine, made.metrics, errors.texts)
    finally:
        server.should_exit = True
        thread.join(START_SECONDS)
        logging.getLogger().removeHandler(errors)
        assert not thread.is_alive(), "the server does not stop"
