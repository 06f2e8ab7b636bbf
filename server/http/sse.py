"""Server-sent events: an answer's events from a queue as the bytes of a stream that never falls silent."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from server.errors import ServerError
from server.protocol import Event, Failed, Usage

T = TypeVar("T")

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
# How long a wait for an event may last before the caller looks whether the engine still lives.
IDLE_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Ended:
    """Every answer of a turn is complete."""

    usage: Usage


class Renderer(Protocol):
    """An API's stream: what its clients see of an answer's events, each as complete server-sent events."""

    def render(self, event: Event) -> Sequence[bytes]:
        """Nothing for events that clients don't see."""
        ...

    def end(self, usage: Usage) -> Sequence[bytes]:
        """What follows the last event of all answers."""
        ...

    def fail(self, error: ServerError) -> Sequence[bytes]:
        """The stream's end when the answer failed."""
        ...


def data(payload: str, event: str | None = None) -> bytes:
    """One event, with its name if it has one; `payload` is JSON on one line."""
    head = "" if event is None else f"event: {event}\n"
    return f"{head}data: {payload}\n\n".encode()


async def next_within(queue: asyncio.Queue[T], seconds: float) -> T | None:
    """The queue's next item, or None when none comes within `seconds`. Nothing is lost when the time runs out."""
    try:
        async with asyncio.timeout(max(0.0, seconds)):
            return await queue.get()
    except TimeoutError:
        return None


async def write_events(
    queue: asyncio.Queue[Event | Ended],
    renderer: Renderer,
    public_error: Callable[[Failed], ServerError],
    *,
    keepalive_seconds: float,
    on_idle: Callable[[], Awaitable[None]],
    silent_since: float | None = None,
) -> AsyncIterator[bytes]:
    """The stream's bytes, up to and including its end: `Ended`, or `Failed` with the error that clients are told.

    A comment is sent whenever nothing else was for `keepalive_seconds`, counted from `silent_since` (event loop time,
    None: now); events that render to nothing don't count as sent. `on_idle` runs at least every IDLE_SECONDS in which
    no event comes; it may put a terminal event into the queue.
    """
    loop = asyncio.get_running_loop()
    due = (loop.time() if silent_since is None else silent_since) + keepalive_seconds
    while True:
        event = await next_within(queue, min(IDLE_SECONDS, due - loop.time()))
        chunks: Sequence[bytes] = ()
        if event is None:
            await on_idle()
        elif isinstance(event, Ended):
            chunks = renderer.end(event.usage)
        elif isinstance(event, Failed):
            chunks = renderer.fail(public_error(event))
        else:
            chunks = renderer.render(event)
        for chunk in chunks:
            yield chunk
        if isinstance(event, Ended | Failed):
            return
        if chunks:
            due = loop.time() + keepalive_seconds
        elif loop.time() >= due:
            yield KEEP_ALIVE
            due = loop.time() + keepalive_seconds
