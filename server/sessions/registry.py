"""All sessions, and which cached prefix a new turn continues."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from server.errors import Conflict
from server.protocol import Prompt
from server.sessions.checkpoints import Checkpoint, Kind
from server.sessions.clock import StepClock
from server.sessions.disk import SessionDisk
from server.sessions.folder_sync import FolderSync
from server.sessions.prefill_reasons import Loss, Losses, Reason, reasons
from server.sessions.session import Session
from server.sessions.starts import LEAST_SHARED, Start, choose_start, common_prefix
from server.sessions.tables import Checkpoints, SessionTable
from turbocache.mlxlm.prompt_cache import PromptCache
from turbocache.store import CacheStore, fork

_MIN_RESTORE = 256
"""Tokens that a prompt must share with another session on disk before that session is restored for it."""
_CHANCE = 16
"""Different conversations may share this many tokens by chance after their system message: the opening of a message
and its first words.
"""


@dataclass(frozen=True, slots=True)
class Claim:
    """A session for one turn, with a cache of a prefix of its prompt."""

    session: Session
    cache: PromptCache
    cached: int
    """Number of the prompt's leading tokens in the cache."""
    source: str
    """Where the prefix was cached: `session` (the end of its last turn), the kind of a checkpoint, or `none`."""
    prefill: dict[Reason, int]
    """Number of the other tokens, by the reason why they are prefilled."""


