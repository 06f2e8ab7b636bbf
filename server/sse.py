"""Server-sent events: an engine's events from a queue as the bytes of a stream that never falls silent."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

from server.protocol import Event, Failed, Finished

T = TypeVar("T")

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
# How long a wait for an event may last before the caller looks whether the engine still lives.
IDLE_SECONDS = 1.0


def data(payload: str) -> bytes:
    """One event; `payload` is JSON on one line."""
    return f"data: {payload}\n\n".encode()


async def next_within(queue: asyncio.Queue[T], seconds: float) -> T | None:
    """The queue's next item, or None when none comes within `seconds`. Nothing is lost when the time runs out."""
    try:
        async with asyncio.timeout(max(0.0, seconds)):
            return await queue.get()
    except TimeoutError:
        return None


async def write_events(
    queue: asyncio.Queue[Event],
    render: Callable[[Event], Sequence[bytes]],
    envelope: Callable[[Failed], dict[str, Any]],
    *,
    keepalive_seconds: float,
    on_idle: Callable[[], Awaitable[None]],
    silent_since: float | None = None,
) -> AsyncIterator[bytes]:
    """The stream's bytes, up to and including the terminal event.

    `render` gives the bytes of an event (none for events that clients don't see). A comment is sent whenever nothing
    else was for `keepalive_seconds`, counted from `silent_since` (event loop time, None: now); events that render to
    nothing don't count as sent. `on_idle` runs at least every IDLE_SECONDS in which no event comes; it may put a
    terminal event into the queue. `Finished` ends the stream with [DONE]; `Failed` with `envelope`'s JSON and without
    [DONE].
    """
    loop = asyncio.get_running_loop()
    due = (loop.time() if silent_since is None else silent_since) + keepalive_seconds
    while True:
        event = await next_within(queue, min(IDLE_SECONDS, due - loop.time()))
        if event is None:
            await on_idle()
        elif isinstance(event, Failed):
            yield data(json.dumps(envelope(event), ensure_ascii=False))
            return
        chunks = render(event) if event is not None else ()
        for chunk in chunks:
            yield chunk
        if isinstance(event, Finished):
            yield DONE
            return
        if chunks:
            due = loop.time() + keepalive_seconds
        elif loop.time() >= due:
            yield KEEP_ALIVE
            due = loop.time() + keepalive_seconds
