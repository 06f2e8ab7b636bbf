"""Sessions that other servers on the same folder have written: found, and gone on with where they are further.

Everything here runs on the engine's thread.
"""

import numpy as np

from server.sessions.checkpoints import LEAST_SHARED, common_prefix
from server.sessions.disk import SessionDisk
from server.sessions.prefill_reasons import Losses
from server.sessions.session import Session

Sessions = dict[tuple[str, str], Session]
"""All sessions of a registry, by owner and id."""


class Handover:
    """Brings a registry's sessions up to what is in the folder. Sessions whose files others have
    removed go to `losses`."""

    def __init__(self, disk: SessionDisk, sessions: Sessions, losses: Losses) -> None:
        self._disk = disk
        self._sessions = sessions
        self._losses = losses

    def take_up(self, owner: str, name: str | None, prompt: np.ndarray) -> None:
        """Before a turn is claimed, find what others have written that may serve it: all of it now and then, and at
        once the session of this name and the files of sessions here that the prompt may go on with.
        """
        self._look_around()
        if name is not None and (owner, name) not in self._sessions:
            self._found(self._disk.find(owner, name))
        for session in list(self._sessions.values()):
            called = session.name is None if name is None else name in (session.name, session.id)
            if called and session.owner == owner and not session.running:
                shared = common_prefix(session.tokens, prompt)
                if name is not None or shared >= LEAST_SHARED:
                    self._compare(session, prompt, shared)

    def _look_around(self) -> None:
        if (news := self._disk.news()) is None:
            return
        for session in list(self._sessions.values()):
            if session.stored and not session.running and not self._disk.has(session):
                if session.spilled:
                    self._losses.add(session.key, session.tokens, "evicted")
                    del self._sessions[session.key]
                session.stored = False
        for found in news:
            known = self._sessions.get(found.key)
            if known is None:
                self._found(found)
            elif known.spilled and found.file != known.file:
                self._replace(known, found)

    def _found(self, session: Session | None) -> None:
        if session is not None:
            self._sessions[session.key] = session
            self._disk.count("found")

    def _compare(self, session: Session, prompt: np.ndarray, shared: int) -> None:
        """What is in memory stays where the file has no more of the prompt."""
        later = self._disk.later(session)
        if later is not None and (session.spilled or common_prefix(later.tokens, prompt) > shared):
            self._replace(session, later)

    def _replace(self, session: Session, later: Session) -> None:
        session.empty()
        self._sessions[later.key] = later
        self._disk.count("taken_up")
