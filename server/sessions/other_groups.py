"""Session files of groups of another size in the same folder. They stay where they are, and serve that group again."""

import logging
from collections.abc import Iterable
from pathlib import Path

from server.sessions.session import Session
from turbocache.mlxlm.group import Group
from turbocache.storage.session_codec import tokens_of
from turbocache.storage.session_file import SUFFIX, SessionFileError

log = logging.getLogger(__name__)

ABOUT = ("id", "name", "owner", "keep", "asked", "turns", "last_used")
"""What a file says of its session."""


def rank_folder(folder: Path, group: Group) -> Path:
    """Where a rank keeps its part of each session: a process by itself in the folder itself, a rank below it."""
    return folder if group.alone else folder / f"rank-{group.rank}-of-{group.size}"


def other_groups(folder: Path, group: Group) -> "OtherGroups":
    """What groups of other sizes have left in the folder."""
    sizes = {path: int(path.name.rsplit("-", 1)[1]) for path in folder.glob("rank-*-of-[1-9]*") if path.is_dir()}
    found = [path for path, size in sorted(sizes.items()) if size != group.size]
    if group.alone:
        return OtherGroups(found, "this server is one process")
    return OtherGroups([folder, *found], f"this server has {group.size} ranks")


class OtherGroups:
    """`sessions` are those of which the folders have files."""

    def __init__(self, folders: Iterable[Path], here: str) -> None:
        self.sessions: dict[tuple[str, str], Session] = {}
        self._here = here
        self._by: dict[tuple[str, str], str] = {}
        for folder in folders:
            for path in folder.glob(f"*{SUFFIX}"):
                self._note(path, folder)
        if self.sessions:
            log.warning(
                "%d sessions on disk were written by another number of ranks (other_group), and %s: they are of no use "
                "here and stay for that number (%s)",
                len(self.sessions), here, ", ".join(sorted(set(self._by.values()))),
            )  # fmt: skip

    def reason(self, owner: str, id: str) -> str | None:
        """Why a session's files are of no use here, None if there are none."""
        by = self._by.get((owner, id))
        return None if by is None else f"it was written by {by} (other_group), and {self._here}"

    def _note(self, path: Path, folder: Path) -> None:
        try:
            about, tokens = tokens_of(path)
            session = Session(tokens=tokens, **{name: about[name] for name in ABOUT})
        except (SessionFileError, OSError, KeyError, TypeError):
            return  # whose it is will look at it
        self.sessions[session.key] = session
        whole = not folder.name.startswith("rank-")
        self._by[session.key] = "one process" if whole else f"{folder.name.rsplit('-', 1)[1]} ranks"
