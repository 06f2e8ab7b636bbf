"""The sessions: whose conversation is cached how far, and which cached prefix a new turn continues.

Everything here runs on the engine's thread.
"""

import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from server.engine.checkpoints import MOST, Checkpoint, Kind, Start, added, common_prefix, deepest, start_at
from turbocache.store import CacheStore

LEAST_SHARED = 64
"""Tokens that sessions must have in common for one to start from the other's state."""
_NOTHING = np.zeros(0, dtype=np.int32)


@dataclass(slots=True, eq=False)
class Session:
    """A conversation and its cache. `tokens`, int32, are exactly the tokens that went into `cache`; a running session's
    cache is with the generator and None here. Checkpoints stay with the session whatever it does.
    """

    id: str
    named: bool
    tokens: np.ndarray = field(default_factory=lambda: _NOTHING)
    cache: list[Any] | None = None
    running: bool = False
    turns: int = 0
    last_used: float = field(default_factory=time.time)
    checkpoints: list[Checkpoint] = field(default_factory=list)


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

    def __init__(self, store: CacheStore) -> None:
        self._store = store
        self._sessions: dict[str, Session] = {}

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
        session = self._sessions.get(name) or Session(name, named=True)
        if session.running:
            return None
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
        session.cache, session.tokens = cache, np.asarray(tokens, dtype=np.int32)

    def forget(self, session: Session) -> None:
        """Drop a session with its checkpoints and its pages."""
        session.cache, session.tokens, session.checkpoints = None, _NOTHING, []
        self._sessions.pop(session.id, None)

    def idle(self) -> list[Session]:
        """Sessions at rest, in the order in which they should be evicted: unnamed before named, oldest use first."""
        resting = [session for session in self._sessions.values() if not session.running]
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
        ends = {session.id: start_at("session", session.tokens, session.cache, tokens) for session in unnamed}
        extended = [s for s in unnamed if (end := ends[s.id]) is not None and end.cached == len(s.tokens)]
        if extended:
            longest = max(extended, key=lambda session: len(session.tokens))
            return self._started(longest, ends[longest.id], tokens)
        fresh = Session(f"unnamed-{uuid.uuid4().hex[:12]}", named=False)
        return self._started(fresh, deepest([*ends.values(), *self._shared(fresh, tokens)]), tokens)

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


def _states(session: Session, tokens: np.ndarray) -> list[Start | None]:
    """From where in a session a prompt can go on: where its last turn ended, and its checkpoints."""
    ended = start_at("session", session.tokens, session.cache, tokens)
    return [ended, *(start_at(c.kind, c.tokens, c.cache, tokens) for c in session.checkpoints)]
