"""The folder of each rank, and the session files of groups of another size, which this server can't use."""

import logging
from collections.abc import Iterable
from pathlib import Path

from server.sessions.session import Session
from turbocache.mlxlm.group import Group
from turbocache.storage.session_codec import tokens_of
from turbocache.storage.session_file import SUFFIX, SessionFileError

log = logging.getLogger(__name__)

ABOUT = ("id", "name", "owner", "keep", "asked", "turns", "last_used")
"""Fields of a session in its file's manifest."""


def rank_folder(folder: Path, group: Group) -> Path:
    """The folder for a rank's part of each session: a subfolder, or the folder itself for a single process."""
    return folder if group.alone else folder / f"rank-{group.rank}-of-{group.size}"


def foreign_sessions(folder: Path, group: Group) -> "ForeignSessions":
    """The sessions that groups of other sizes have written to the folder."""
    sizes = {path: int(path.name.rsplit("-", 1)[1]) for path in folder.glob("rank-*-of-[1-9]*") if path.is_dir()}
    others = [path for path, size in sorted(sizes.items()) if size != group.size]
    if group.alone:
        return ForeignSessions(others, "this server is one process")
    return ForeignSessions([folder, *others], f"this server has {group.size} ranks")


class ForeignSessions:
    """Sessions in files that another number of ranks has written. The files stay for a group of that size."""

    def __init__(self, folders: Iterable[Path], here: str) -> None:
        self.sessions: dict[tuple[str, str], Session] = {}
        self._here = here
        self._writers: dict[tuple[str, str], str] = {}
        for folder in folders:
            for path in folder.glob(f"*{SUFFIX}"):
                self._read(path, folder)
        if self.sessions:
            log.warning(
                "%d sessions on disk were written by another number of ranks (other_group), and %s: they can't be used "
                "here and stay for that number (%s)",
                len(self.sessions), here, ", ".join(sorted(set(self._writers.values()))),
            )  # fmt: skip

    def reason(self, owner: str, id: str) -> str | None:
        """Why a session's files can't be used here, None if it has none."""
        writer = self._writers.get((owner, id))
        return None if writer is None else f"it was written by {writer} (other_group), and {self._here}"

    def _read(self, path: Path, folder: Path) -> None:
        try:
            about, tokens = tokens_of(path)
            session = Session(tokens=tokens, **{name: about[name] for name in ABOUT})
        except (SessionFileError, OSError, KeyError, TypeError):
            return  # the group that owns the file will check it
        self.sessions[session.key] = session
        n_ranks = folder.name.rsplit("-", 1)[1] if folder.name.startswith("rank-") else None
        self._writers[session.key] = "one process" if n_ranks is None else f"{n_ranks} ranks"
