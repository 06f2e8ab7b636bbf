"""One chat turn between the event loop and the engine's thread. Whatever happens, it has exactly one outcome."""

import asyncio
import contextlib
import logging
from collections.abc import Coroutine
from typing import Any, Literal, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from server.errors import EngineDead, InternalError, Phase, ServerError
from server.metrics import Metrics
from server.protocol import Engine, Event, Failed, Finished, GenerationRequest, PrefillProgress, TextDelta
from server.routes.scope import RequestRecord
from server.sse import IDLE_SECONDS, next_within

T = TypeVar("T")
Outcome = Literal["stop", "length", "cancelled", "error"]

logger = logging.getLogger(__name__)


class Turn:
    """Submits one request and receives its events into `queue`.

    Lives on the event loop's thread; only `deliver` may be called from another. The first of these settles the outcome:
    the engine's terminal event, `close` (the client is gone: cancelled), or `end` (an engine found dead, a deadline, a
    stop of the server: error). Events that come after it are dropped.
    """

    def __init__(self, engine: Engine, metrics: Metrics, request: GenerationRequest, record: RequestRecord) -> None:
        self.queue: asyncio.Queue[Event] = asyncio.Queue()
        self.outcome: Outcome | None = None
        self.phase: Phase = "waiting"
        self._engine = engine
        self._metrics = metrics
        self._request = request
        self._record = record
        self._loop = asyncio.get_running_loop()
        self._stirred = asyncio.Event()
        self._ended_by_engine = False

    @property
    def wants_logprobs(self) -> bool:
        return self._request.logprobs is not None

    def submit(self) -> None:
        """Raises what Engine.submit raises; then the turn was never accepted and has no outcome."""
        self._engine.submit(self._request, self.deliver)
        self._record.turns.append(self)

    @property
    def over(self) -> bool:
        return self.outcome is not None

    def end(self, error: ServerError) -> None:
        """Fails the turn before the engine does, and cancels the engine's work; idempotent."""
        if self.outcome is None:
            self._settle("error")
            self._engine.cancel(self._request.request_id)
            self._pass_on(Failed(error))

    def deliver(self, event: Event) -> None:
        """The engine's door, called from its thread."""
        # The loop is closed when the server was stopped by force; then nobody is left to tell.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._receive, event)

    def close(self) -> None:
        """The client is gone or the response is over. Cancels the engine's work if it is not done; idempotent."""
        if self.outcome is None:
            self._settle("cancelled")
            self._engine.cancel(self._request.request_id)

    async def check_alive(self) -> None:
        """Fails the turn with EngineDead when the engine can't answer any more."""
        if self.outcome is not None or (health := self._engine.health()).alive:
            return
        # A terminal event sent just before the thread ended is already in the loop's queue: let it come first.
        await asyncio.sleep(0)
        self.end(EngineDead(f"The engine stopped working: {health.detail}"))

    async def wait_first(self, seconds: float) -> None:
        """Returns at the first event, or after `seconds`. Raises the error of a turn that failed before any text."""
        deadline = self._loop.time() + seconds
        while not self._stirred.is_set() and (left := deadline - self._loop.time()) > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(IDLE_SECONDS, left)):
                    await self._stirred.wait()
            await self.check_alive()
        if self.outcome == "error" and self._record.first_text_seconds is None:
            while not isinstance(event := self.queue.get_nowait(), Failed):
                pass
            raise self.public_error(event)

    async def next_event(self) -> Event:
        """The next event, however long it takes. The last one is terminal."""
        while (event := await next_within(self.queue, IDLE_SECONDS)) is None:
            await self.check_alive()
        return event

    def public_error(self, failed: Failed) -> ServerError:
        """What the client is told. An error that isn't one of ours is logged, and the client gets a plain 500."""
        error = failed.error
        if not isinstance(error, ServerError):
            logger.error("%s failed", self._request.request_id, exc_info=error)
            error = InternalError.of(self._request.request_id)
            error.__cause__ = failed.error
        self._record.error = error.code or error.type
        return error

    def _receive(self, event: Event) -> None:
        terminal = isinstance(event, Finished | Failed)
        if self.outcome is not None:
            if terminal and self._ended_by_engine:
                logger.error("%s got a second terminal event", self._request.request_id)
            return
        if isinstance(event, PrefillProgress | TextDelta):
            self.phase = "prefill" if isinstance(event, PrefillProgress) else "answer"
        if isinstance(event, TextDelta) and self._record.first_text_seconds is None:
            self._record.first_text_seconds = self._record.elapsed()
            self._metrics.time_to_first_token.observe(self._record.first_text_seconds)
        if isinstance(event, Finished):
            self._record.usage = event.usage
            self._settle(event.finish_reason)
        elif isinstance(event, Failed):
            self._settle("error")
        self._ended_by_engine = terminal
        self._pass_on(event)

    def _pass_on(self, event: Event) -> None:
        self.queue.put_nowait(event)
        self._stirred.set()

    def _settle(self, outcome: Outcome) -> None:
        self.outcome = outcome
        self._record.finish = outcome
        self._metrics.requests_finished.labels(reason=outcome).inc()
        self._metrics.request_duration.observe(self._record.elapsed())


async def until_gone(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """The result of `work`, which is cancelled when the client leaves first; then raises ClientDisconnect."""
    doing = asyncio.create_task(work)
    leaving = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({doing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return doing.result()
        raise ClientDisconnect
    finally:
        doing.cancel()
        leaving.cancel()
        await asyncio.gather(doing, leaving, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
