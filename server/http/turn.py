"""One turn between the event loop and the engine's thread. Whatever happens, it has exactly one outcome."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Coroutine, Sequence
from typing import Any, Literal, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from server.errors import EngineDead, InternalError, Phase, ServerError
from server.http.record import RequestRecord
from server.http.sse import IDLE_SECONDS, Ended, next_within
from server.metrics import Metrics
from server.protocol import (
    Engine,
    Event,
    Failed,
    Finished,
    FinishReason,
    GenerationRequest,
    PrefillProgress,
    TextDelta,
    ToolCall,
    Usage,
)

T = TypeVar("T")
Outcome = FinishReason | Literal["cancelled", "error"]

logger = logging.getLogger(__name__)


class Turn:
    """Submits the requests of one HTTP request, an answer each, and receives their events into `queue`, at the end
    `Ended` or `Failed`.

    Lives on the event loop's thread; only `deliver` may be called from another. The first of these settles the outcome:
    the last answer's end, one that fails (the others are cancelled), `close` (the client is gone: cancelled), or `end`
    (an engine found dead, a deadline, a stop of the server: error). Events that come after it are dropped.
    """

    def __init__(
        self, engine: Engine, metrics: Metrics, requests: Sequence[GenerationRequest], record: RequestRecord
    ) -> None:
        self.queue: asyncio.Queue[Event | Ended] = asyncio.Queue()
        self.outcome: Outcome | None = None
        self.phase: Phase = "waiting"
        self._engine = engine
        self._metrics = metrics
        self._requests = requests
        self._open = {request.choice for request in requests}
        self._usages: dict[int, Usage] = {}
        self._record = record
        self._loop = asyncio.get_running_loop()
        self._stirred = asyncio.Event()
        self._ended: set[int] = set()
        self._since = time.monotonic()

    @property
    def n_answers(self) -> int:
        return len(self._requests)

    def submit(self) -> None:
        """Raises what Engine.submit raises; then the turn was never accepted and has no outcome."""
        self._engine.submit(self._requests, self.deliver)
        self._since = time.monotonic()
        self._record.turns.append(self)

    @property
    def over(self) -> bool:
        return self.outcome is not None

    def end(self, error: ServerError) -> None:
        """Fails the turn before the engine does, and cancels the engine's work; idempotent."""
        if self.outcome is None:
            self._settle("error")
            self._cancel()
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
            self._cancel()

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

    async def next_event(self) -> Event | Ended:
        """The next event, however long it takes. The last one is terminal."""
        while (event := await next_within(self.queue, IDLE_SECONDS)) is None:
            await self.check_alive()
        return event

    def public_error(self, failed: Failed) -> ServerError:
        """What the client is told. An error that isn't one of ours is logged, and the client gets a plain 500."""
        error = failed.error
        if not isinstance(error, ServerError):
            logger.error("%s failed", self._record.request_id, exc_info=error)
            error = InternalError.of(self._record.request_id)
            error.__cause__ = failed.error
        self._record.error = error.code or error.type
        return error

    def _receive(self, event: Event) -> None:
        terminal = isinstance(event, Finished | Failed)
        if self.outcome is not None or (terminal and event.choice not in self._open):
            if terminal and event.choice in self._ended:
                logger.error("%s got a second terminal event", self._record.request_id)
            return
        if terminal:
            self._open.discard(event.choice)
            self._ended.add(event.choice)
        if isinstance(event, PrefillProgress):
            self._read(event)
            if not event.processed:
                return
        elif isinstance(event, TextDelta | ToolCall):
            self.phase = "answer"
        if isinstance(event, TextDelta | ToolCall) and self._record.first_text_seconds is None:
            self._record.first_text_seconds = self._record.elapsed()
            self._metrics.time_to_first_token_seconds.observe(self._record.first_text_seconds, self._exemplar)
        if isinstance(event, Failed):
            self._settle("error")
            self._cancel()
        self._pass_on(event)
        if isinstance(event, Finished):
            self._usages[event.choice] = event.usage
            if not self._open:
                self._record.usage = usage = self._usage()
                self._metrics.request_prompt_tokens.observe(usage.prompt_tokens)
                self._metrics.request_generated_tokens.observe(usage.completion_tokens)
                self._settle(event.finish_reason)
                self._pass_on(Ended(self._record.usage))

    def _read(self, progress: PrefillProgress) -> None:
        """The request has started, or its prompt is through. Several prompts count as one from the first one's start to
        the first one's end.
        """
        times = self._record.times
        if self.phase == "waiting":
            self.phase = "prefill"
            self._metrics.request_queue_seconds.observe(self._lap("queue"), self._exemplar)
        if progress.processed == progress.total and "prefill" not in times:
            self._metrics.request_prefill_seconds.observe(self._lap("prefill"), self._exemplar)

    def _lap(self, name: str) -> float:
        """Seconds since the last lap, which go into the record under `name`."""
        before, self._since = self._since, time.monotonic()
        self._record.times[name] = self._since - before
        return self._since - before

    @property
    def _exemplar(self) -> dict[str, str] | None:
        return self._metrics.exemplar(self._record.request_id)

    def _usage(self) -> Usage:
        """Of all answers together: a prompt that several share counts once."""
        prompts = [self._usages[request.choice] for request in self._requests if request.shares_prompt_of is None]
        return Usage(
            sum(usage.prompt_tokens for usage in prompts),
            sum(usage.cached_tokens for usage in prompts),
            sum(usage.completion_tokens for usage in self._usages.values()),
            sum(usage.reasoning_tokens for usage in self._usages.values()),
        )

    def _cancel(self) -> None:
        """What has not ended is not worked on any more."""
        for request in self._requests:
            if request.choice in self._open:
                self._engine.cancel(request.request_id)

    def _pass_on(self, event: Event | Ended) -> None:
        self.queue.put_nowait(event)
        self._stirred.set()

    def _settle(self, outcome: Outcome) -> None:
        self.outcome = outcome
        self._record.finish = outcome
        self._metrics.requests_finished.labels(reason=outcome).inc()
        self._metrics.request_duration_seconds.observe(self._record.elapsed(), self._exemplar)
        if "prefill" in self._record.times:
            self._metrics.request_decode_seconds.observe(self._lap("decode"), self._exemplar)


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
