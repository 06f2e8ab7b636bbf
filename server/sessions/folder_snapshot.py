"""Detects files that other servers have written to a folder of session files."""

import time
from pathlib import Path

from turbocache.storage.session_file import SUFFIX

FileState = tuple[int, int, int]
"""Inode, size in bytes and mtime in ns. A rewritten file has another state: files are replaced whole, so its inode
differs from that of the file before it, and its mtime from those of all earlier ones.
"""

_POLL_SECONDS = 1.0


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


class FolderSnapshot:
    """The last known state of each file of a folder, to find new and changed files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[str, FileState] = {}
        self._folder_changed = 0
        self._next_poll = 0.0

    def record(self, path: Path) -> FileState | None:
        """Record and return a file's present state, None if it is not there."""
        if (state := file_state(path)) is None:
            self._known.pop(path.name, None)
        else:
            self._known[path.name] = state
        return state

    def changed(self) -> list[Path] | None:
        """Files whose state differs from the recorded one, which is updated. None if the folder itself has not changed,
        or was read less than a second ago.
        """
        if (now := time.monotonic()) < self._next_poll:
            return None
        self._next_poll = now + _POLL_SECONDS
        try:
            folder_changed = self._folder.stat().st_mtime_ns  # before the files: later changes are for next time
        except OSError:
            return None
        if folder_changed == self._folder_changed:
            return None
        self._folder_changed = folder_changed
        known, self._known = self._known, {}
        paths = list(self._folder.glob(f"*{SUFFIX}"))
        return [path for path in paths if self.record(path) != known.get(path.name)]
