"""Responses on disk: one file each, beside the sessions' files.

    64 bytes   SHA-256 of what follows the line feed, in hexadecimal
    1 byte     line feed
    JSON       the response as it is stored

A file is replaced atomically. A damaged file is moved aside until the next start, and logged. Other servers may have
files in the folder. Their ids differ, so no file has two writers.
"""

import hashlib
import logging
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from server.sessions.leases import Leases
from turbocache.storage.whole_file import PARTIAL, replacing, written

SUFFIX, REFUSED = ".json", ".refused"

_ID = re.compile(r"\w{1,100}", re.ASCII)
"""Ids of this server. Clients may send any id, and not every string may become a file's name."""

logger = logging.getLogger(__name__)


class ResponseFiles:
    """The files in one folder, mode 0700. A thread of its own writes and removes them in the order of the calls, so
    that nobody waits for the disk. Raises OSError if the folder can't be used, and StartupError if it has no locks.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        self._folder = folder
        self._leases = Leases(folder)
        self._going: set[str] = set()
        for path in folder.glob(f"*{REFUSED}"):
            path.unlink(missing_ok=True)
        for path in folder.glob(f"*{PARTIAL}"):
            with self._leases.taken(path.name.removesuffix(PARTIAL)) as mine:
                if mine:  # otherwise another server is writing it
                    path.unlink(missing_ok=True)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="response-files")

    def read(self) -> Iterator[tuple[str, bytes]]:
        """Yields id and JSON of all undamaged files, the oldest first."""
        for path in sorted(self._folder.glob(f"*{SUFFIX}"), key=written):
            if (text := self.find(id := path.name.removesuffix(SUFFIX))) is not None:
                yield id, text

    def find(self, id: str) -> bytes | None:
        """The JSON of one file, None if it is missing or damaged. Waits for the disk."""
        path = self._path(id)
        if not _ID.fullmatch(id) or id in self._going or not path.exists():
            return None
        try:
            digest, _, text = path.read_bytes().partition(b"\n")
        except OSError as error:
            logger.warning("a stored response can't be read: %s", error)
            return None
        if digest == _digest(text):
            return text
        self.refuse(id, "it is not what was written")
        return None

    def refuse(self, id: str, why: str) -> None:
        """Moves an unusable file aside."""
        path = self._path(id)
        logger.warning("the stored response %s is left out: %s", path.name, why)
        with suppress(OSError):
            path.replace(path.with_name(f"{path.name}{REFUSED}"))

    def write(self, id: str, text: bytes) -> None:
        """Writes a file soon."""
        self._thread.submit(self._logged, lambda: self._write(self._path(id), text))

    def remove(self, id: str) -> None:
        """Removes a file soon. From now on `find` does not find it."""
        self._going.add(id)
        self._thread.submit(self._logged, lambda: self._remove(id))

    def close(self) -> None:
        """Returns when everything is written."""
        self._thread.shutdown()
        self._leases.close()

    def _path(self, id: str) -> Path:
        return self._folder / f"{id}{SUFFIX}"

    def _write(self, path: Path, text: bytes) -> None:
        with self._leases.taken(path.name), replacing(path) as file:
            file.write(_digest(text) + b"\n" + text)

    def _remove(self, id: str) -> None:
        self._path(id).unlink(missing_ok=True)
        self._going.discard(id)

    def _logged(self, work: Callable[[], None]) -> None:
        try:
            work()
        except OSError as error:
            logger.error("a response could not be kept in %s: %s", self._folder, error)


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest().encode()
