"""The requests that are being answered, and what may end one early: its deadline, or a stop of the server."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Protocol

from server.errors import DeadlineExceeded, Phase, ServerError
from server.metrics import Metrics


class Endable(Protocol):
    """A turn, as far as it matters here. One that is `over` can't be ended any more; `phase` is how far it has come."""

    @property
    def over(self) -> bool: ...

    @property
    def phase(self) -> Phase: ...

    def end(self, error: ServerError) -> None:
        """Stop working on it and tell its client why."""
        ...


class _Open:
    """One request. Its turns, once they are accepted, tell the client themselves; before that `timer` interrupts it."""

    def __init__(self, turns: Sequence[Endable]) -> None:
        self.turns = turns
        self.timer = asyncio.timeout(None)
        self.error: ServerError | None = None

    @property
    def over(self) -> bool:
        return self.error is not None or (bool(self.turns) and all(turn.over for turn in self.turns))

    def end(self, error: ServerError) -> None:
        if self.over:
            return
        self.error = error
        for turn in self.turns:
            turn.end(error)
        if not self.turns:
            self.timer.reschedule(asyncio.get_running_loop().time())

    @property
    def phase(self) -> Phase:
        """Of several turns the one that has come least far: it is what the others would have had to wait for."""
        order: tuple[Phase, ...] = ("arriving", "waiting", "prefill", "answer")
        return min((turn.phase for turn in self.turns if not turn.over), key=order.index, default="arriving")


class OpenRequests:
    """Lives on the event loop's thread. `deadline` is in seconds from a request's arrival, None for none."""

    def __init__(self, metrics: Metrics) -> None:
        self.deadline: float | None = None
        self._metrics = metrics
        self._open: set[_Open] = set()
        self._stopped: ServerError | None = None

    def __len__(self) -> int:
        return len(self._open)

    @asynccontextmanager
    async def watched(self, turns: Sequence[Endable]) -> AsyncIterator[None]:
        """Around the answering of one request, whose accepted turns appear in `turns`. Raises the ServerError that
        ended it while it had none.
        """
        request, loop, expiry = _Open(turns), asyncio.get_running_loop(), None
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
        """End what is open, and at once whatever still comes."""
        self._stopped = error
        for request in list(self._open):
            request.end(error)

    def _expire(self, request: _Open, seconds: float) -> None:
        if not request.over:
            phase = request.phase
            self._metrics.deadlines_exceeded.labels(phase=phase).inc()
            request.end(DeadlineExceeded(seconds, phase))
