"""Server-sent events: turns an answer's events into the bytes of a stream, with keep-alives."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from server.errors import ServerError
from server.protocol import Event, Failed, Usage

T = TypeVar("T")

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
# Longest wait for an event before the caller checks that the engine is alive.
IDLE_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class AllFinished:
    """Every answer of a request is complete."""

    usage: Usage


class Renderer(Protocol):
    """An API's stream: turns the engine's events into complete server-sent events."""

    def render(self, event: Event) -> Sequence[bytes]:
        """Empty for events that clients don't see."""
        ...

    def end(self, usage: Usage) -> Sequence[bytes]:
        """What the stream sends after all answers."""
        ...

    def fail(self, error: ServerError) -> Sequence[bytes]:
        """What the stream sends last when an answer failed."""
        ...


def data(payload: str, event: str | None = None) -> bytes:
    """One event. `payload` is JSON on one line; `event` is the event's name."""
    head = "" if event is None else f"event: {event}\n"
    return f"{head}data: {payload}\n\n".encode()


async def next_within(queue: asyncio.Queue[T], seconds: float) -> T | None:
    """The queue's next item, or None after `seconds`. A timeout loses no item."""
    try:
        async with asyncio.timeout(max(0.0, seconds)):
            return await queue.get()
    except TimeoutError:
        return None


async def write_events(
    queue: asyncio.Queue[Event | AllFinished],
    renderer: Renderer,
    public_error: Callable[[Failed], ServerError],
    *,
    keepalive_seconds: float,
    on_idle: Callable[[], Awaitable[None]],
    silent_since: float | None = None,
) -> AsyncIterator[bytes]:
    """Yields the stream's bytes until `AllFinished` or `Failed`, inclusive.

    public_error: returns the error that the client sees.
    keepalive_seconds: sends a comment after this time without bytes.
    on_idle: runs at least every IDLE_SECONDS without an event; may put a terminal event into the queue.
    silent_since: event loop time of the last sign of life, None for now.
    """
    loop = asyncio.get_running_loop()
    due = (loop.time() if silent_since is None else silent_since) + keepalive_seconds
    while True:
        event = await next_within(queue, min(IDLE_SECONDS, due - loop.time()))
        chunks: Sequence[bytes] = ()
        if event is None:
            await on_idle()
        elif isinstance(event, AllFinished):
            chunks = renderer.end(event.usage)
        elif isinstance(event, Failed):
            chunks = renderer.fail(public_error(event))
        else:
            chunks = renderer.render(event)
        for chunk in chunks:
            yield chunk
        if isinstance(event, AllFinished | Failed):
            return
        if chunks:
            due = loop.time() + keepalive_seconds
        elif loop.time() >= due:
            yield KEEP_ALIVE
            due = loop.time() + keepalive_seconds
