"""server.http.sse: the bytes of a stream, its signs of life, and its end."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

from server.errors import OutOfMemory, ServerError
from server.http.sse import DONE, KEEP_ALIVE, AllFinished, data, next_within, write_events
from server.protocol import Event, Failed, PrefillProgress, TextDelta, Usage

ALL_FINISHED = AllFinished(Usage(1, 0, 1))


class Plain:
    """Texts, then OpenAI's mark."""

    def render(self, event: Event) -> Sequence[bytes]:
        return [data(event.text)] if isinstance(event, TextDelta) else ()

    def end(self, usage: Usage) -> Sequence[bytes]:
        return [DONE]

    def fail(self, error: ServerError) -> Sequence[bytes]:
        return [data(json.dumps(error.envelope(), ensure_ascii=False))]


def public_error(failed: Failed) -> ServerError:
    assert isinstance(failed.error, ServerError)
    return failed.error


async def nothing() -> None:
    pass


async def written(
    script: Sequence[Event | AllFinished | float], keepalive: float = 30.0, **options: Any
) -> list[bytes]:
    """What write_events makes of events, with pauses (seconds) between them."""
    queue: asyncio.Queue[Event | AllFinished] = asyncio.Queue()

    async def play() -> None:
        for step in script:
            if isinstance(step, float):
                await asyncio.sleep(step)
            else:
                queue.put_nowait(step)

    player = asyncio.create_task(play())
    options.setdefault("on_idle", nothing)
    chunks = [
        chunk async for chunk in write_events(queue, Plain(), public_error, keepalive_seconds=keepalive, **options)
    ]
    await player
    return chunks


async def test_text_then_done() -> None:
    assert await written([TextDelta("a"), TextDelta("b"), ALL_FINISHED]) == [data("a"), data("b"), DONE]


async def test_an_error_ends_the_stream_without_done() -> None:
    chunks = await written([TextDelta("a"), Failed(OutOfMemory("No röom."))])
    expected = '{"error": {"message": "No röom.", "type": "server_error", "param": null, "code": "out_of_memory"}}'
    assert chunks == [data("a"), data(expected)]


async def test_nothing_after_the_terminal_event() -> None:
    assert await written([ALL_FINISHED, TextDelta("late"), Failed(OutOfMemory())]) == [DONE]


async def test_keep_alive_before_the_first_token_and_between_tokens() -> None:
    chunks = await written([0.25, TextDelta("a"), 0.25, ALL_FINISHED], keepalive=0.1)
    first = chunks.index(data("a"))
    before, after = chunks[:first], chunks[first + 1 : -1]
    assert set(before) == set(after) == {KEEP_ALIVE}
    assert (len(before) >= 2, len(after) >= 2, chunks[-1]) == (True, True, DONE)


async def test_events_that_send_nothing_do_not_put_off_the_keep_alive() -> None:
    progress: list[Event | AllFinished | float] = [PrefillProgress(1, 9), 0.03] * 10
    chunks = await written([*progress, ALL_FINISHED], keepalive=0.1)
    assert chunks.count(KEEP_ALIVE) >= 2


async def test_no_keep_alive_while_text_flows() -> None:
    flow: list[Event | AllFinished | float] = [TextDelta("a"), 0.02] * 30
    assert KEEP_ALIVE not in await written([*flow, ALL_FINISHED], keepalive=0.4)


async def test_silence_before_the_stream_counts() -> None:
    since = asyncio.get_running_loop().time() - 1.0
    assert await written([0.05, ALL_FINISHED], keepalive=1.0, silent_since=since) == [KEEP_ALIVE, DONE]


async def test_idle_may_end_the_stream() -> None:
    queue: asyncio.Queue[Event | AllFinished] = asyncio.Queue()

    async def dead() -> None:
        queue.put_nowait(Failed(OutOfMemory("gone")))

    chunks = [chunk async for chunk in write_events(queue, Plain(), public_error, keepalive_seconds=0.05, on_idle=dead)]
    assert b"gone" in chunks[-1]


async def test_next_within_loses_nothing() -> None:
    queue: asyncio.Queue[int] = asyncio.Queue()
    got: list[int] = []

    async def put() -> None:
        for number in range(300):
            queue.put_nowait(number)
            await asyncio.sleep(0.001)

    putting = asyncio.create_task(put())
    while len(got) < 300:
        if (number := await next_within(queue, 0.001)) is not None:
            got.append(number)
    await putting
    assert got == list(range(300))
