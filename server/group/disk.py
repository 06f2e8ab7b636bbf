"""Sessions on the disks of a group: each rank has files of its own share, and a session is there if all of them are.

What one rank's disk does, a write that fails or a file that somebody has deleted, decides for all, so that they go on
alike. All methods are collective.
"""

import json
import logging
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from server.metrics import Metrics
from server.sessions.disk import Saved, SessionDisk
from server.sessions.other_groups import OtherGroups
from server.sessions.session import Session
from turbocache.mlxlm.group import Group
from turbocache.storage.session_codec import SessionFiles

log = logging.getLogger(__name__)


class GroupDisk(SessionDisk):
    """A `SessionDisk` whose outcomes are the same on all ranks. The group's folders are its own: what another group
    writes there meanwhile is not looked for.
    """

    def __init__(
        self, folder: Path, budget: int, files: SessionFiles, metrics: Metrics, others: OtherGroups, group: Group
    ) -> None:
        super().__init__(folder, budget, files, metrics, others)
        self._group = group

    def stored(self) -> Iterator[Session]:
        """The sessions of which every rank has the same turn."""
        here = {_version(found).decode(): found for found in super().stored()}
        everywhere = set[str](here)
        for versions in self._group.gather(json.dumps(sorted(here)).encode()):
            everywhere &= set(json.loads(versions))
        if torn := len(here) - len(everywhere):
            log.warning("%d sessions are not on the disks of all ranks with the same turn, and will be read anew", torn)
        yield from sorted((here[version] for version in everywhere), key=lambda found: (found.last_used, found.key))

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
        told = json.dumps([loaded, why, _turn(session) if loaded else None]).encode()
        answers = [json.loads(answer) for answer in self._group.gather(told)]
        if all(answer[0] for answer in answers) and len({answer[2] for answer in answers}) == 1:
            return None
        session.cache, session.checkpoints = None, []
        for rank, (_, reason, _) in enumerate(answers):
            if reason is not None:
                return f"rank {rank}: {reason}"
        return "the ranks' files are of different turns" if all(answer[0] for answer in answers) else None

    def missing(self, sessions: Sequence[Session]) -> list[Session]:
        gone = bytes(not self.has(session) for session in sessions)
        rows = self._group.gather(gone)
        return [session for i, session in enumerate(sessions) if any(row[i] for row in rows)]

    def remove(self, session: Session) -> bool:
        return self._group.agree(super().remove(session))

    def _agreed(self, found: Session | None) -> Session | None:
        versions = self._group.gather(b"" if found is None else _version(found))
        return found if versions[0] and all(version == versions[0] for version in versions) else None


def _version(found: Session) -> bytes:
    """What tells one turn of a session from any other."""
    return json.dumps([*found.key, found.last_used, found.turns, _crc(found)]).encode()


def _turn(session: Session) -> str:
    """What tells what was loaded of a session from what was loaded elsewhere."""
    held = [session.tokens, *(kept.tokens for kept in session.checkpoints)]
    return " ".join(f"{zlib.crc32(tokens.tobytes()):x}" for tokens in held)


def _crc(session: Session) -> int:
    return zlib.crc32(session.tokens.tobytes())
