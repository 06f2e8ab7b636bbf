"""Takes over sessions that other servers have written to a shared folder."""

import numpy as np

from server.sessions.disk import SessionDisk
from server.sessions.prefill_reasons import Losses
from server.sessions.session import Session
from server.sessions.starts import LEAST_SHARED, common_prefix
from server.sessions.tables import SessionTable


class FolderSync:
    """Updates a table of sessions from the files in the folder. Sessions whose files others have removed go to
    `losses`.
    """

    def __init__(self, disk: SessionDisk, sessions: SessionTable, losses: Losses) -> None:
        self._disk = disk
        self._sessions = sessions
        self._losses = losses

    def before_turn(self, owner: str, name: str | None, prompt: np.ndarray) -> None:
        """Find files that may serve a turn. The whole folder is read once a second at most. The file of the named
        session, and the files of known sessions that the prompt may continue, are always read.
        """
        self._read_folder()
        if name is not None and self._sessions.find(owner, name) is None:
            self._add(self._disk.find(owner, name))
        for session in self._sessions.of(owner):
            named = session.name is None if name is None else name in (session.name, session.id)
            if named and not session.running:
                shared = common_prefix(session.tokens, prompt)
                if name is not None or shared >= LEAST_SHARED:
                    self._compare(session, prompt, shared)

    def _read_folder(self) -> None:
        if (changed := self._disk.news()) is None:
            return
        for session in self._sessions:
            if session.stored and not session.running and not self._disk.has(session):
                if session.spilled:
                    self._losses.add(session.key, session.tokens, "evicted")
                    self._sessions.remove(session)
                session.stored = False
        for session in changed:
            known = self._sessions.find(*session.key)
            if known is None:
                self._add(session)
            elif known.spilled and session.file != known.file:
                self._replace(known, session)

    def _add(self, session: Session | None) -> None:
        if session is not None:
            self._sessions.put(session)
            self._disk.count("found")

    def _compare(self, session: Session, prompt: np.ndarray, shared: int) -> None:
        """A session in memory is replaced only if the file shares more of the prompt."""
        later = self._disk.later(session)
        if later is not None and (session.spilled or common_prefix(later.tokens, prompt) > shared):
            self._replace(session, later)

    def _replace(self, session: Session, later: Session) -> None:
        session.empty()
        self._sessions.put(later)
        self._disk.count("taken_up")
