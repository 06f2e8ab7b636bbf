"""Sessions on disk: which files there are, which go when the disk's budget is full, and what is moved aside.

Everything here runs on the engine's thread.
"""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import cast

from server.engine.checkpoints import Checkpoint, Kind
from server.engine.session import Session
from server.metrics import Metrics
from turbocache.persistence import SessionFiles, State
from turbocache.pool import PoolExhausted
from turbocache.session_file import SUFFIX, SessionFileError, remove_partial

log = logging.getLogger(__name__)

_REFUSED = ".refused"
_ABOUT = ("id", "name", "owner", "keep", "asked", "turns", "last_used")
"""What a file says of its session."""


class SessionDisk:
    """The files of one server's sessions in one folder, mode 0700. File names are hashes of model and session.

    A file that can't be used is counted, moved aside and not asked for again. Raises OSError when the folder can't be
    used at all.
    """

    def __init__(self, folder: Path, budget: int, files: SessionFiles, metrics: Metrics) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        self._folder = folder
        self._budget = budget
        self._files = files
        self._metrics = metrics
        self._held: Path | None = None
        metrics.session_disk_limit.set(budget)
        if left := remove_partial(folder):
            log.warning("removed %d session files in %s that were not written to their end", left, folder)
        self._measure()

    def stored(self) -> Iterator[Session]:
        """The sessions of this model that the folder has, as their manifests say; only loading looks at every byte."""
        for path in self._paths():
            found = self._peek(path)
            if found is not None and path == self._path(found):
                yield found

    def find(self, owner: str, id: str) -> Session | None:
        """A session by its id, if there is a file of it."""
        path = self._path(Session(id, owner=owner))
        return self._peek(path) if path.exists() else None

    def save(self, session: Session) -> bool:
        """Write a session at rest with its checkpoints; False when that failed, which is logged and counted."""
        assert session.cache is not None
        start, path = time.perf_counter(), self._path(session)
        states = [State("session", session.tokens, session.cache)]
        states += [State(kept.kind, kept.tokens, kept.cache) for kept in session.checkpoints]
        about = {name: getattr(session, name) for name in _ABOUT}
        try:
            n_bytes = self._files.save(path, states, about)
        except (OSError, TypeError) as error:
            log.error("a session of %d tokens could not be written to %s: %s", len(session.tokens), self._folder, error)
            self._metrics.spill_failures.labels(reason=type(error).__name__).inc()
            return False
        self._metrics.spills.inc()
        self._metrics.spilled_bytes.inc(n_bytes)
        self._metrics.spill_seconds.inc(time.perf_counter() - start)
        self._make_room(path)
        return path.exists()

    def load(self, session: Session) -> str | None:
        """Bring a session's cache and checkpoints back from its file. When that can't be used they stay away, and the
        file was moved aside; returns why.
        """
        start, path = time.perf_counter(), self._path(session)
        try:
            own, *others = self._files.load(path)
            n_bytes = path.stat().st_size
            path.touch()
        except SessionFileError as error:
            self._refuse(path, error)
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
        """While others are written, a session's file stays whatever the budget says: it is about to be read."""
        self._held = self._path(session)
        try:
            yield
        finally:
            self._held = None

    def has(self, session: Session) -> bool:
        return self._path(session).exists()

    def remove(self, session: Session) -> None:
        """Delete a session's file, if there is one."""
        with suppress(OSError):
            self._path(session).unlink(missing_ok=True)
        self._measure()

    def _path(self, session: Session) -> Path:
        name = json.dumps([self._files.model, *session.key])
        return self._folder / f"{hashlib.sha256(name.encode()).hexdigest()[:40]}{SUFFIX}"

    def _paths(self) -> list[Path]:
        """Oldest use first."""
        return sorted(self._folder.glob(f"*{SUFFIX}"), key=_used)

    def _peek(self, path: Path) -> Session | None:
        try:
            about, tokens = self._files.peek(path)
            return Session(tokens=tokens, stored=True, **{name: about[name] for name in _ABOUT})
        except SessionFileError as error:
            if error.code != "other_model":  # another server's, perhaps
                self._refuse(path, error)
        except (KeyError, TypeError) as error:
            self._refuse(path, SessionFileError("corrupt", f"{path.name}: the manifest has no {error}"))
        return None

    def _refuse(self, path: Path, error: SessionFileError) -> None:
        self._metrics.session_files_refused.labels(reason=error.code).inc()
        if error.code == "missing":
            return
        log.warning("a session file is refused (%s): %s; it is now %s", error.code, error, f"{path.name}{_REFUSED}")
        with suppress(OSError):
            path.replace(path.with_name(f"{path.name}{_REFUSED}"))

    def _make_room(self, kept: Path) -> None:
        """Remove what was refused, then the longest unused files, until the rest fits; `kept` last."""
        refused = sorted(self._folder.glob(f"*{SUFFIX}{_REFUSED}"), key=_used)
        going = [*refused, *(path for path in self._paths() if path not in (kept, self._held)), kept]
        total = self._measure()
        for path in going:
            if total <= self._budget:
                break
            with suppress(OSError):
                total -= path.stat().st_size
                path.unlink()
                self._metrics.session_files_dropped.inc()
        self._measure()

    def _measure(self) -> int:
        total = sum(_size(path) for path in self._folder.glob(f"*{SUFFIX}*"))
        self._metrics.session_disk_bytes.set(total)
        with suppress(OSError):
            self._metrics.session_disk_free.set(shutil.disk_usage(self._folder).free)
        return total


def _used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
