"""What happens in a folder of session files that other servers write as well.

Everything here runs on the engine's thread.
"""

import time
from pathlib import Path

from turbocache.storage.session_file import SUFFIX

FileState = tuple[int, int, int]
"""Inode, bytes and time of the last change in ns. A file that was written anew has another one: it is put into place
whole, so its inode differs from that of the file before it, and its time from that of any earlier one.
"""

_LOOK_SECONDS = 1.0


def file_state(path: Path) -> FileState | None:
    """None if the file is not there."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


class FolderWatch:
    """Remembers how the files of one folder were, and tells which have come or changed since."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[str, FileState] = {}
        self._folder_changed = 0
        self._next_look = 0.0

    def note(self, path: Path) -> FileState | None:
        """This server knows the file as it is now."""
        if (state := file_state(path)) is None:
            self._known.pop(path.name, None)
        else:
            self._known[path.name] = state
        return state

    def changed(self) -> list[Path] | None:
        """Files that are not as they were noted, which are noted now. None if the folder was not looked at: it is as
        it was, or a second has not passed.
        """
        if (now := time.monotonic()) < self._next_look:
            return None
        self._next_look = now + _LOOK_SECONDS
        try:
            folder_changed = self._folder.stat().st_mtime_ns  # before the files: what comes meanwhile is for next time
        except OSError:
            return None
        if folder_changed == self._folder_changed:
            return None
        self._folder_changed = folder_changed
        known, self._known = self._known, {}
        paths = list(self._folder.glob(f"*{SUFFIX}"))
        return [path for path in paths if self.note(path) != known.get(path.name)]
