"""Detects files that other servers have written to a folder of session files."""

import time
from pathlib import Path

from turbocache.storage.session_file import SUFFIX
from turbocache.storage.whole_file import FileState, file_state

_POLL_SECONDS = 1.0


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
