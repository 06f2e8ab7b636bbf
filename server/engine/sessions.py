"""The sessions: whose conversation is cached how far, and which cached prefix a new turn continues.

Everything here runs on the engine's thread.
"""

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from turbocache import store


@dataclass(slots=True, eq=False)
class Session:
    """A conversation and its cache. `tokens` are exactly the tokens that went into `cache`; a running session's cache
    is with the generator and None here."""

    id: str
    named: bool
    tokens: list[int] = field(default_factory=list)
    cache: list[Any] | None = None
    running: bool = False
    turns: int = 0
    last_used: float = field(default_factory=time.time)

    def common_prefix(self, prompt: np.ndarray) -> int:
        """Number of leading tokens that the session and a prompt share."""
        n = min(len(self.tokens), len(prompt))
        differs = np.nonzero(np.asarray(self.tokens[:n]) != prompt[:n])[0]
        return int(differs[0]) if differs.size else n


@dataclass(frozen=True, slots=True)
class Claim:
    """A session handed to a request, with a cache that holds the first `cached` tokens of its prompt."""

    session: Session
    cache: list[Any]
    cached: int


class SessionRegistry:
    """All sessions of the process, by id. A turn claims one, and gives it back with what its cache then holds."""

    def __init__(self, new_cache: Callable[[], list[Any]]) -> None:
        self._new_cache = new_cache
        self._sessions: dict[str, Session] = {}

    def __iter__(self) -> Any:
        return iter(self._sessions.values())

    def claim(self, name: str | None, prompt: Sequence[int]) -> Claim | None:
        """The session for a prompt, running from now on, or None while the named one still runs another turn.

        A named session goes on from the longest prefix that it shares with the prompt. An unnamed prompt continues the
        unnamed session it extends; one that only shares a prefix gets a session of its own on the shared pages.
        """
        tokens = np.asarray(prompt)
        if name is None:
            return self._claim_unnamed(tokens)
        session = self._sessions.get(name)
        if session is None:
            session = Session(name, named=True)
        elif session.running:
            return None
        cache, cached = self._rewound(session, tokens)
        return self._started(session, cache, cached)

    def put_back(self, session: Session, cache: list[Any] | None, tokens: Sequence[int]) -> None:
        """A turn has ended and its cache holds `tokens`; a None cache (the turn failed) forgets the session."""
        session.running = False
        session.last_used = time.time()
        if cache is None or not tokens:
            self.forget(session)
            return
        session.cache, session.tokens = cache, list(tokens)

    def forget(self, session: Session) -> None:
        """Drop a session and its pages."""
        session.cache, session.tokens = None, []
        self._sessions.pop(session.id, None)

    def idle(self) -> list[Session]:
        """Sessions at rest, in the order in which they should be evicted: unnamed before named, oldest use first."""
        resting = [session for session in self._sessions.values() if not session.running]
        return sorted(resting, key=lambda session: (session.named, session.last_used))

    def _claim_unnamed(self, tokens: np.ndarray) -> Claim:
        best, shared = None, 0
        for session in self._sessions.values():
            if not session.named and not session.running and (n := session.common_prefix(tokens)) > shared:
                best, shared = session, n
        fresh = Session(f"unnamed-{uuid.uuid4().hex[:12]}", named=False)
        if best is None or best.cache is None:
            return self._started(fresh, self._new_cache(), 0)
        if shared == len(best.tokens) and shared < len(tokens):
            return self._started(best, best.cache, shared)
        cached = min(shared, len(tokens) - 1)
        if not cached or not store.can_trim_to(best.cache, cached, len(best.tokens)):
            return self._started(fresh, self._new_cache(), 0)
        cache = store.fork(best.cache)
        store.trim(cache, len(best.tokens) - cached)
        best.last_used = time.time()
        return self._started(fresh, cache, cached)

    def _rewound(self, session: Session, tokens: np.ndarray) -> tuple[list[Any], int]:
        # One token at least must be fed to the model to get the next one.
        cached = min(session.common_prefix(tokens), len(tokens) - 1)
        if session.cache is None or not cached or not store.can_trim_to(session.cache, cached, len(session.tokens)):
            return self._new_cache(), 0
        if cached < len(session.tokens):
            store.trim(session.cache, len(session.tokens) - cached)
        return session.cache, cached

    def _started(self, session: Session, cache: list[Any], cached: int) -> Claim:
        session.cache, session.tokens = None, []
        session.running = True
        session.turns += 1
        session.last_used = time.time()
        self._sessions[session.id] = session
        return Claim(session, cache, cached)
