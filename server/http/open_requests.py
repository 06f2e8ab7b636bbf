"""The open requests, and what ends one early: its deadline, or a stop of the server."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Protocol

from server.errors import DeadlineExceeded, Phase, ServerError
from server.metrics import Metrics


class Endable(Protocol):
    """A generation as this module sees it."""

    @property
    def over(self) -> bool:
        """It has an outcome and can't be ended any more."""
        ...

    @property
    def phase(self) -> Phase: ...

    def end(self, error: ServerError) -> None:
        """Stop the work and send the error to the client."""
        ...


class OpenRequest:
    """One request. Once it has generations, they send an error to the client. Before that, `timer` interrupts it."""

    def __init__(self, generations: Sequence[Endable]) -> None:
        self.generations = generations
        self.timer = asyncio.timeout(None)
        self.error: ServerError | None = None

    @property
    def over(self) -> bool:
        return self.error is not None or (bool(self.generations) and all(one.over for one in self.generations))

    def end(self, error: ServerError) -> None:
        if self.over:
            return
        self.error = error
        for generation in self.generations:
            generation.end(error)
        if not self.generations:
            self.timer.reschedule(asyncio.get_running_loop().time())

    @property
    def phase(self) -> Phase:
        """The earliest phase of its generations, because the others would have had to wait for that one."""
        order: tuple[Phase, ...] = ("arriving", "waiting", "prefill", "answer")
        return min((one.phase for one in self.generations if not one.over), key=order.index, default="arriving")


class OpenRequests:
    """All open requests. Everything here runs on the event loop's thread."""

    def __init__(self, metrics: Metrics) -> None:
        self.deadline: float | None = None
        """Seconds from a request's arrival, None for no deadline."""
        self._metrics = metrics
        self._open: set[OpenRequest] = set()
        self._stopped: ServerError | None = None

    def __len__(self) -> int:
        return len(self._open)

    @asynccontextmanager
    async def track(self, generations: Sequence[Endable]) -> AsyncIterator[None]:
        """Wraps the handling of one request, which appends its accepted generations to `generations`.

        Raises the ServerError that ended the request if it had no generation yet.
        """
        request, loop, expiry = OpenRequest(generations), asyncio.get_running_loop(), None
        if self.deadline is not None:
            expiry = loop.call_later(self.deadline, self._expire, request, self.deadline)
        self._open.add(request)
        try:
            async with request.timer:
                if self._stopped is not None:
                    request.end(self._stopped)
                yield
        except TimeoutError:
            if request.error is None:
                raise
            raise request.error from None
        finally:
            self._open.discard(request)
            if expiry is not None:
                expiry.cancel()

    def end_all(self, error: ServerError) -> None:
        """Ends all open requests, and every later one at once."""
        self._stopped = error
        for request in list(self._open):
            request.end(error)

    def _expire(self, request: OpenRequest, seconds: float) -> None:
        if not request.over:
            phase = request.phase
            self._metrics.deadlines_exceeded.labels(phase=phase).inc()
            request.end(DeadlineExceeded(seconds, phase))
