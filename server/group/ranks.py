"""This engine among the ranks of a group: how they meet, keep in step, and end together."""

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from server.errors import StartupError
from server.group.lockstep import Lockstep
from server.group.watch import RankWatch, own_address
from server.settings import Settings
from turbocache.mlxlm.group import Group, GroupError, RankLost, join_group

log = logging.getLogger(__name__)

TICK_SECONDS = 0.05
"""Ranks that have nothing to do meet this often: waiting for each other in a collective takes a whole core."""
_LAST_WORDS_SECONDS = 2.0
"""A group that has ended leaves its clients and its other ranks this long to hear why."""
_HEARD_SECONDS = 1.2
"""In which each of the others has asked once."""
_FAILED = 1

_LEADERS = (
    "model", "backend", "kv_preset", "kv_condition", "kv_protect", "max_size", "overflow", "keep", "window",
    "max_batch", "prefill_chunk", "session_save_after", "session_ttl", "stall_seconds",
)  # fmt: skip
"""Settings that hold for the whole group as rank 0 has them. The others are a machine's own."""


class Ranks:
    """The group and its steps. By itself a process is a group of one, for which all of this is nothing.

    `report` says what the other ranks are told of this one. `on_end` is called once when the group can't go on, with a
    sentence that says why, from any thread; the process ends a moment later.
    """

    def __init__(self, report: Callable[[], Mapping[str, Any]], on_end: Callable[[str], None]) -> None:
        self.group = Group()
        self.lockstep = Lockstep(self.group)
        self.ended: str | None = None
        self.on_stop_asked: Callable[[], None] = lambda: None
        self._report = report
        self._on_end = on_end
        self._lock = threading.Lock()
        self._watch: RankWatch | None = None

    @property
    def seen(self) -> Mapping[int, Mapping[str, Any]]:
        """What the other ranks said of themselves a moment ago."""
        return {} if self._watch is None else dict(self._watch.seen)

    def join(self, settings: Settings) -> tuple[Settings, int]:
        """Meet the others; returns the settings to follow, which are rank 0's, and a seed that all ranks have. Raises
        StartupError. Called on the thread that owns MLX.
        """
        try:
            self.group = join_group()
            self.lockstep = Lockstep(self.group)
            if not self.group.alone:
                address = own_address(self.group.rank, settings.rank_address)
                self._watch = RankWatch(
                    self.group.rank, address, settings.rank_timeout, self._report, self.end, self._stop_asked
                )
                self._watch.watch([other.decode() for other in self.group.gather(self._watch.address.encode())])
                settings = _with_leaders(settings, self.group)
                log.info("rank %d of %d, watched at %s", self.group.rank, self.group.size, self._watch.address)
            return settings, int.from_bytes(self.group.share(os.urandom(8)))
        except (GroupError, OSError) as error:
            raise StartupError(f"The ranks of the group did not come together: {error}.") from error

    def start_failed(self, error: BaseException) -> BaseException:
        """This rank does not start: tell the others. Returns what a person should read, which may be why another rank
        did not.
        """
        if self.group.alone or self._watch is None:
            return error
        lost = isinstance(error, RankLost | RuntimeError)
        reason = (self.cause(error) if lost else f"rank {self.group.rank} did not start: {error}").rstrip(".")
        self._watch.end(reason)
        time.sleep(_HEARD_SECONDS)
        return StartupError(f"The group of ranks did not start: {reason}.") if lost else error

    def cause(self, error: BaseException) -> str:
        """Why the group ends, when this rank's thread has failed. What MLX raises may be another rank's end."""
        watch = self._watch if isinstance(error, RankLost | RuntimeError) else None
        if watch is not None and (blamed := watch.blame()) is not None:
            return blamed
        if isinstance(error, GroupError):
            return str(error)
        return f"rank {self.group.rank} failed with {type(error).__name__}: {error}"

    def end(self, reason: str, error: BaseException | None = None) -> None:
        """The ranks can't go on: tell everyone why, and end the process. Its engine's thread may wait in MLX for ever,
        and what supervises the launcher starts all ranks again.
        """
        with self._lock:
            if self.ended is not None:
                return
            self.ended = reason = reason.rstrip(".")
        log.critical("the group of ranks ends: %s", reason, exc_info=None if isinstance(error, GroupError) else error)
        if self._watch is not None:
            self._watch.end(reason)
        end = threading.Timer(_LAST_WORDS_SECONDS, os._exit, (_FAILED,))
        end.daemon = False  # the process ends with it, not before
        end.start()
        self._on_end(reason)

    def ask_to_stop(self) -> None:
        """Have rank 0 stop all ranks in order. It may have been told to by itself, so it has a moment before."""
        if self._watch is not None:
            threading.Timer(_LAST_WORDS_SECONDS, self._watch.ask_to_stop).start()

    def _stop_asked(self) -> None:
        if self.group.leads:
            self.on_stop_asked()

    def part(self) -> None:
        """An orderly end: once all ranks have come here, none is missed any more."""
        self.group.agree(True)
        if self._watch is not None:
            self._watch.stop()

    def rest(self) -> None:
        """There is nothing to do: meet rank 0 a little later."""
        if not self.group.leads:
            time.sleep(TICK_SECONDS)


def _with_leaders(settings: Settings, group: Group) -> Settings:
    """Settings with which this rank does as rank 0 does. A folder for sessions is everywhere or nowhere."""
    own = {name: getattr(settings, name) for name in _LEADERS}
    folder = None if settings.session_dir is None else str(settings.session_dir)
    theirs, their_folder = json.loads(group.share(json.dumps([own, folder]).encode()))
    if their_folder is None or settings.session_dir is None:
        theirs["session_dir"] = None if their_folder is None else Path(their_folder)
    return settings.model_copy(update=theirs)
