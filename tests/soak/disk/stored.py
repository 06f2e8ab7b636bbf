"""What lies in a server's session folder, read with the project's own reader."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from turbocache.storage.session_codec import SessionFiles
from turbocache.storage.session_file import SUFFIX, SessionFileError, open_checked
from turbocache.storage.whole_file import PARTIAL

ASIDE = ".refused"


@dataclass(frozen=True, slots=True)
class Found:
    """A whole file and what it says of its session."""

    path: Path
    id: str
    tokens: np.ndarray


@dataclass(frozen=True, slots=True)
class Look:
    """A folder at one moment: files whose every byte is right, reasons for which others are refused, files that were
    not written to their end, and files that a server has moved aside.
    """

    whole: list[Found] = field(default_factory=list)
    refused: dict[Path, str] = field(default_factory=dict)
    partial: list[Path] = field(default_factory=list)
    aside: list[Path] = field(default_factory=list)

    @property
    def reasons(self) -> Counter[str]:
        return Counter(self.refused.values())


def look(folder: Path, files: SessionFiles) -> Look:
    """Open everything in a session folder, and change nothing. Raises what a reader must not raise."""
    seen = Look(partial=sorted(folder.glob(f"*{PARTIAL}")), aside=sorted(folder.glob(f"*{ASIDE}")))
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        try:
            open_checked(path)
            about, tokens = files.peek(path)
        except SessionFileError as error:
            seen.refused[path] = error.code
        else:
            seen.whole.append(Found(path, str(about["id"]), tokens))
    return seen
