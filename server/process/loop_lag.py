"""The lag of the event loop, which delays every stream and every connection."""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from server.metrics import Metrics

BEAT_SECONDS = 0.02
"""A stall may begin at any time between two beats, so up to this much of it is not measured."""

_SCHEDULER = Path("/proc/thread-self/schedstat")


async def watch_loop(metrics: Metrics) -> None:
    """Measure the lag of each beat until cancelled, and keep the longest.

    There are two lags: the whole, which clients notice, and the server's own, without the time for which the loop's
    thread waited for a processor.
    """
    longest = longest_own = 0.0
    with processor_wait() as waited:
        while True:
            due, waited_before = time.monotonic() + BEAT_SECONDS, waited()
            await asyncio.sleep(BEAT_SECONDS)
            lag = max(0.0, time.monotonic() - due)
            own = max(0.0, lag - (waited() - waited_before))
            metrics.event_loop_lag_seconds.observe(lag)
            if lag > longest:
                metrics.event_loop_longest_lag_seconds.set(longest := lag)
            if own > longest_own:
                metrics.event_loop_longest_own_lag_seconds.set(longest_own := own)


@contextmanager
def processor_wait() -> Iterator[Callable[[], float]]:
    """Yields a function that returns the seconds for which the calling thread has waited for a processor.

    It reads the second number (nanoseconds) of Linux's schedstat. It returns 0 where this file does not exist.
    """
    try:
        opened = _SCHEDULER.open("rb", buffering=0)
    except OSError:
        yield lambda: 0.0
        return
    with opened:

        def waited() -> float:
            opened.seek(0)
            return int(opened.read(64).split()[1]) / 1e9

        yield waited
