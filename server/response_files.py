"""Responses on disk: one file each, beside the sessions' files.

    64 bytes   SHA-256 of what follows the line feed, in hexadecimal
    1 byte     line feed
    JSON       the response as it is stored

A file is put into place whole or not at all. One that was damaged since is moved aside until the next start, and the
log says so.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from turbocache.whole_file import PARTIAL, replacing

SUFFIX, REFUSED = ".json", ".refused"

logger = logging.getLogger(__name__)


class ResponseFiles:
    """The files in one folder, mode 0700. They are written and removed by a thread of their own, in the order in which
    that is asked for, so that nobody waits for a disk. Raises OSError when the folder can't be used at all.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        self._folder = folder
        for path in [*folder.glob(f"*{PARTIAL}"), *folder.glob(f"*{REFUSED}")]:
            path.unlink(missing_ok=True)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="response-files")

    def read(self) -> Iterator[tuple[str, bytes]]:
        """The ids and the JSON of all files that are as they were written, the oldest first."""
        for path in sorted(self._folder.glob(f"*{SUFFIX}"), key=lambda path: path.stat().st_mtime_ns):
            id = path.name.removesuffix(SUFFIX)
            try:
                digest, _, text = path.read_bytes().partition(b"\n")
            except OSError as error:
                logger.warning("a stored response can't be read: %s", error)
                continue
            if digest == _digest(text):
                yield id, text
            else:
                self.refuse(id, "it is not what was written")

    def refuse(self, id: str, why: str) -> None:
        """Move a file aside that can't be used."""
        path = self._path(id)
        logger.warning("the stored response %s is left out: %s", path.name, why)
        with suppress(OSError):
            path.replace(path.with_name(f"{path.name}{REFUSED}"))

    def write(self, id: str, text: bytes) -> None:
        """Put a file into place, soon."""
        self._thread.submit(self._logged, lambda: self._write(self._path(id), text))

    def remove(self, id: str) -> None:
        self._thread.submit(self._logged, lambda: self._path(id).unlink(missing_ok=True))

    def close(self) -> None:
        """Returns when all is written."""
        self._thread.shutdown()

    def _path(self, id: str) -> Path:
        return self._folder / f"{id}{SUFFIX}"

    def _write(self, path: Path, text: bytes) -> None:
        with replacing(path) as file:
            file.write(_digest(text) + b"\n" + text)

    def _logged(self, work: Callable[[], None]) -> None:
        try:
            work()
        except OSError as error:
            logger.error("a response could not be kept in %s: %s", self._folder, error)


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest().encode()
