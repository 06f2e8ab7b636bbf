"""The sessions: whose conversation is cached how far, and which cached prefix a new turn continues.

Everything here runs on the engine's thread.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from server.errors import Conflict
from server.protocol import Prompt
from server.sessions.checkpoints import (
    LEAST_SHARED,
    MOST,
    Checkpoint,
    Kind,
    Start,
    added,
    common_prefix,
    deepest,
    start_at,
)
from server.sessions.clock import StepClock
from server.sessions.disk import SessionDisk
from server.sessions.handover import Handover
from server.sessions.prefill_reasons import Loss, Losses, Reason, reasons
from server.sessions.session import Session
from turbocache.store import CacheStore, fork

_WORTH_READING = 256
"""Tokens that a prompt must share with another session on disk for that to be brought back for its sake."""
_ALIKE = 16
"""Tokens in which different conversations may agree by chance behind their system message: what opens a message, and
its first words."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A session handed to a request, with a cache that holds the first `cached` tokens of its prompt. `source` says
    where that was found: `session` (where its last turn ended), the kind of a checkpoint, or `none`. `prefill` tells
    why the other tokens must be prefilled.
    """

    session: Session
    cache: list[Any]
    cached: int
    source: str
    prefill: dict[Reason, int]


class SessionRegistry:
    """All sessions of the process. A turn claims one, and gives it back with what its cache then holds."""

    def __init__(self, store: CacheStore, disk: SessionDisk | None = None, clock: StepClock | None = None) -> None:
        self._store = store
        self._disk = disk
        self._clock = StepClock() if clock is None else clock
        self._losses = Losses()
        self._beginnings: list[tuple[str, Checkpoint]] = []
        self._sessions: dict[tuple[str, str], Session] = {}
        for found in disk.stored() if disk is not None else ():
            self._sessions[found.key] = found
        for other in disk.others() if disk is not None else ():
            self._losses.add(other.key, other.tokens, "refused_file")
        self._handover = None if disk is None else Handover(disk, self._sessions, self._losses)

    def __iter__(self) -> Iterator[Session]:
        return iter(self._sessions.values())

    def find(self, owner: str, id: str) -> Session | None:
        """A session by its id, in memory or on disk."""
        if (session := self._sessions.get((owner, id))) is not None or self._disk is None:
            return session
        return self._disk.find(owner, id)

    # Turns.

    def claim(
        self,
        name: str | None,
        prompt: Prompt,
        owner: str = "",
        make_room: Callable[[], object] = lambda: None,
        *,
        passing: bool = False,
    ) -> Claim | None:
        """The session for a prompt, running from now on, or None while its conversation still runs another turn.

        Under a name the prompt continues the history that it shares most of, from its deepest state, or from another
        session's where that is deeper. A different history under the same name, or one that is asked for
        while the name's other history runs, gets a session of its own. An unnamed prompt continues the unnamed session
        that it extends; one that only shares a prefix gets a session of its own on the shared pages.

        One that is `passing` gets a session of its own, which is gone when the turn ends.

        `make_room` is called before a session comes back from disk.
        """
        tokens = np.asarray(prompt.tokens, dtype=np.int32)
        if self._handover is not None and not passing:
            self._handover.take_up(owner, name, tokens)
        if passing:
            session: Session | None = Session(f"unnamed-{self._clock.name()}", None, owner, passing=True)
        else:
            session = self._unnamed(owner, tokens) if name is None else self._named(owner, name, prompt, tokens)
        if session is None:
            return None
        own_on_disk = session.spilled and common_prefix(session.tokens, tokens) >= LEAST_SHARED
        session.running = True  # from here on nobody may take its place
        if own_on_disk:
            self.restore(session, make_room)
        start = self._deepest(session, tokens)
        if (other := self._deeper_on_disk(session, tokens, 0 if start is None else start.cached)) is not None:
            self.restore(other, make_room)
            start = self._deepest(session, tokens)
        return self._started(session, start, prompt, tokens)

    def checkpoint(self, session: Session, kind: Kind, tokens: Sequence[int] | np.ndarray, cache: list[Any]) -> None:
        """Keep a cache of its own, which holds `tokens`, for later turns to go back to. One at the end of a system
        message serves all sessions of the owner that begin with it, also when this one has gone.
        """
        kept = Checkpoint(kind, np.asarray(tokens, dtype=np.int32), cache, self._clock())
        session.checkpoints = added(session.checkpoints, self._beginning(session.owner, kept))

    def _beginning(self, owner: str, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint itself, or the one that the owner's sessions have for the same system message already."""
        if checkpoint.kind != "system":
            return checkpoint
        for of, known in self._beginnings:
            if of == owner and np.array_equal(known.tokens, checkpoint.tokens):
                return known
        self._beginnings.append((owner, checkpoint))
        return checkpoint

    def put_back(self, session: Session, cache: list[Any] | None, tokens: Sequence[int]) -> None:
        """A turn has ended and its cache holds `tokens`; a None cache (the turn failed) forgets the session."""
        session.running = False
        session.last_used = self._clock()
        if cache is None or not tokens or session.passing:
            self.forget(session, "failed" if cache is None and not session.passing else None)
            return
        session.cache, session.tokens = cache, np.asarray(tokens, dtype=np.int32)
        session.stored = session.unsavable = False

    def give_back(self, claim: Claim, prompt: Sequence[int]) -> None:
        """The turn for this prompt does not begin after all."""
        self.put_back(claim.session, claim.cache, prompt[: claim.cached])

    # What becomes of sessions at rest.

    def forget(self, session: Session, why: Loss | None = None) -> None:
        """Drop a session with its checkpoints and its pages. What the disk has of it stays. `why` it was lost, if it
        was, is remembered.
        """
        if why is not None:
            self._losses.add(session.key, session.tokens, why)
        session.empty()
        self._sessions.pop(session.key, None)
        if self._disk is not None and (found := self._disk.find(*session.key)) is not None:
            self._sessions[found.key] = found

    def delete(self, session: Session) -> None:
        """Drop a session, and what the disk has of it. Raises Conflict, and drops nothing, while another server is at
        its file.
        """
        if self._disk is not None and not self._disk.remove(session):
            raise Conflict(
                "Another server is writing the session. Please try again.", code="session_leased", retry_after=1
            )
        others = {id(kept) for other in self if other is not session for kept in other.checkpoints}
        for kept in session.checkpoints:
            if id(kept) not in others:
                self.drop(kept)
        self.forget(session)
        self._losses.forget(session.key)

    def spill(self, session: Session) -> bool:
        """Leave a session at rest to the disk; without a disk, or if that fails, forget it. Whether the disk has it."""
        if len(session.tokens) >= LEAST_SHARED and self.save(session):
            session.cache, session.checkpoints = None, []
            return True
        self.forget(session, "evicted")
        return False

    def save(self, session: Session) -> bool:
        """Write a session at rest to disk, with its checkpoints. Whether the disk has it, or another server's later
        turn of it, which then takes its place.
        """
        if self._disk is None or session.cache is None:
            return session.stored
        if not session.stored:
            saved = self._disk.save(session)
            session.stored, session.unsavable = saved == "written", saved == "failed"
            if saved == "superseded":
                self.forget(session)
                return True
            for other in self._disk.missing([other for other in self if other.stored]):
                if other.stored:
                    gone, other.stored = other.spilled, False
                    if gone:
                        self.forget(other, "evicted")
        return session.stored

    def restore(self, session: Session, make_room: Callable[[], object]) -> str | None:
        """Bring a session back from disk, or forget it; then returns why its file was refused, if it was."""
        assert self._disk is not None
        self._sessions[session.key] = session
        was_running, session.running = session.running, True  # nobody may take its place
        try:
            with self._disk.held(session):
                make_room()
                refused = self._disk.load(session)
        finally:
            session.running = was_running
        if session.cache is None:
            self.forget(session, "evicted" if refused is None else "refused_file")
        session.checkpoints = [self._beginning(session.owner, kept) for kept in session.checkpoints]
        return refused

    def fork(self, session: Session, id: str) -> Session:
        """A second session in the state of one at rest, under a name of its own; pages are shared."""
        assert session.cache is not None
        other = Session(id, id, session.owner, True, session.tokens, session.asked, fork(session.cache))
        other.turns, other.checkpoints = session.turns, list(session.checkpoints)
        other.last_used = self._clock()
        self._sessions[other.key] = other
        return other

    def idle(self) -> list[Session]:
        """Sessions at rest in memory, in the order in which they should go: those to keep last, oldest use first."""
        resting = [session for session in self if session.cache is not None and not session.running]
        return sorted(resting, key=lambda session: (session.keep, session.last_used))

    def next_to_go(self, before: float | None = None) -> Session | Checkpoint | None:
        """What of all that rests should leave memory next, when no checkpoint is spare. None if there is nothing, or
        only sessions to keep that were used after `before`.
        """
        going: list[tuple[bool, float, Session | Checkpoint]] = [(s.keep, s.last_used, s) for s in self.idle()]
        if self._disk is not None:
            going += [(True, kept.last_used, kept) for _, kept in self._beginnings]
        allowed = [item for item in going if before is None or not item[0] or item[1] <= before]
        return min(allowed, key=lambda item: item[:2])[2] if allowed else None

    def checkpoints(self) -> list[Checkpoint]:
        """All checkpoints, each once, longest unused first."""
        kept = {id(c): c for session in self for c in session.checkpoints}
        kept |= {id(c): c for _, c in self._beginnings}
        return sorted(kept.values(), key=lambda checkpoint: checkpoint.last_used)

    def spare_checkpoints(self) -> list[Checkpoint]:
        """Those that no session needs, in the order in which they should go: their session's newest last. Where there
        is a disk, from which sessions come back sooner than a system message is read again, those at the end of system
        messages are none.
        """
        needed = {id(kept) for session in self for kept in session.needed(self._store.can_go_back)}
        if self._disk is not None:
            needed |= {id(kept) for _, kept in self._beginnings}
        newest = {id(session.checkpoints[-1]) for session in self if session.checkpoints}
        spare = [checkpoint for checkpoint in self.checkpoints() if id(checkpoint) not in needed]
        return sorted(spare, key=lambda checkpoint: id(checkpoint) in newest)

    def drop(self, checkpoint: Checkpoint) -> None:
        """Forget a checkpoint, whichever sessions have it."""
        self._beginnings = [(owner, kept) for owner, kept in self._beginnings if kept is not checkpoint]
        for session in self:
            session.checkpoints = [kept for kept in session.checkpoints if kept is not checkpoint]

    def caches(self) -> list[list[Any]]:
        """Every cache that rests: sessions' and checkpoints'."""
        resting = [session.cache for session in self if session.cache is not None]
        return [*resting, *(checkpoint.cache for checkpoint in self.checkpoints())]

    # Which session a prompt continues.

    def _named(self, owner: str, name: str, prompt: Prompt, tokens: np.ndarray) -> Session | None:
        family = [s for s in self if s.owner == owner and name in (s.name, s.id)]
        shared = {session.id: common_prefix(session.tokens, tokens) for session in family}
        if any(session.running and shared[session.id] >= session.asked for session in family):
            return None
        resting = [session for session in family if not session.running]
        best = max(resting, key=lambda session: (shared[session.id], session.last_used), default=None)
        if best is not None:
            apart = max(LEAST_SHARED, prompt.system_end) + _ALIKE
            goes_on = shared[best.id] >= best.asked
            if goes_on or shared[best.id] > apart or len(best.tokens) < LEAST_SHARED:
                best.keep = best.keep or goes_on
                return best
        if (owner, name) in self._sessions:
            return Session(f"{name}~{self._clock.name()[:8]}", name, owner)
        return Session(name, name, owner, keep=True)

    def _unnamed(self, owner: str, tokens: np.ndarray) -> Session:
        """The longest unnamed session that the prompt extends, or a fresh one."""
        extended = [
            s
            for s in self
            if s.name is None and s.owner == owner and not s.running
            if s.spilled or ((end := start_at("session", s.tokens, s.cache, tokens)) and end.cached == len(s.tokens))
            if common_prefix(s.tokens, tokens) == len(s.tokens) < len(tokens)
        ]
        fresh = Session(f"unnamed-{self._clock.name()}", None, owner)
        return max(extended, key=lambda session: len(session.tokens), default=fresh)

    def _deepest(self, session: Session, tokens: np.ndarray) -> Start | None:
        """From where the prompt goes on: a state of its session, of another of the owner's sessions, or the end of a
        system message.
        """
        theirs = [start_at(c.kind, c.tokens, c.cache, tokens) for of, c in self._beginnings if of == session.owner]
        for other in self:
            if other is not session and other.owner == session.owner:
                theirs += other.states(tokens)
        shared = [start for start in theirs if start is not None and start.cached >= LEAST_SHARED]
        return deepest([*session.states(tokens), *shared])

    def _deeper_on_disk(self, session: Session, tokens: np.ndarray, cached: int) -> Session | None:
        """The session on disk of which a prompt shares most, if that is worth bringing it back: much more than what is
        in memory, and a good part of what has to be read.
        """
        ring = self._store.spec.ring
        on_disk = [
            (common_prefix(other.tokens, tokens), other)
            for other in self
            if other.owner == session.owner and other.spilled and self._store.can_go_back
            if ring.max_size is None or len(other.tokens) <= ring.max_size  # else there is no going back either
        ]
        n, best = max(on_disk, key=lambda found: found[0], default=(0, None))
        worth = best is not None and n >= max(cached + LEAST_SHARED, _WORTH_READING, len(best.tokens) // 4)
        return best if worth else None

    def _started(self, session: Session, start: Start | None, prompt: Prompt, tokens: np.ndarray) -> Claim:
        now = self._clock()
        why = self._reasons(session, start, tokens)
        cache, cached, source = self._store.new_cache(), 0, "none"
        own = start is not None and start.cache is session.cache
        if start is not None:
            cached, source = start.cached, start.kind
            cache = start.taken() if own and not self._store.can_checkpoint else start.forked()
        for checkpoint in self.checkpoints():
            of_session = checkpoint.kind == "system" and checkpoint in session.checkpoints
            if of_session or (start is not None and checkpoint.cache is start.cache):
                checkpoint.last_used = now
        if session.cache is not None and self._store.can_checkpoint:
            self.checkpoint(session, "answer", session.tokens, session.cache)
        elif not session.turns:  # it began in other sessions, and may go back to where they went through
            theirs = {id(c) for other in self if other.owner == session.owner for c in other.checkpoints}
            theirs |= {id(c) for owner, c in self._beginnings if owner == session.owner}
            known = [c for c in self.checkpoints() if id(c) in theirs]
            passed = [c for c in known if common_prefix(c.tokens, tokens[:cached]) == len(c.tokens)]
            session.checkpoints = passed[-MOST:]
        session.cache, session.tokens, session.asked = None, tokens, prompt.messages_end or len(tokens)
        session.turns += 1
        session.last_used = now
        self._sessions[session.key] = session
        self._losses.forget(session.key)
        return Claim(session, cache, cached, source, why)

    def _reasons(self, session: Session, start: Start | None, tokens: np.ndarray) -> dict[Reason, int]:
        cached = 0 if start is None else start.cached
        if len(session.tokens):
            known = common_prefix(session.tokens, tokens)
            return reasons(len(tokens), cached, known, len(session.tokens), "rotated" if session.rotated else "edited")
        known, why = self._losses.find(session.owner, tokens)
        return reasons(len(tokens), cached, known, known, why)
