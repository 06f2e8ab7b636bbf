"""The requests that are accepted and not yet in the batch."""

import threading
from collections.abc import Iterator

from server.commands import QueuedRequest
from server.errors import QueueFull


class WaitingQueue:
    """Counts requests from their acceptance on, and holds them in order once the engine's thread has them.

    `enter` and `leave` may be called from any thread; the rest belongs to the engine's.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._n = 0
        self._requests: list[QueuedRequest] = []

    def __len__(self) -> int:
        """Waiting requests, including those that the engine's thread has not yet seen."""
        return self._n

    def __iter__(self) -> Iterator[QueuedRequest]:
        """A copy of the queue at this moment, oldest first."""
        return iter(list(self._requests))

    @property
    def empty(self) -> bool:
        return not self._requests

    def enter(self, n: int = 1) -> None:
        """Count `n` more requests of one client. One free place is enough for all. Raises QueueFull and counts none."""
        with self._lock:
            if self._n >= self._limit:
                raise QueueFull()
            self._n += n

    def leave(self, n: int = 1) -> None:
        """Count `n` requests less."""
        with self._lock:
            self._n -= n

    def add(self, queued: QueuedRequest) -> None:
        """Append a request. Rank 0 has checked the limit for a remote one."""
        if queued.remote:
            with self._lock:
                self._n += 1
        self._requests.append(queued)

    def remove(self, queued: QueuedRequest) -> None:
        """The request runs, or has ended."""
        self._requests.remove(queued)
        self.leave()
