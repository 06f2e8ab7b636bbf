"""The sessions: whose conversation is cached how far, and which cached prefix a new turn continues.

Everything here runs on the engine's thread.
"""

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from server.engine.checkpoints import MOST, Checkpoint, Kind, Start, added, common_prefix, deepest, start_at
from server.engine.disk import SessionDisk, Stored
from turbocache.store import CacheStore

LEAST_SHARED = 64
"""Tokens that sessions must have in common for one to start from the other's state."""
_NOTHING = np.zeros(0, dtype=np.int32)


@dataclass(slots=True, eq=False)
class Session:
    """A conversation and its cache. `tokens`, int32, are exactly the tokens that went into `cache`; a running session's
    cache is with the generator and None here. Checkpoints stay with the session whatever it does. `stored`: a file
    holds the cache of just these tokens.
    """

    id: str
    named: bool
    tokens: np.ndarray = field(default_factory=lambda: _NOTHING)
    cache: list[Any] | None = None
    running: bool = False
    turns: int = 0
    last_used: float = field(default_factory=time.time)
    checkpoints: list[Checkpoint] = field(default_factory=list)
    stored: bool = False

    @property
    def spilled(self) -> bool:
        """Whether only the disk has its cache."""
        return self.stored and self.cache is None and not self.running


@dataclass(frozen=True, slots=True)
class Claim:
    """A session handed to a request, with a cache that holds the first `cached` tokens of its prompt. `source` says
    where that was found: `session` (where its last turn ended), the kind of a checkpoint, or `none`.
    """

    session: Session
    cache: list[Any]
    cached: int
    source: str


