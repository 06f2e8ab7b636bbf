"""Leases: which of several servers on one folder may write, replace, move or delete a session's file.

A lease is a lock that the kernel holds on one byte of the file `leases` in the folder. The name of the session's file
gives the byte's position. So a lease is atomic on local disks, NFS and SMB, and it ends with its process, however that
ends: there is no clock, no expiry, nothing to clean up, and no takeover. The file stays empty, because a lock does not
need the byte to exist.

POSIX gives these locks to processes, not to descriptors. So all `Leases` of a process on one folder share one
descriptor: closing any descriptor of the file would drop all its locks. They also share the set of held locks: the
kernel would give the same process a lock twice. Nothing else in the process may open that file. A process that is
stopped (SIGSTOP) keeps its leases.

Reading needs no lease: files are replaced whole.
"""

import errno
import fcntl
import hashlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from server.errors import StartupError

NAME = "leases"
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
_OFFSET_BITS = 62
"""File offsets are signed 64-bit numbers, and so is the end of a lock."""


@dataclass(slots=True)
class _Shared:
    """One folder's file in this process: its descriptor, the locks held, and the number of `Leases` sharing it."""

    descriptor: int
    held: set[int] = field(default_factory=set)
    users: int = 0


_shared: dict[tuple[int, int], _Shared] = {}
_lock = threading.Lock()


class Leases:
    """The leases of one server in one folder. Safe to call from any thread. Raises OSError if the folder can't be used,
    and StartupError if its file system has no locks.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / NAME
        self._mine: set[int] = set()
        self._closed = False
        with _lock:
            self._key = _identity(path)
            if (shared := _shared.get(self._key)) is None:
                shared = _shared[self._key] = _Shared(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            shared.users += 1
            self._file = shared
        try:
            _try_out(shared.descriptor)
        except OSError as error:
            self.close()
            if error.errno not in _NO_LOCKS:
                raise
            raise StartupError(
                f"TURBOCACHE_SESSION_DIR: the file system of {folder} has no locks ({error.strerror}), by which "
                "servers keep from writing each other's files. Choose a local folder, or mount it with locks (NFS: "
                "version 4, or version 3 with lockd and without the option nolock)."
            ) from error

    def take(self, name: str) -> bool:
        """Take the lease of a file, by name. Returns whether this server has it now."""
        offset = _offset(name)
        with _lock:
            if offset in self._mine:
                return True
            if offset in self._file.held or not _locked(self._file.descriptor, offset):
                return False
            self._file.held.add(offset)
            self._mine.add(offset)
            return True

    def release(self, name: str) -> None:
        """Release a lease. Does nothing if it is not held."""
        with _lock:
            self._release(_offset(name))

    @contextmanager
    def taken(self, name: str) -> Iterator[bool]:
        """Hold the lease during the block, if it is free. Yields whether it was."""
        try:
            yield self.take(name)
        finally:
            self.release(name)

    def close(self) -> None:
        """Release all leases. Closing again does nothing."""
        with _lock:
            if self._closed:
                return
            self._closed = True
            for offset in list(self._mine):
                self._release(offset)
            self._file.users -= 1
            if self._file.users == 0:
                del _shared[self._key]
                os.close(self._file.descriptor)

    def _release(self, offset: int) -> None:
        if offset in self._mine:
            self._mine.discard(offset)
            self._file.held.discard(offset)
            fcntl.lockf(self._file.descriptor, fcntl.LOCK_UN, 1, offset)


def _identity(path: Path) -> tuple[int, int]:
    """Device and inode of the file, which is created if missing. An existing file is not opened: closing it again would
    drop this process' locks.
    """
    if not path.exists():
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    stat = path.stat()
    return stat.st_dev, stat.st_ino


def _offset(name: str) -> int:
    """The byte for a name. If two names had the same byte, they would only wait for each other."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> (64 - _OFFSET_BITS)


def _locked(descriptor: int, offset: int) -> bool:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, offset)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def _try_out(descriptor: int) -> None:
    """Try a shared lock, so that servers that start together do not collide. Raises OSError."""
    offset = _offset("")
    fcntl.lockf(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, offset)
    fcntl.lockf(descriptor, fcntl.LOCK_UN, 1, offset)
