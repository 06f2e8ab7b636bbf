"""Sessions on disk: reading and writing their files, evicting files over the disk's budget, moving bad files aside.

Other servers may use the same folder. A server writes, replaces, moves or deletes a file only while it holds the file's
lease (`server.sessions.leases`). Reading needs no lease. If two servers continue the same session, the later turn wins,
whichever server writes first: a server that finds a later turn in the file keeps the file and forgets its own turn.
"""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, cast

from server.metrics import Metrics
from server.sessions.checkpoints import Checkpoint, Kind
from server.sessions.folder_snapshot import FolderSnapshot
from server.sessions.leases import Leases
from server.sessions.rank_folders import ABOUT, ForeignSessions
from server.sessions.session import Session
from turbocache.cache.pool import PoolExhausted
from turbocache.storage.session_codec import SessionFiles, State
from turbocache.storage.session_file import SUFFIX, SessionFileError, remove_partial
from turbocache.storage.whole_file import FileState, file_state, written

log = logging.getLogger(__name__)

_REFUSED = ".refused"
Saved = Literal["written", "failed", "leased", "superseded"]
"""Result of a write. `leased`: another server holds the file's lease. `superseded`: the file holds a later turn."""

Event = Literal["found", "taken_up", "leased", "superseded"]
"""Events between servers. `found`: a session of another server is new here. `taken_up`: another server has continued a
known session.
"""