class SessionRegistry:
    """All sessions of the process, by id. A turn claims one, and gives it back with what its cache then holds."""

    def __init__(
        self, store: CacheStore, disk: SessionDisk | None = None, make_room: Callable[[], None] = lambda: None
    ) -> None:
        """`make_room` is called before a session comes back from `disk`."""
        self._store = store
        self._disk = disk
        self._make_room = make_room
        self._sessions: dict[str, Session] = {}
        for found in disk.stored() if disk is not None else ():
            self._sessions[found.id] = _spilled(found)

    def __iter__(self) -> Iterator[Session]:
        return iter(self._sessions.values())

    def claim(self, name: str | None, prompt: Sequence[int]) -> Claim | None:
        """The session for a prompt, running from now on, or None while the named one still runs another turn.

        A named session goes on from the deepest of its states that the prompt shares, or from another session's where
        that is deeper and exact. An unnamed prompt continues the unnamed session it extends; one that only shares a
        prefix gets a session of its own on the shared pages.
        """
        tokens = np.asarray(prompt, dtype=np.int32)
        if name is None:
            return self._claim_unnamed(tokens)
        session = self._sessions.get(name) or self._found(name) or Session(name, named=True)
        if session.running:
            return None
        if session.spilled and common_prefix(session.tokens, tokens) >= LEAST_SHARED:
            self._restore(session)
        start = deepest([*_states(session, tokens), *self._shared(session, tokens)])
        return self._started(session, start, tokens)

    def checkpoint(self, session: Session, kind: Kind, tokens: Sequence[int] | np.ndarray, cache: list[Any]) -> None:
        """Keep a cache of its own, which holds `tokens`, for later turns to go back to."""
        kept = Checkpoint(kind, np.asarray(tokens, dtype=np.int32), cache)
        session.checkpoints = added(session.checkpoints, kept)

    def put_back(self, session: Session, cache: list[Any] | None, tokens: Sequence[int]) -> None:
        """A turn has ended and its cache holds `tokens`; a None cache (the turn failed) forgets the session."""
        session.running = False
        session.last_used = time.time()
        if cache is None or not tokens:
            self.forget(session)
            return
        session.cache, session.tokens, session.stored = cache, np.asarray(tokens, dtype=np.int32), False

    def forget(self, session: Session) -> None:
        """Drop a session with its checkpoints and its pages. What the disk has of it stays there."""
        session.cache, session.tokens, session.checkpoints, session.stored = None, _NOTHING, [], False
        self._sessions.pop(session.id, None)

    def spill(self, session: Session) -> bool:
        """Leave a session at rest to the disk, without its checkpoints; without a disk, or if that fails, forget it.
        Whether the disk has it.
        """
        if self._store_on_disk(session):
            session.cache, session.checkpoints = None, []
            return True
        self.forget(session)
        return False

    def save_all(self) -> int:
        """Write every session at rest to disk; returns how many are there."""
        return sum(self._store_on_disk(session) for session in self.idle())

    def _store_on_disk(self, session: Session) -> bool:
        if self._disk is None or session.cache is None or len(session.tokens) < LEAST_SHARED:
            return False
        if not session.stored:
            saved = self._disk.save(session.id, session.named, session.turns, session.cache, session.tokens)
            session.stored = saved
            for other in list(self._sessions.values()):  # the disk's budget may have cost others their files
                if other.stored and not self._disk.has(other.id):
                    other.stored = False
                    if other.cache is None and not other.running:
                        self._sessions.pop(other.id)
        return session.stored

    def _found(self, name: str) -> Session | None:
        """A named session that only the disk knows: it was forgotten, but not there."""
        found = None if self._disk is None else self._disk.find(name)
        return None if found is None else _spilled(found)

    def _restore(self, session: Session) -> None:
        """Bring a session back, or leave it empty."""
        assert self._disk is not None
        session.running = True  # nobody may take its place
        self._make_room()
        loaded = self._disk.load(session.id)
        session.running = False
        if loaded is None:
            session.tokens, session.stored = _NOTHING, False
        else:
            session.cache, session.tokens = loaded[0], np.asarray(loaded[1], dtype=np.int32)

    def idle(self) -> list[Session]:
        """Sessions at rest, in the order in which they should be evicted: unnamed before named, oldest use first."""
        resting = [session for session in self._sessions.values() if session.cache is not None]
        return sorted(resting, key=lambda session: (session.named, session.last_used))

    def checkpoints(self) -> list[Checkpoint]:
        """All sessions' checkpoints, each once, longest unused first."""
        kept = {id(c): c for session in self._sessions.values() for c in session.checkpoints}
        return sorted(kept.values(), key=lambda checkpoint: checkpoint.last_used)

    def drop(self, checkpoint: Checkpoint) -> None:
        """Forget a checkpoint, whichever sessions have it."""
        for session in self._sessions.values():
            session.checkpoints = [kept for kept in session.checkpoints if kept is not checkpoint]

    def caches(self) -> list[list[Any]]:
        """Every cache that rests: sessions' and checkpoints'."""
        resting = [session.cache for session in self._sessions.values() if session.cache is not None]
        return [*resting, *(checkpoint.cache for checkpoint in self.checkpoints())]

    def _claim_unnamed(self, tokens: np.ndarray) -> Claim:
        unnamed = [session for session in self if not session.named and not session.running]
        self._restore_unnamed(unnamed, tokens)
        ends = {session.id: start_at("session", session.tokens, session.cache, tokens) for session in unnamed}
        extended = [s for s in unnamed if (end := ends[s.id]) is not None and end.cached == len(s.tokens)]
        if extended:
            longest = max(extended, key=lambda session: len(session.tokens))
            return self._started(longest, ends[longest.id], tokens)
        fresh = Session(f"unnamed-{uuid.uuid4().hex[:12]}", named=False)
        return self._started(fresh, deepest([*ends.values(), *self._shared(fresh, tokens)]), tokens)

    def _restore_unnamed(self, unnamed: list[Session], tokens: np.ndarray) -> None:
        """Bring back the unnamed session from which most of a prompt can be had, if none in memory has as much."""
        shared = [(common_prefix(session.tokens, tokens), session) for session in unnamed]
        furthest = max((n for n, session in shared if not session.spilled), default=0)
        n, best = max(((n, s) for n, s in shared if s.spilled), default=(0, None), key=lambda found: found[0])
        if best is not None and n >= max(LEAST_SHARED, furthest + 1):
            self._restore(best)

    def _shared(self, session: Session, tokens: np.ndarray) -> Iterator[Start]:
        """States of other sessions from which the prompt can go on exactly."""
        for other in self._sessions.values():
            if other is not session:
                for start in _states(other, tokens):
                    if start is not None and start.exact and start.cached >= LEAST_SHARED:
                        yield start

    def _started(self, session: Session, start: Start | None, tokens: np.ndarray) -> Claim:
        now = time.time()
        cache, cached, source = self._store.new_cache(), 0, "none"
        own = start is not None and start.cache is session.cache
        if start is not None:
            cached, source = start.cached, start.kind
            cache = start.taken() if own and not self._store.can_checkpoint else start.forked()
            for checkpoint in self.checkpoints():
                if checkpoint.cache is start.cache:
                    checkpoint.last_used = now
        if session.cache is not None and self._store.can_checkpoint:
            self.checkpoint(session, "answer", session.tokens, session.cache)
        elif not session.turns:  # it began in other sessions, and may go back to where they went through
            passed = [c for c in self.checkpoints() if common_prefix(c.tokens, tokens[:cached]) == len(c.tokens)]
            session.checkpoints = passed[-MOST:]
        session.cache, session.tokens = None, _NOTHING
        session.running = True
        session.turns += 1
        session.last_used = now
        self._sessions[session.id] = session
        return Claim(session, cache, cached, source)


def _spilled(found: Stored) -> Session:
    return Session(found.id, found.named, found.tokens, turns=found.turns, last_used=found.last_used, stored=True)


def _states(session: Session, tokens: np.ndarray) -> list[Start | None]:
    """From where in a session a prompt can go on: where its last turn ended, and its checkpoints."""
    ended = start_at("session", session.tokens, session.cache, tokens)
    return [ended, *(start_at(c.kind, c.tokens, c.cache, tokens) for c in session.checkpoints)]
