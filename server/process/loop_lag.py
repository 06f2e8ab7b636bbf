"""How long the event loop is kept from its work: every stream and every connection waits as long."""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from server.metrics import Metrics

BEAT_SECONDS = 0.02
"""A stall may begin anywhere between two beats, so up to this much of it is not seen."""

_SCHEDULER = Path("/proc/thread-self/schedstat")


async def watch_loop(metrics: Metrics) -> None:
    """Measures until it is cancelled by how much a beat comes late, and keeps the longest delay: all of it, and what is
    left of it without the time for which the system had no processor for the loop's thread. The first is what clients
    feel, the second what the server itself does to them.
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
    """Tells for how many seconds the calling thread has waited for a processor so far while it could have run: the
    second of the numbers (nanoseconds) in Linux' schedstat. Always 0 where there is no such file.
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