class SessionDisk:
    """The files of sessions in one folder, mode 0700. File names are hashes of model and session.

    A file that can't be used is counted, moved aside and not read again. Raises OSError if the folder can't be used,
    and StartupError if its file system has no locks.
    """

    def __init__(
        self, folder: Path, budget: int, files: SessionFiles, metrics: Metrics, foreign: ForeignSessions | None = None
    ) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        self._folder = folder
        self._budget = budget
        self._files = files
        self._metrics = metrics
        self._held: Path | None = None
        self._leases = Leases(folder)
        self._snapshot = FolderSnapshot(folder)
        self._waiting: set[Path] = set()
        self.foreign = foreign or ForeignSessions([], "")
        metrics.session_disk_limit_bytes.set(budget)
        metrics.session_files_refused.labels(reason="other_group").inc(len(self.foreign.sessions))
        if left := remove_partial(folder, self._leases.taken):
            log.warning("removed %d incomplete session files in %s", left, folder)
        self._measure()

    def stored(self) -> Iterator[Session]:
        """The sessions of this model in the folder, from their manifests. Only `load` checks the arrays."""
        for path in self._paths():
            session = self._peek(path)
            if session is not None and path == self._path(session):
                yield session

    def find(self, owner: str, id: str) -> Session | None:
        """A session by its id, None if it has no file."""
        path = self._path(Session(id, owner=owner))
        return self._peek(path) if path.exists() else None

    def later(self, session: Session) -> Session | None:
        """The session in its file, if another server has written a later turn there."""
        path = self._path(session)
        if (state := file_state(path)) is None or state == session.file:
            return None
        if (found := self._peek(path, refuse=False)) is not None and found.last_used > session.last_used:
            return found
        session.file = state  # only its mtime changed, or it is damaged, which `load` will find
        return None

    def news(self) -> list[Session] | None:
        """The sessions in new and changed files. None if the folder is unchanged, or was read within a second."""
        if (changed := self._snapshot.changed()) is None:
            return None
        found = [(path, self._peek(path, refuse=False)) for path in changed]
        return [session for path, session in found if session is not None and path == self._path(session)]

    def save(self, session: Session) -> Saved:
        """Write a session that is not running, with its checkpoints. A failure is logged and counted."""
        if (outcome := self._write(session)) != "written":
            return outcome
        self._delete(self._too_many(self._path(session)))
        self._measure()
        return "written" if self.has(session) else "failed"

    def _write(self, session: Session) -> Saved:
        assert session.cache is not None
        start, path = time.perf_counter(), self._path(session)
        states = [State("session", session.tokens, session.cache)]
        states += [State(kept.kind, kept.tokens, kept.cache) for kept in session.checkpoints]
        about = {name: getattr(session, name) for name in ABOUT}
        try:
            with self._leases.taken(path.name) as mine:
                if not mine:
                    self._note_leased(path)
                    return "leased"
                if self.later(session) is not None:
                    self.count("superseded")
                    return "superseded"
                n_bytes = self._files.save(path, states, about)
                session.file = self._snapshot.record(path)
        except (OSError, TypeError) as error:
            log.error("a session of %d tokens could not be written to %s: %s", len(session.tokens), self._folder, error)
            self._metrics.spill_failures.labels(reason=type(error).__name__).inc()
            return "failed"
        self._waiting.discard(path)
        self._metrics.spills.inc()
        self._metrics.spilled_bytes.inc(n_bytes)
        self._metrics.spill_seconds.inc(time.perf_counter() - start)
        return "written"

    def _note_leased(self, path: Path) -> None:
        """Log and count a wait for another server, once until the file is written."""
        if path not in self._waiting:
            self._waiting.add(path)
            log.warning("a session is not written for now: another server holds the lease of its file, %s", path.name)
            self.count("leased")

    def count(self, event: Event) -> None:
        self._metrics.session_handovers.labels(event=event).inc()

    def load(self, session: Session) -> str | None:
        """Read a session's cache and checkpoints from its file. Moves a bad file aside, and returns the reason."""
        start, path = time.perf_counter(), self._path(session)
        state = file_state(path)
        try:
            own, *others = self._files.load(path)
            n_bytes = path.stat().st_size
            path.touch()
            session.file = self._snapshot.record(path)
        except SessionFileError as error:
            self._refuse(path, error, state)
            return str(error)
        except (OSError, PoolExhausted) as error:
            log.warning("a session could not be read back from %s: %s", path.name, error)
            self._metrics.restore_failures.labels(reason=type(error).__name__).inc()
            return None
        session.cache, session.tokens = list(own.cache), own.tokens
        session.checkpoints = [
            Checkpoint(cast(Kind, o.kind), o.tokens, list(o.cache), session.last_used) for o in others
        ]
        self._metrics.restores.inc()
        self._metrics.restored_bytes.inc(n_bytes)
        self._metrics.restore_seconds.inc(time.perf_counter() - start)
        return None

    @contextmanager
    def held(self, session: Session) -> Iterator[None]:
        """Protect a session's file from the disk's budget: it is about to be read, while other sessions are written."""
        self._held = self._path(session)
        try:
            yield
        finally:
            self._held = None

    def has(self, session: Session) -> bool:
        return self._path(session).exists()

    def missing(self, sessions: Sequence[Session]) -> list[Session]:
        """Those whose files are gone: evicted by the disk's budget, or deleted by a person."""
        return [session for session in sessions if not self.has(session)]

    def remove(self, session: Session) -> bool:
        """Delete a session's file, if there is one. Returns False if another server holds its lease."""
        path = self._path(session)
        with self._leases.taken(path.name) as mine:
            if mine:
                with suppress(OSError):
                    path.unlink(missing_ok=True)
        self._measure()
        return mine

    def close(self) -> None:
        self._leases.close()

    def _path(self, session: Session) -> Path:
        name = json.dumps([self._files.model, *session.key])
        return self._folder / f"{hashlib.sha256(name.encode()).hexdigest()[:40]}{SUFFIX}"

    def _paths(self) -> list[Path]:
        """Least recently used first."""
        return sorted(self._folder.glob(f"*{SUFFIX}"), key=written)

    def _peek(self, path: Path, refuse: bool = True) -> Session | None:
        state = self._snapshot.record(path)
        try:
            about, tokens = self._files.peek(path)
            return Session(tokens=tokens, stored=True, file=state, **{name: about[name] for name in ABOUT})
        except SessionFileError as error:
            if refuse and error.code != "other_model":  # it may belong to another server
                self._refuse(path, error, state)
        except OSError as error:  # another machine may have removed it
            log.warning("a session file could not be read: %s: %s", path.name, error)
        except (KeyError, TypeError) as error:
            if refuse:
                self._refuse(path, SessionFileError("corrupt", f"{path.name}: the manifest has no {error}"), state)
        return None

    def _refuse(self, path: Path, error: SessionFileError, read: FileState | None) -> None:
        """Move a file aside, unless its state is not `read` any more or another server holds its lease."""
        self._metrics.session_files_refused.labels(reason=error.code).inc()
        if error.code == "missing":
            return
        log.warning("a session file is refused (%s): %s; it is now %s", error.code, error, f"{path.name}{_REFUSED}")
        with suppress(OSError), self._leases.taken(path.name) as mine:
            if mine and file_state(path) == read:
                path.replace(path.with_name(f"{path.name}{_REFUSED}"))

    def _too_many(self, kept: Path) -> list[str]:
        """Names of the files to delete so that the rest fits the budget: refused ones, then the least recently used;
        `kept` last.
        """
        refused = sorted(self._folder.glob(f"*{SUFFIX}{_REFUSED}"), key=written)
        candidates = [*refused, *(path for path in self._paths() if path not in (kept, self._held)), kept]
        total, names = self._measure(), list[str]()
        for path in candidates:
            if total <= self._budget:
                break
            total -= _size(path)
            names.append(path.name)
        return names

    def _delete(self, names: Sequence[str]) -> None:
        for name in names:
            with suppress(OSError), self._leases.taken(name) as mine:
                if mine:
                    (self._folder / name).unlink()
                    self._metrics.session_files_dropped.inc()

    def _measure(self) -> int:
        total = sum(_size(path) for path in self._folder.glob(f"*{SUFFIX}*"))
        self._metrics.session_disk_bytes.set(total)
        with suppress(OSError):
            self._metrics.session_disk_free_bytes.set(shutil.disk_usage(self._folder).free)
        return total


def _size(path: Path) -> int:
    return (file_state(path) or (0, 0))[1]
