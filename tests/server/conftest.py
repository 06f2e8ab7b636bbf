"""Fixtures: a clean environment, and the app under a real uvicorn server on a loopback port."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import httpx
import pytest
import uvicorn
from openai import OpenAI

from server.app import EngineFactory, create_app
from server.settings import Settings
from tests.server.scripted_engine import ScriptedEngine, eventually
from turbocache.models import BUNDLED


@dataclass(frozen=True)
class Served:
    """A running server, its engine, and clients for it."""

    engine: ScriptedEngine
    port: int
    http: httpx.Client
    stack: ExitStack

    @cached_property
    def openai(self) -> OpenAI:
        """Made when asked for: reading the certificates takes longer than most tests."""
        client = OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0, timeout=10.0)
        return self.stack.enter_context(client)

    def metric(self, sample: str) -> float:
        """The value of one sample of /metrics; 0 when it isn't there."""
        lines = self.http.get("/metrics").text.splitlines()
        return next((float(line.rsplit(" ", 1)[1]) for line in lines if line.rsplit(" ", 1)[0] == sample), 0.0)

    def outcomes(self) -> dict[str, float]:
        """How many accepted requests ended how."""
        name = 'turbocache_requests_finished_total{reason="%s"}'
        counts = {
            reason: self.metric(name % reason) for reason in ("stop", "length", "tool_calls", "cancelled", "error")
        }
        return {reason: count for reason, count in counts.items() if count}


Serve = Callable[..., Served]

START_SECONDS = 60.0
CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"model": "default", "messages": [{"role": "user", "content": "hi there"}]}
STREAM = {**BODY, "stream": True}


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error in an answer, which holds nothing else."""
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    return error


def events_of(text: str) -> list[str]:
    """The data lines of a stream; comments are left out."""
    return [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]


def make_settings(**values: Any) -> Settings:
    """Settings from these values and the defaults only, with the bundled model."""
    build: Callable[..., Settings] = Settings
    return build(_env_file=None, **{"model": str(BUNDLED), **values})


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.upper().startswith("TURBOCACHE_") and name != "TURBOCACHE_BLAS":
            monkeypatch.delenv(name)


@contextmanager
def running(factory: EngineFactory, settings: Settings) -> Iterator[int]:
    """The port of a uvicorn server that runs the app with the engine that `factory` makes."""
    app = create_app(factory, settings)
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, lifespan="on", timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, name="uvicorn")
    thread.start()
    try:
        assert eventually(lambda: server.started or not thread.is_alive(), START_SECONDS)
        assert server.started, "the server did not start"
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(10.0)
        assert not thread.is_alive()


@pytest.fixture
def serve() -> Iterator[Serve]:
    """serve(engine, **settings) starts a server that lives until the test ends."""
    with ExitStack() as stack:

        def start(engine: ScriptedEngine, **values: Any) -> Served:
            port = stack.enter_context(running(lambda *_: engine, make_settings(**values)))
            http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10.0, verify=False)
            return Served(engine, port, stack.enter_context(http), stack)

        yield start
