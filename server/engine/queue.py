"""The requests that are accepted and not yet in the batch."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass

from server.errors import QueueFull
from server.protocol import Deliver, GenerationRequest


@dataclass(frozen=True, slots=True)
class QueuedRequest:
    """A request, its event sink, the most answer tokens it may have, and how many of them memory is promised for."""

    request: GenerationRequest
    deliver: Deliver
    limit: int
    allowed: int


class WaitingQueue:
    """Counts requests from their acceptance on, and keeps them in order once the engine's thread has taken them over.

    `enter` may be called from any thread; the rest belongs to the engine's.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._n = 0
        self._entries: list[QueuedRequest] = []

    def __len__(self) -> int:
        """Requests that wait, those on their way to the engine's thread included."""
        return self._n

    def __iter__(self) -> Iterator[QueuedRequest]:
        """The entries at this moment, oldest first."""
        return iter(list(self._entries))

    @property
    def empty(self) -> bool:
        return not self._entries

    def enter(self, n: int = 1) -> None:
        """Count `n` more. Raises QueueFull, and then counts none. The last free place is enough for all that come
        together: they are one client's.
        """
        with self._lock:
            if self._n >= self._limit:
                raise QueueFull()
            self._n += n

    def leave(self, n: int = 1) -> None:
        """Count `n` less: they were refused after all."""
        with self._lock:
            self._n -= n

    def add(self, entry: QueuedRequest) -> None:
        """Keep a request that has entered."""
        self._entries.append(entry)

    def follow(self, entry: QueuedRequest) -> None:
        """Keep a request that has entered at rank 0."""
        with self._lock:
            self._n += 1
        self._entries.append(entry)

    def remove(self, entry: QueuedRequest) -> None:
        """It runs, or has ended."""
        self._entries.remove(entry)
        self.leave()
