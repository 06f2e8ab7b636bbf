"""Changes to sessions beside their turns: clients delete, fork, save and restore them; unused ones leave memory."""

import time
from collections.abc import Callable
from typing import Any

from server.commands import ChangeSession
from server.engine.services import Services
from server.engine.stats import Stats
from server.errors import Conflict, InvalidRequest, SessionNotFound, SessionNotSaved
from server.sessions.session import Session
from server.sessions.starts import LEAST_SHARED
from turbocache.store import evaluate

_PAUSE = 20
"""After a write between steps, the next one waits this many times as long as the write took."""
_LOOK_SECONDS = 0.25


class SessionChanges:
    """Changes to sessions that are not running."""

    def __init__(self, services: Services, stats: Stats, make_room: Callable[[], object]) -> None:
        self._settings = services.settings
        self._metrics = services.metrics
        self._coordinator = services.coordinator
        self._disk = services.disk
        self._budget = services.budget
        self._registry = services.registry
        self._clock = services.clock
        self._stats = stats
        self._make_room = make_room
        self._next_write = 0.0

    def make(self, command: ChangeSession) -> dict[str, Any]:
        """Make a change that a client asks for. Returns the session's row afterwards. See `server.protocol.Engine`."""
        change, owner, id = command.change, command.owner, command.id
        session = self._registry.find(owner, id)
        if session is None or not (session.running or session.stored or session.cache):
            why = None if self._disk is None else self._disk.foreign.reason(owner, id)
            if why is not None and change == "restore":
                raise Conflict(f"The session's file is refused: {why}.", code="session_file_refused")
            raise SessionNotFound(id)
        if session.running:
            raise Conflict(
                "The session is answering. Please try again when it has.", code="session_running", retry_after=1
            )
        try:
            if change == "delete":
                self._registry.delete(session)
                return {"id": id, "object": "session.deleted", "deleted": True}
            if change == "fork":
                return self._stats.row(self._fork(session, command.new_id))
            return self._stats.row(self._save(session) if change == "save" else self._restore(session))
        finally:
            self._stats.refresh()

    def maintain(self) -> None:
        """While the engine is idle: evict one session that was unused for too long, or write one to disk."""
        now, limit = self._clock(), self._settings.session_ttl
        idle = sorted(self._registry.idle(), key=lambda session: session.last_used)
        for session in idle:
            if limit is not None and session.last_used < now - limit:
                if not self._registry.spill(session):
                    self._metrics.evictions.labels(reason="ttl").inc()
                self._stats.refresh()
                return
        self._save_idle(idle)

    def save_between_steps(self) -> None:
        """While requests run: write one unused session to disk, in at most a twentieth of the time."""
        now, began = self._clock(), time.monotonic()
        if self._disk is None or now < self._next_write:
            return
        pause = _LOOK_SECONDS
        if self._save_idle(sorted(self._registry.idle(), key=lambda session: session.last_used)):
            pause = _PAUSE * self._coordinator.largest(time.monotonic() - began)
        self._next_write = now + pause

    def close(self) -> None:
        """The engine stops: free the disk's leases."""
        if self._disk is not None:
            self._disk.close()

    def _save_idle(self, idle: list[Session]) -> bool:
        """Write one session that was unused for a while. Returns whether one was written or tried. Passes over sessions
        that another server is writing.
        """
        before = self._clock() - self._settings.session_save_after
        for session in idle if self._disk is not None else ():
            unsaved = not session.stored and len(session.tokens) >= LEAST_SHARED and not session.unsavable
            if unsaved and session.last_used < before and (self._registry.save(session) or session.unsavable):
                self._stats.refresh()
                return True
        return False

    def _fork(self, session: Session, new_id: str | None) -> Session:
        id = new_id or f"fork-{self._clock.name()}"
        if self._registry.find(session.owner, id) is not None:
            raise Conflict(f"There is a session '{id}' already.", param="id", code="session_exists")
        self._restore(session)
        other = self._registry.fork(session, id)
        assert other.cache is not None
        evaluate(other.cache)
        self._make_room()  # one of the two may have to go again
        return other

    def _save(self, session: Session) -> Session:
        if self._disk is None:
            raise InvalidRequest(
                "Sessions are kept in memory only: the server was started without TURBOCACHE_SESSION_DIR.",
                code="session_dir_not_set",
            )
        if not self._registry.save(session):
            raise SessionNotSaved("The session could not be written to disk. The server's log has the reason.")
        return self._registry.find(*session.key) or session  # another server's, if that is further

    def _restore(self, session: Session) -> Session:
        if not session.spilled:
            return session
        promise = f"restore-{self._clock.name()}"
        self._budget.promise(promise, len(session.tokens))
        try:
            self._budget.start(promise)
            refused = self._registry.restore(session, self._make_room)
        finally:
            self._budget.release(promise)
        if session.cache is None:
            if refused is None:
                raise SessionNotSaved("The session could not be read from disk. The server's log has the reason.")
            raise Conflict(f"The session's file is refused: {refused}.", code="session_file_refused")
        session.last_used = self._clock()
        session.running = True  # what has to go for it now is others, or checkpoints
        try:
            self._make_room()
        finally:
            session.running = False
        return session
