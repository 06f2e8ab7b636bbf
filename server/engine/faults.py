"""Counts faults of the computation. After repeated faults the engine refuses all requests."""

import logging
import time
from collections import deque
from collections.abc import Callable

from server.metrics import Metrics
from turbocache.backends import FALLBACK

log = logging.getLogger(__name__)

MAX_FAULTS = 3
"""After this many faults within `WINDOW_SECONDS` the results can't be trusted."""

WINDOW_SECONDS = 600.0


class FaultLog:
    """Written by the engine's thread, read by any."""

    def __init__(self, metrics: Metrics, backend: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.verdict: str | None = None
        """Why the engine serves no more and what to do, from then until a restart."""
        self._metrics = metrics
        self._backend = backend
        self._clock = clock
        self._times: deque[float] = deque(maxlen=MAX_FAULTS)

    def note(self, what: str) -> None:
        """Note one fault. `what` is a few words without user text."""
        self._metrics.kernel_faults.inc()
        self._times.append(self._clock())
        recent = len(self._times) == MAX_FAULTS and self._times[-1] - self._times[0] <= WINDOW_SECONDS
        log.error("fault while serving on the backend %s: %s", self._backend, what)
        if recent and self.verdict is None:
            self.verdict = (
                f"unhealthy: {MAX_FAULTS} steps failed within {WINDOW_SECONDS:.0f} s on the backend {self._backend} "
                f"(the last one: {what}), so nothing more is served; {self._advice()}"
            )
            log.critical("%s", self.verdict)

    def _advice(self) -> str:
        if self._backend == FALLBACK:
            return "restart the server, and report what its log says if it happens again"
        return f"restart the server, with TURBOCACHE_BACKEND={FALLBACK} if it happens again"
