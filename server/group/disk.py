"""Sessions on the disks of a group. Each rank writes its own share, and a session exists if all ranks have theirs.

A failed write or a deleted file on one rank counts for all ranks, so that all stay alike. All methods are collective.
"""

import json
import logging
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from server.metrics import Metrics
from server.sessions.disk import Saved, SessionDisk
from server.sessions.rank_folders import ForeignSessions
from server.sessions.session import Session
from turbocache.mlxlm.group import Group
from turbocache.storage.session_codec import SessionFiles

log = logging.getLogger(__name__)


class GroupDisk(SessionDisk):
    """A `SessionDisk` with the same results on all ranks. No other group may use its folders at the same time."""

    def __init__(
        self, folder: Path, budget: int, files: SessionFiles, metrics: Metrics, foreign: ForeignSessions, group: Group
    ) -> None:
        super().__init__(folder, budget, files, metrics, foreign)
        self._group = group

    def stored(self) -> Iterator[Session]:
        """The sessions that every rank has with the same turn."""
        here = {_version(session).decode(): session for session in super().stored()}
        everywhere = set[str](here)
        for versions in self._group.gather(json.dumps(sorted(here)).encode()):
            everywhere &= set(json.loads(versions))
        if torn := len(here) - len(everywhere):
            log.warning("%d sessions have no common turn on the disks of all ranks: they are prefilled again", torn)
        yield from sorted(
            (here[version] for version in everywhere), key=lambda session: (session.last_used, session.key)
        )

    def find(self, owner: str, id: str) -> Session | None:
        return self._agreed(super().find(owner, id))

    def later(self, session: Session) -> Session | None:
        return None

    def news(self) -> list[Session] | None:
        return None

    def save(self, session: Session) -> Saved:
        outcomes = self._group.gather(self._write(session).encode())
        worst = next((outcome for outcome in outcomes if outcome != b"written"), b"written")
        names = self._group.share(json.dumps(self._too_many(self._path(session))).encode())
        self._delete(json.loads(names))
        self._measure()
        if worst == b"written":
            return "failed" if self.missing([session]) else "written"
        return "leased" if worst == b"leased" else "failed"

    def load(self, session: Session) -> str | None:
        why = super().load(session)
        loaded = session.cache is not None
        own = json.dumps([loaded, why, _turn(session) if loaded else None]).encode()
        answers = [json.loads(answer) for answer in self._group.gather(own)]
        if all(answer[0] for answer in answers) and len({answer[2] for answer in answers}) == 1:
            return None
        session.cache, session.checkpoints = None, []
        for rank, (_, reason, _) in enumerate(answers):
            if reason is not None:
                return f"rank {rank}: {reason}"
        return "the ranks' files are of different turns" if all(answer[0] for answer in answers) else None

    def missing(self, sessions: Sequence[Session]) -> list[Session]:
        missing = bytes(not self.has(session) for session in sessions)
        rows = self._group.gather(missing)
        return [session for i, session in enumerate(sessions) if any(row[i] for row in rows)]

    def remove(self, session: Session) -> bool:
        return self._group.agree(super().remove(session))

    def _agreed(self, session: Session | None) -> Session | None:
        versions = self._group.gather(b"" if session is None else _version(session))
        return session if versions[0] and all(version == versions[0] for version in versions) else None


def _version(session: Session) -> bytes:
    """Identifies one turn of a session."""
    return json.dumps([*session.key, session.last_used, session.turns, zlib.crc32(session.tokens.tobytes())]).encode()


def _turn(session: Session) -> str:
    """Identifies what was loaded of a session: its tokens and its checkpoints."""
    held = [session.tokens, *(kept.tokens for kept in session.checkpoints)]
    return " ".join(f"{zlib.crc32(tokens.tobytes()):x}" for tokens in held)
