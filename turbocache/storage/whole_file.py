"""Files that are complete or absent, even when a write is interrupted."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

PARTIAL = ".partial"
"""Suffix of a file that is being written, in the folder of its target."""


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
