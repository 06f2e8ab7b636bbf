"""The memory budget as a ledger: what accepted requests may still need, promised before they are accepted."""

import threading
from collections.abc import Callable
from dataclasses import dataclass

from server.engine.sessions import SessionRegistry
from server.errors import OutOfMemory
from turbocache.store import CacheStore

_MIB = 2**20


class Budget:
    """Promises of bytes to accepted requests. Safe to call from any thread.

    `cost(n)` is what a session needs to reach `n` tokens. A promise covers the whole session, so as long as promises
    stay within `total`, idle sessions can always be evicted to keep them.
    """

    def __init__(self, total: int, cost: Callable[[int], int]) -> None:
        self.total = total
        self._cost = cost
        self._lock = threading.Lock()
        self._promised: dict[str, int] = {}

    @property
    def promised(self) -> int:
        """Bytes promised to requests that wait or run."""
        with self._lock:
            return sum(self._promised.values())

    def promise(self, request_id: str, n_tokens: int) -> None:
        """Set bytes aside for a request whose session will reach `n_tokens`. Raises OutOfMemory, and then sets none."""
        needed = self._cost(n_tokens)
        with self._lock:
            free = self.total - sum(self._promised.values())
            if needed <= free:
                self._promised[request_id] = needed
                return
        what = f"The conversation needs {needed / _MIB:.0f} MiB of cache for {n_tokens} tokens"
        if needed > self.total:
            raise OutOfMemory(
                f"{what}, more than the whole budget of {self.total / _MIB:.0f} MiB. Ask for fewer max_tokens, shorten "
                "the conversation, or raise TURBOCACHE_KV_MEMORY."
            )
        raise OutOfMemory(
            f"{what}; {free / _MIB:.0f} MiB of {self.total / _MIB:.0f} MiB are not promised to running requests. "
            "Please try again when one of them has ended."
        )

    def extend(self, request_id: str, n_tokens: int) -> bool:
        """Raise a promise so that the session may reach `n_tokens`; False when the budget does not allow it."""
        needed = self._cost(n_tokens)
        with self._lock:
            others = sum(self._promised.values()) - self._promised[request_id]
            if needed > self.total - others:
                return False
            self._promised[request_id] = max(needed, self._promised[request_id])
            return True

    def release(self, request_id: str) -> None:
        """The request has ended; its promise is void. Unknown ids are ignored."""
        with self._lock:
            self._promised.pop(request_id, None)


@dataclass(frozen=True, slots=True)
class Evicted:
    """What had to go, and is on no disk."""

    sessions: int = 0
    checkpoints: int = 0


def make_room(budget: Budget, registry: SessionRegistry, store: CacheStore) -> Evicted:
    """Forget, if need be, checkpoints (their session's newest last), then sessions at rest (named ones last), of each
    the longest unused first, until what is promised and what rests fit the budget together. Sessions go to disk where
    there is one. None goes for a checkpoint's sake.

    Runs on the engine's thread.
    """
    sessions = spilled = checkpoints = 0
    while budget.promised + store.resting_nbytes(registry.caches()) > budget.total:
        newest = {id(session.checkpoints[-1]) for session in registry if session.checkpoints}
        if kept := registry.checkpoints():
            registry.drop(min(kept, key=lambda checkpoint: id(checkpoint) in newest))
            checkpoints += 1
        elif idle := registry.idle():
            spilled += registry.spill(idle[0])
            sessions += 1
        else:
            break
    return Evicted(sessions - spilled, checkpoints)
