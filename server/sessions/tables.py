"""What the process holds: all sessions, and all checkpoints."""

from collections.abc import Iterator

import numpy as np

from server.sessions.checkpoints import MOST, Checkpoint, added
from server.sessions.session import NOTHING, Session
from server.sessions.starts import Start, State, common_prefix


class SessionTable:
    """All sessions, by owner and id. Iterating over it is safe while it changes."""

    def __init__(self) -> None:
        self._sessions: dict[tuple[str, str], Session] = {}

    def __iter__(self) -> Iterator[Session]:
        return iter(list(self._sessions.values()))

    def find(self, owner: str, id: str) -> Session | None:
        return self._sessions.get((owner, id))

    def of(self, owner: str) -> list[Session]:
        return [session for session in self if session.owner == owner]

    def put(self, session: Session) -> None:
        """Add a session, or replace the one with the same owner and id."""
        self._sessions[session.key] = session

    def remove(self, session: Session) -> None:
        self._sessions.pop(session.key, None)


class Checkpoints:
    """All checkpoints. Each belongs to one or more sessions of one owner. Ends of system messages belong to the owner:
    all sessions that begin with the message share one, which outlives them. With a disk, `keep_shared`: restoring a
    session is faster than computing its system message again.
    """

    def __init__(self, sessions: SessionTable, *, can_go_back: bool, keep_shared: bool) -> None:
        self._sessions = sessions
        self._can_go_back = can_go_back
        self._keep_shared = keep_shared
        self._shared: dict[str, list[Checkpoint]] = {}

    def __iter__(self) -> Iterator[Checkpoint]:
        """Each once, least recently used first."""
        kept = dict.fromkeys(checkpoint for session in self._sessions for checkpoint in session.checkpoints)
        return iter(sorted(kept | dict.fromkeys(self.shared()), key=lambda checkpoint: checkpoint.last_used))

    def shared(self, owner: str | None = None) -> list[Checkpoint]:
        """Ends of system messages, of one owner or of all."""
        if owner is not None:
            return self._shared.get(owner, [])
        return [checkpoint for checkpoints in self._shared.values() for checkpoint in checkpoints]

    def states(self, session: Session) -> list[State]:
        """What a prompt of a session can start from: the session's states, then those of its owner's other sessions."""
        states = session.states() + [State(c.kind, c.tokens, c.cache, own=False) for c in self.shared(session.owner)]
        others = [other for other in self._sessions.of(session.owner) if other is not session]
        return states + [state for other in others for state in other.states(own=False)]

    def add(self, session: Session, new: Checkpoint) -> None:
        session.checkpoints = added(session.checkpoints, self.deduplicated(session.owner, new))

    def deduplicated(self, owner: str, new: Checkpoint) -> Checkpoint:
        """The checkpoint, or the owner's earlier one for the same system message."""
        if new.kind != "system":
            return new
        shared = self._shared.setdefault(owner, [])
        earlier = next((checkpoint for checkpoint in shared if np.array_equal(checkpoint.tokens, new.tokens)), None)
        if earlier is None:
            shared.append(new)
        return earlier or new

    def inherit(self, session: Session, start: Start) -> None:
        """Give a new session the checkpoints of its owner that lie on its cached prefix."""
        prefix = NOTHING if start.state is None else start.state.tokens[: start.cached]
        others = (other for other in self._sessions.of(session.owner) if other is not session)
        owned = {checkpoint for other in others for checkpoint in other.checkpoints} | {*self.shared(session.owner)}
        passed = [c for c in self if c in owned and common_prefix(c.tokens, prefix) == len(c.tokens)]
        session.checkpoints = passed[-MOST:]

    def note_use(self, session: Session, state: State | None, now: float) -> None:
        """A turn of the session starts from a state. The end of its system message counts as used, too."""
        for checkpoint in self:
            is_system = checkpoint.kind == "system" and checkpoint in session.checkpoints
            if is_system or (state is not None and checkpoint.cache is state.cache):
                checkpoint.last_used = now

    def drop(self, checkpoint: Checkpoint) -> None:
        """Remove a checkpoint from all sessions."""
        for owner, shared in self._shared.items():
            self._shared[owner] = [kept for kept in shared if kept is not checkpoint]
        for session in self._sessions:
            session.checkpoints = [kept for kept in session.checkpoints if kept is not checkpoint]

    def drop_all_of(self, session: Session) -> None:
        """Remove the checkpoints that only this session has."""
        elsewhere = {kept for other in self._sessions if other is not session for kept in other.checkpoints}
        for checkpoint in session.checkpoints:
            if checkpoint not in elsewhere:
                self.drop(checkpoint)

    def spare(self) -> list[Checkpoint]:
        """Those that no session needs, in the order in which to drop them: the newest of each session last."""
        needed = {kept for session in self._sessions for kept in session.needed(self._can_go_back)}
        if self._keep_shared:
            needed.update(self.shared())
        newest = {session.checkpoints[-1] for session in self._sessions if session.checkpoints}
        spare = [checkpoint for checkpoint in self if checkpoint not in needed]
        return sorted(spare, key=lambda checkpoint: checkpoint in newest)
