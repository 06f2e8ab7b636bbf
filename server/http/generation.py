"""The generation of one HTTP request, between the event loop and the engine's thread. It has exactly one outcome."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Coroutine, Sequence
from typing import Any, Literal, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from server.errors import EngineDead, InternalError, Phase, ServerError
from server.http.request_context import RequestContext
from server.http.sse import IDLE_SECONDS, AllFinished, next_within
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


class Generation:
    """Submits one HTTP request's GenerationRequests, one per answer, and receives their events into `queue`. The last
    event there is `AllFinished` or `Failed`.

    Lives on the event loop's thread; only `deliver` may be called from another. The first of these sets the outcome:
    - the last answer finishes;
    - one answer fails: "error", and the others are cancelled;
    - `close`: "cancelled", because the client is gone;
    - `end`: "error", at a dead engine, a deadline or a stop of the server.
    Later events are dropped.
    """

    def __init__(
        self, engine: Engine, metrics: Metrics, requests: Sequence[GenerationRequest], context: RequestContext
    ) -> None:
        self.queue: asyncio.Queue[Event | AllFinished] = asyncio.Queue()
        self.outcome: Outcome | None = None
        self.phase: Phase = "waiting"
        self._engine = engine
        self._metrics = metrics
        self._requests = requests
        self._open = {request.choice for request in requests}
        self._usages: dict[int, Usage] = {}
        self._context = context
        self._loop = asyncio.get_running_loop()
        self._has_event = asyncio.Event()
        self._ended: set[int] = set()
        self._since = time.monotonic()

    @property
    def n_answers(self) -> int:
        return len(self._requests)

    def submit(self) -> None:
        """Raises what Engine.submit raises. A generation that was not accepted has no outcome."""
        self._engine.submit(self._requests, self.deliver)
        self._since = time.monotonic()
        self._context.generations.append(self)

    @property
    def over(self) -> bool:
        return self.outcome is not None

    def end(self, error: ServerError) -> None:
        """Fails the generation and cancels the engine's work. Idempotent."""
        if self.outcome is None:
            self._settle("error")
            self._cancel()
            self._pass_on(Failed(error))

    def deliver(self, event: Event) -> None:
        """The engine calls this from its thread."""
        # The loop is closed after a forced stop, and then no client is left.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._receive, event)

    def close(self) -> None:
        """Call this when the client is gone or the response is complete. Cancels unfinished work. Idempotent."""
        if self.outcome is None:
            self._settle("cancelled")
            self._cancel()

    async def check_alive(self) -> None:
        """Fails the generation with EngineDead if the engine is dead."""
        if self.outcome is not None or (health := self._engine.health()).alive:
            return
        # The engine may have sent a terminal event just before it died. Let the loop deliver that first.
        await asyncio.sleep(0)
        self.end(EngineDead(f"The engine stopped working: {health.detail}"))

    async def wait_first(self, seconds: float) -> None:
        """Waits for the first event, at most `seconds`. Raises the error if the generation failed before any text."""
        deadline = self._loop.time() + seconds
        while not self._has_event.is_set() and (left := deadline - self._loop.time()) > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(IDLE_SECONDS, left)):
                    await self._has_event.wait()
            await self.check_alive()
        if self.outcome == "error" and self._context.first_text_seconds is None:
            while not isinstance(event := self.queue.get_nowait(), Failed):
                pass
            raise self.public_error(event)

    async def next_event(self) -> Event | AllFinished:
        """Waits for the next event. The last one is terminal."""
        while (event := await next_within(self.queue, IDLE_SECONDS)) is None:
            await self.check_alive()
        return event

    def public_error(self, failed: Failed) -> ServerError:
        """The error that the client sees. An unexpected error is logged and becomes a plain 500."""
        error = failed.error
        if not isinstance(error, ServerError):
            logger.error("%s failed", self._context.request_id, exc_info=error)
            error = InternalError.of(self._context.request_id)
            error.__cause__ = failed.error
        self._context.error = error.code or error.type
        return error

    def _receive(self, event: Event) -> None:
        terminal = isinstance(event, Finished | Failed)
        if self.outcome is not None or (terminal and event.choice not in self._open):
            if terminal and event.choice in self._ended:
                logger.error("%s got a second terminal event", self._context.request_id)
            return
        if terminal:
            self._open.discard(event.choice)
            self._ended.add(event.choice)
        if isinstance(event, PrefillProgress):
            self._note_progress(event)
            if not event.processed:
                return
        elif isinstance(event, TextDelta | ToolCall):
            self.phase = "answer"
        if isinstance(event, TextDelta | ToolCall) and self._context.first_text_seconds is None:
            self._context.first_text_seconds = self._context.elapsed()
            self._metrics.time_to_first_token_seconds.observe(self._context.first_text_seconds, self._exemplar)
        if isinstance(event, Failed):
            self._settle("error")
            self._cancel()
        self._pass_on(event)
        if isinstance(event, Finished):
            self._usages[event.choice] = event.usage
            if not self._open:
                self._context.usage = usage = self._usage()
                self._metrics.request_prompt_tokens.observe(usage.prompt_tokens)
                self._metrics.request_generated_tokens.observe(usage.completion_tokens)
                self._settle(event.finish_reason)
                self._pass_on(AllFinished(self._context.usage))

    def _note_progress(self, progress: PrefillProgress) -> None:
        """Measures queue and prefill time: until the first prompt starts, and until the first one is complete."""
        times = self._context.times
        if self.phase == "waiting":
            self.phase = "prefill"
            self._metrics.request_queue_seconds.observe(self._lap("queue"), self._exemplar)
        if progress.processed == progress.total and "prefill" not in times:
            self._metrics.request_prefill_seconds.observe(self._lap("prefill"), self._exemplar)

    def _lap(self, name: str) -> float:
        """Seconds since the last lap. Stored under `name`."""
        before, self._since = self._since, time.monotonic()
        self._context.times[name] = self._since - before
        return self._since - before

    @property
    def _exemplar(self) -> dict[str, str] | None:
        return self._metrics.exemplar(self._context.request_id)

    def _usage(self) -> Usage:
        """Usage of all answers. A shared prompt counts once."""
        prompts = [self._usages[request.choice] for request in self._requests if request.shares_prompt_of is None]
        return Usage(
            sum(usage.prompt_tokens for usage in prompts),
            sum(usage.cached_tokens for usage in prompts),
            sum(usage.completion_tokens for usage in self._usages.values()),
            sum(usage.reasoning_tokens for usage in self._usages.values()),
        )

    def _cancel(self) -> None:
        """Cancels the answers that are not finished."""
        for request in self._requests:
            if request.choice in self._open:
                self._engine.cancel(request.request_id)

    def _pass_on(self, event: Event | AllFinished) -> None:
        self.queue.put_nowait(event)
        self._has_event.set()

    def _settle(self, outcome: Outcome) -> None:
        self.outcome = outcome
        self._context.finish = outcome
        self._metrics.requests_finished.labels(reason=outcome).inc()
        self._metrics.request_duration_seconds.observe(self._context.elapsed(), self._exemplar)
        if "prefill" in self._context.times:
            self._metrics.request_decode_seconds.observe(self._lap("decode"), self._exemplar)


async def until_disconnect(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """Returns the result of `work`. If the client disconnects first, cancels it and raises ClientDisconnect."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
