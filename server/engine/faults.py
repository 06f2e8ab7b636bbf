"""Faults of the computation while serving: counted, and after repeated ones nothing more is served."""

import logging
import time
from collections import deque
from collections.abc import Callable

from server.metrics import Metrics
from turbocache.backends import FALLBACK

log = logging.getLogger(__name__)

MAX_FAULTS = 3
"""This many faults within `WINDOW_SECONDS` and the process refuses to work: what it computes can't be trusted."""

WINDOW_SECONDS = 600.0


class FaultLog:
    """Notes faults. `verdict` is None while the engine may serve; then a sentence that says why not and what to do,
    which stays until the process is restarted. Written by the engine's thread, read by any.
    """

    def __init__(self, metrics: Metrics, backend: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.verdict: str | None = None
        self._metrics = metrics
        self._backend = backend
        self._clock = clock
        self._times: deque[float] = deque(maxlen=MAX_FAULTS)

    def note(self, what: str) -> None:
        """One fault, in a few words without user text."""
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
