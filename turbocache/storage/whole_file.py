"""Files that are complete or absent, even when a write is interrupted."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

PARTIAL = ".partial"
"""Suffix of a file that is being written, in the folder of its target."""


FileState = tuple[int, int, int]
"""Inode, size in bytes and mtime in ns. A rewritten file has another state: files are replaced whole, so its inode
differs from that of the file before it, and its mtime from those of all earlier ones.
"""


def file_state(path: Path) -> FileState | None:
    """None if the file is not there."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def written(path: Path) -> int:
    """Time of the last write in ns, 0 if the file is not there."""
    return (file_state(path) or (0, 0, 0))[2]


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a new file, mode 0600, that replaces `path` when the block ends. Syncs it and its folder to disk.

    If the block raises, the old file stays. Raises OSError.
    """
    partial = path.with_name(f"{path.name}{PARTIAL}")
    try:
        with open(partial, "wb", opener=_private) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
