"""The memory budget: bytes are promised to a request before it is accepted."""

import threading
from collections.abc import Callable
from dataclasses import dataclass

from server.errors import OutOfMemory
from server.sessions.checkpoints import Checkpoint
from server.sessions.registry import SessionRegistry
from turbocache.store import CacheStore

_MIB = 2**20


@dataclass(slots=True)
class _Promise:
    session: int
    scratch: int
    started: bool = False

    @property
    def nbytes(self) -> int:
        return self.session + self.scratch


class Budget:
    """Promises of bytes to accepted requests. Safe to call from any thread.

    `cost(n)` is the size of a session of `n` tokens. `scratch(n)` is what reading a prompt of `n` tokens takes besides.
    A promise covers the whole session. So while promises stay within `total`, evicting idle sessions always makes room.
    """

    def __init__(self, total: int, cost: Callable[[int], int], scratch: Callable[[int], int] = lambda n: 0) -> None:
        self.total = total
        self._cost = cost
        self._scratch = scratch
        self._lock = threading.Lock()
        self._promised: dict[str, _Promise] = {}

    @property
    def promised(self) -> int:
        """Bytes promised to requests in the queue or the batch."""
        with self._lock:
            return sum(promise.nbytes for promise in self._promised.values())

    @property
    def started(self) -> int:
        """Bytes promised to requests in the batch."""
        with self._lock:
            return sum(promise.nbytes for promise in self._promised.values() if promise.started)

    def promise(self, request_id: str, n_tokens: int, n_prompt: int = 0) -> None:
        """Promise bytes for a session of `n_tokens`, of which `n_prompt` are its prompt. Raises OutOfMemory."""
        promise = _Promise(self._cost(n_tokens), self._scratch(n_prompt))
        with self._lock:
            free = self.total - sum(other.nbytes for other in self._promised.values())
            if promise.nbytes <= free:
                self._promised[request_id] = promise
                return
        what = f"The conversation needs {promise.nbytes / _MIB:.0f} MiB of cache for {n_tokens} tokens"
        if promise.nbytes > self.total:
            raise OutOfMemory(
                f"{what}, more than the whole budget of {self.total / _MIB:.0f} MiB. Ask for fewer max_tokens, shorten "
                "the conversation, or raise TURBOCACHE_KV_MEMORY."
            )
        raise OutOfMemory(
            f"{what}; {free / _MIB:.0f} MiB of {self.total / _MIB:.0f} MiB are not promised to running requests. "
            "Please try again when one of them has ended."
        )

    def start(self, request_id: str, started: bool = True) -> None:
        """The request enters the batch, so room is made for it. With False it has to wait again."""
        with self._lock:
            self._promised[request_id].started = started

    def prefilled(self, request_id: str) -> None:
        """The prompt is read: its scratch memory is free."""
        with self._lock:
            self._promised[request_id].scratch = 0

    def record(self, request_id: str, n_tokens: int, n_prompt: int = 0) -> None:
        """Note a promise that another process has made."""
        with self._lock:
            self._promised[request_id] = _Promise(self._cost(n_tokens), self._scratch(n_prompt))

    def raise_to(self, request_id: str, n_tokens: int) -> None:
        """Note that a promise was raised, here or by another process."""
        with self._lock:
            promise = self._promised[request_id]
            promise.session = max(self._cost(n_tokens), promise.session)

    def extend(self, request_id: str, n_tokens: int) -> bool:
        """Raise a promise to a session of `n_tokens`. False when the budget does not allow it."""
        needed = self._cost(n_tokens)
        with self._lock:
            mine = self._promised[request_id]
            others = sum(promise.nbytes for promise in self._promised.values() if promise is not mine)
            if needed + mine.scratch > self.total - others:
                return False
            mine.session = max(needed, mine.session)
            return True

    def release(self, request_id: str) -> None:
        """The request has ended. Unknown ids are ignored."""
        with self._lock:
            self._promised.pop(request_id, None)


@dataclass(frozen=True, slots=True)
class Room:
    """How room was made."""

    sessions: int = 0
    """Sessions that were lost: they are not on disk."""
    checkpoints: int = 0
    """Checkpoints that were dropped."""
    enough: bool = True


def make_room(budget: Budget, registry: SessionRegistry, store: CacheStore, before: float | None = None) -> Room:
    """Evict until the promises of the batch and the idle sessions fit into the budget together. In this order:

    1. checkpoints that no session needs, a session's newest last;
    2. idle sessions that need not be kept;
    3. idle sessions to keep, and with a disk also the ends of system messages;
    4. checkpoints of running sessions.

    Within each, the least recently used goes first. Sessions are spilled to disk if there is one. With `before`, a
    time, sessions to keep that were used after it stay, so there may not be enough room.
    """
    sessions = spilled = checkpoints = 0
    while budget.started + store.resting_nbytes(registry.caches()) > budget.total:
        if kept := registry.checkpoints.spare():
            registry.checkpoints.drop(kept[0])
            checkpoints += 1
        elif isinstance(going := registry.next_to_go(before), Checkpoint):
            registry.checkpoints.drop(going)
            checkpoints += 1
        elif going is not None:
            spilled += registry.spill(going)
            sessions += 1
        elif before is None and (kept := list(registry.checkpoints)):
            registry.checkpoints.drop(kept[0])
            checkpoints += 1
        else:
            return Room(sessions - spilled, checkpoints, enough=before is None)
    return Room(sessions - spilled, checkpoints)