class SessionRegistry:
    """All sessions of the process. A turn claims one, and puts it back with its new cache."""

    def __init__(self, store: CacheStore, disk: SessionDisk | None = None, clock: StepClock | None = None) -> None:
        self._store = store
        self._disk = disk
        self._clock = StepClock() if clock is None else clock
        self._losses = Losses()
        self._sessions = SessionTable()
        self.checkpoints = Checkpoints(self._sessions, can_go_back=store.can_go_back, keep_shared=disk is not None)
        self._sync = None if disk is None else FolderSync(disk, self._sessions, self._losses)
        for session in disk.stored() if disk is not None else ():
            self._sessions.put(session)
        for foreign in disk.foreign.sessions.values() if disk is not None else ():
            self._losses.add(foreign.key, foreign.tokens, "refused_file")

    def __iter__(self) -> Iterator[Session]:
        return iter(self._sessions)

    def find(self, owner: str, id: str) -> Session | None:
        """A session by its id, in memory or on disk."""
        if (session := self._sessions.find(owner, id)) is not None or self._disk is None:
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
        """The session for a prompt, which is running from now on. None while its conversation runs another turn.

        A named prompt continues the history of that name that shares most with it. It starts from the deepest state of
        that history, or of another session if that is deeper. It gets a new session if no history shares enough, or if
        the history runs another turn that the prompt does not continue.

        An unnamed prompt continues the unnamed session that it extends. If it only shares a prefix, it gets a new
        session that shares the pages.

        A `passing` turn gets a new session, which is removed when the turn ends.

        `make_room` is called before a session is restored from disk.
        """
        tokens = np.asarray(prompt.tokens, dtype=np.int32)
        if self._sync is not None and not passing:
            self._sync.before_turn(owner, name, tokens)
        if passing:
            session: Session | None = Session(f"unnamed-{self._clock.name()}", None, owner, passing=True)
        else:
            session = self._unnamed(owner, tokens) if name is None else self._named(owner, name, prompt, tokens)
        if session is None:
            return None
        shares_on_disk = session.spilled and common_prefix(session.tokens, tokens) >= LEAST_SHARED
        session.running = True  # so that it is not evicted
        if shares_on_disk:
            self.restore(session, make_room)
        start = choose_start(tokens, self.checkpoints.states(session))
        if (other := self._deeper_on_disk(session, tokens, start.cached)) is not None:
            self.restore(other, make_room)
            start = choose_start(tokens, self.checkpoints.states(session))
        return self._begin(session, start, prompt, tokens)

    def checkpoint(self, session: Session, kind: Kind, tokens: Sequence[int] | np.ndarray, cache: PromptCache) -> None:
        """Add a checkpoint to a session. `cache` holds exactly `tokens` and is not changed afterwards."""
        self.checkpoints.add(session, Checkpoint(kind, np.asarray(tokens, dtype=np.int32), cache, self._clock()))

    def put_back(self, session: Session, cache: PromptCache | None, tokens: Sequence[int]) -> None:
        """A turn has ended, and its cache holds `tokens`. If the cache is None, the turn has failed and the session is
        forgotten.
        """
        session.running = False
        session.last_used = self._clock()
        if cache is None or not tokens or session.passing:
            self.forget(session, "failed" if cache is None and not session.passing else None)
            return
        session.cache, session.tokens = cache, np.asarray(tokens, dtype=np.int32)
        session.stored = session.unsavable = False

    def give_back(self, claim: Claim, prompt: Sequence[int]) -> None:
        """The turn for this prompt does not begin. The session keeps the cached prefix."""
        self.put_back(claim.session, claim.cache, prompt[: claim.cached])

    # Sessions that are not running.

    def forget(self, session: Session, why: Loss | None = None) -> None:
        """Drop a session from memory, with its checkpoints. Its file stays. `why` records it as lost."""
        if why is not None:
            self._losses.add(session.key, session.tokens, why)
        session.empty()
        self._sessions.remove(session)
        if self._disk is not None and (stored := self._disk.find(*session.key)) is not None:
            self._sessions.put(stored)

    def delete(self, session: Session) -> None:
        """Drop a session and its file. Raises Conflict, and drops nothing, while another server writes the file."""
        if self._disk is not None and not self._disk.remove(session):
            raise Conflict(
                "Another server is writing the session. Please try again.", code="session_leased", retry_after=1
            )
        self.checkpoints.drop_all_of(session)
        self.forget(session)
        self._losses.forget(session.key)

    def spill(self, session: Session) -> bool:
        """Move a session to disk, or forget it if that is not possible. Returns whether it is on disk."""
        if len(session.tokens) >= LEAST_SHARED and self.save(session):
            session.cache, session.checkpoints = None, []
            return True
        self.forget(session, "evicted")
        return False

    def save(self, session: Session) -> bool:
        """Write a session to disk, with its checkpoints. Returns whether it is on disk. A later turn of another server
        in the file is kept, and replaces the session.
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
        """Read a session from disk. If that fails, forget it and return why its file was refused, if it was."""
        assert self._disk is not None
        self._sessions.put(session)
        was_running, session.running = session.running, True  # so that it is not evicted
        try:
            with self._disk.held(session):
                make_room()
                refused = self._disk.load(session)
        finally:
            session.running = was_running
        if session.cache is None:
            self.forget(session, "evicted" if refused is None else "refused_file")
        session.checkpoints = [self.checkpoints.deduplicated(session.owner, c) for c in session.checkpoints]
        return refused

    def fork(self, session: Session, id: str) -> Session:
        """A copy of a session under another id. Pages are shared."""
        assert session.cache is not None
        other = Session(id, id, session.owner, True, session.tokens, session.asked, fork(session.cache))
        other.turns, other.checkpoints = session.turns, list(session.checkpoints)
        other.last_used = self._clock()
        self._sessions.put(other)
        return other

    def idle(self) -> list[Session]:
        """Sessions in memory that are not running, in the order of eviction: `keep` last, least recently used first."""
        idle = [session for session in self if session.cache is not None and not session.running]
        return sorted(idle, key=lambda session: (session.keep, session.last_used))

    def next_to_go(self, before: float | None = None) -> Session | Checkpoint | None:
        """The next session, or end of a system message, to evict once no checkpoint is spare. None if there is none, or
        only sessions to keep that were used after `before`.
        """
        items: list[tuple[bool, float, Session | Checkpoint]] = [(s.keep, s.last_used, s) for s in self.idle()]
        if self._disk is not None:
            items += [(True, shared.last_used, shared) for shared in self.checkpoints.shared()]
        allowed = [item for item in items if before is None or not item[0] or item[1] <= before]
        return min(allowed, key=lambda item: item[:2])[2] if allowed else None

    def caches(self) -> list[PromptCache]:
        """The caches of idle sessions and of all checkpoints."""
        idle = [session.cache for session in self if session.cache is not None]
        return [*idle, *(checkpoint.cache for checkpoint in self.checkpoints)]

    # Which session a prompt continues.

    def _named(self, owner: str, name: str, prompt: Prompt, tokens: np.ndarray) -> Session | None:
        """The history of a name that a prompt continues, or a new session. None while it runs another turn."""
        family = [session for session in self._sessions.of(owner) if name in (session.name, session.id)]
        shared = {session.id: common_prefix(session.tokens, tokens) for session in family}
        if any(session.running and shared[session.id] >= session.asked for session in family):
            return None
        idle = [session for session in family if not session.running]
        best = max(idle, key=lambda session: (shared[session.id], session.last_used), default=None)
        if best is not None:
            by_chance = max(LEAST_SHARED, prompt.system_end) + _CHANCE
            continues = shared[best.id] >= best.asked
            if continues or shared[best.id] > by_chance or len(best.tokens) < LEAST_SHARED:
                best.keep = best.keep or continues
                return best
        if self._sessions.find(owner, name) is not None:
            return Session(f"{name}~{self._clock.name()[:8]}", name, owner)
        return Session(name, name, owner, keep=True)

    def _unnamed(self, owner: str, tokens: np.ndarray) -> Session:
        """The longest unnamed session that the prompt extends, or a new one."""
        unnamed = [session for session in self._sessions.of(owner) if session.name is None and not session.running]
        extended = [s for s in unnamed if 0 < len(s.tokens) == common_prefix(s.tokens, tokens) < len(tokens)]
        new = Session(f"unnamed-{self._clock.name()}", None, owner)
        return max(extended, key=lambda session: len(session.tokens), default=new)

    def _deeper_on_disk(self, session: Session, tokens: np.ndarray, cached: int) -> Session | None:
        """The session on disk that shares most with a prompt, if restoring it is worth the time: it must share much
        more than the state in memory does, and a good part of its file must be of use.
        """
        if not self._store.can_go_back:
            return None
        longest = self._store.spec.ring.max_size  # a longer session has rotated, and can't go back either
        on_disk = [
            (common_prefix(other.tokens, tokens), other)
            for other in self._sessions.of(session.owner)
            if other.spilled and (longest is None or len(other.tokens) <= longest)
        ]
        n, best = max(on_disk, key=lambda item: item[0], default=(0, None))
        worth = best is not None and n >= max(cached + LEAST_SHARED, _MIN_RESTORE, len(best.tokens) // 4)
        return best if worth else None

    # Begin a turn.

    def _begin(self, session: Session, start: Start, prompt: Prompt, tokens: np.ndarray) -> Claim:
        now = self._clock()
        prefill = self._prefill_reasons(session, start.cached, tokens)
        cache = self._cache_of(session, start)
        self.checkpoints.note_use(session, start.state, now)
        if session.cache is not None and self._store.can_checkpoint:
            self.checkpoint(session, "answer", session.tokens, session.cache)
        elif not session.turns:
            self.checkpoints.inherit(session, start)
        session.cache, session.tokens, session.asked = None, tokens, prompt.messages_end or len(tokens)
        session.turns, session.last_used = session.turns + 1, now
        self._sessions.put(session)
        self._losses.forget(session.key)
        return Claim(session, cache, start.cached, start.kind, prefill)

    def _cache_of(self, session: Session, start: Start) -> PromptCache:
        if start.state is None:
            return self._store.new_cache()
        own = start.state.cache is session.cache
        return start.take(fork=not own or self._store.can_checkpoint)

    def _prefill_reasons(self, session: Session, cached: int, tokens: np.ndarray) -> dict[Reason, int]:
        if history := len(session.tokens):
            matched = common_prefix(session.tokens, tokens)
            return reasons(len(tokens), cached, matched, history, "rotated" if session.rotated else "edited")
        matched, lost_for = self._losses.find(session.owner, tokens)
        return reasons(len(tokens), cached, matched, matched, lost_for)
