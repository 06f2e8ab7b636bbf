"""One rank of a group: how the ranks meet, stay in step, and end together."""

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from server.commands import StepPlan
from server.coordinator import Coordinator, MakePlan
from server.errors import StartupError
from server.group.disk import GroupDisk
from server.group.lockstep import Lockstep
from server.group.watch import RankWatch, own_address
from server.metrics import Metrics
from server.sessions.disk import SessionDisk
from server.sessions.rank_folders import foreign_sessions, rank_folder
from server.settings import Settings, shared_settings
from turbocache.backend import Backend, BackendUnavailable
from turbocache.backends import BACKENDS
from turbocache.mlxlm.group import Group, GroupError, RankLost, join_group
from turbocache.mlxlm.model import LoadedModel
from turbocache.storage.session_codec import SessionFiles
from turbocache.store import CacheStore

log = logging.getLogger(__name__)

_TICK_SECONDS = 0.05
"""Idle ranks meet this often. They do not wait in a collective, because that takes a whole core."""
_FAREWELL_SECONDS = 2.0
"""When a group ends, its clients and other ranks have this long to learn the reason."""
_HEARD_SECONDS = 1.2
"""Each of the other ranks asks once in this time."""
_FAILED = 1


def join_ranks(
    settings: Settings, report: Callable[[int], Mapping[str, Any]], on_end: Callable[[str], None]
) -> tuple[Coordinator, Settings, int]:
    """Meet the other ranks. Returns the coordinator, the settings of rank 0 and a seed that all ranks have.

    `report` takes the number of steps and returns what this rank tells the others. `on_end` is called once, from any
    thread, with the reason why the group can't continue; the process ends a moment later. Raises StartupError.
    """
    coordinator: GroupCoordinator | None = None
    try:
        group = join_group()
        if group.alone:
            return Coordinator(), settings, int.from_bytes(os.urandom(8))
        coordinator = GroupCoordinator(group, settings, report, on_end)
        coordinator.watch()
        settings = _settings_of_rank_0(settings, group)
        return coordinator, settings, int.from_bytes(group.share(os.urandom(8)))
    except (GroupError, OSError) as error:
        failure = StartupError(f"The ranks of the group did not come together: {error}.")
        if coordinator is not None:
            coordinator.start_failed(failure)
        raise failure from error


class GroupCoordinator(Coordinator):
    """Rank 0 decides, all ranks do the same, and each watches the others."""

    def __init__(
        self,
        group: Group,
        settings: Settings,
        report: Callable[[int], Mapping[str, Any]],
        on_end: Callable[[str], None],
    ) -> None:
        super().__init__(group)
        self._lockstep = Lockstep(group)
        self._on_end = on_end
        self._ended = False
        self._lock = threading.Lock()
        address = own_address(group.rank, settings.rank_address)
        self._watch = RankWatch(
            group.rank, address, settings.rank_timeout, lambda: report(self._lockstep.step), self._end, self._stop_asked
        )

    def watch(self) -> None:
        """Begin to watch the other ranks. Raises GroupError."""
        self._watch.watch([other.decode() for other in self.group.gather(self._watch.address.encode())])
        log.info("rank %d of %d, watched at %s", self.group.rank, self.group.size, self._watch.address)

    def choose_backend(self, choose: Callable[[], Backend], failed: dict[str, Exception]) -> Backend | None:
        try:
            backend, refusal = choose(), ""
        except BackendUnavailable as error:
            backend, refusal = None, str(error)
        own = json.dumps([backend.name if backend is not None else "", refusal]).encode()
        choices = [json.loads(other) for other in self.group.gather(own)]
        for rank, (name, reason) in enumerate(choices):
            if not name:
                raise StartupError(f"Rank {rank}: {reason}")
        assert backend is not None
        last = max((name for name, _ in choices), key=list(BACKENDS).index)
        if all(name == last for name, _ in choices):
            return backend
        if backend.name != last:
            rank = [name for name, _ in choices].index(last)
            failed[backend.name] = RuntimeError(f"rank {rank} of the group can only use {last}")
        return None

    def first_failure(self, own: Exception | None) -> Exception | None:
        reasons = self.group.gather(b"" if own is None else f"{type(own).__name__}: {own}".encode())
        if own is not None:
            return own
        return next((RuntimeError(f"rank {rank}: {why.decode()}") for rank, why in enumerate(reasons) if why), None)

    def smallest(self, n: int) -> int:
        return min(int(other) for other in self.group.gather(b"%d" % n))

    def largest(self, n: float) -> float:
        return max(float(other) for other in self.group.gather(repr(n).encode()))

    def open_disk(
        self, folder: Path, budget: int, model: LoadedModel, store: CacheStore, metrics: Metrics
    ) -> SessionDisk:
        files, others = SessionFiles(model, store, self.group), foreign_sessions(folder, self.group)
        return GroupDisk(rank_folder(folder, self.group), budget, files, metrics, others, self.group)

    def start_failed(self, error: BaseException) -> BaseException:
        lost = isinstance(error, RankLost | RuntimeError)
        reason = (self._cause(error) if lost else f"rank {self.group.rank} did not start: {error}").rstrip(".")
        self._watch.end(reason)
        time.sleep(_HEARD_SECONDS)
        return StartupError(f"The group of ranks did not start: {reason}.") if lost else error

    def next(self, plan: MakePlan, idle: bool) -> StepPlan:
        if idle and not self.group.leads:
            time.sleep(_TICK_SECONDS)
        return self._lockstep.next(lambda: plan(_TICK_SECONDS if idle else None))

    def plan_ahead(self, plan: MakePlan) -> None:
        self._lockstep.send(lambda: plan(None))

    def verify(self, result: Callable[[], bytes]) -> None:
        self._lockstep.note(result())

    def check_failure(self, error: Exception) -> None:
        raise error

    def memory_by_rank(self, own: dict[str, Any]) -> Mapping[int, tuple[float, Mapping[str, Any]]]:
        others = dict(self._watch.seen).items()
        # A rank has no memory to report before its start.
        memory = {rank: (one["silent_seconds"], one["memory"]) for rank, one in others if one["memory"]}
        return memory | {self.group.rank: (0.0, own)}

    def ask_to_stop(self) -> None:
        # Launchers signal all ranks at once: rank 0 gets a moment to stop by itself.
        threading.Timer(_FAREWELL_SECONDS, self._watch.ask_to_stop).start()

    def leave(self) -> None:
        self.group.agree(True)  # all ranks have come here: none is missed from now on
        self._watch.stop()

    def thread_failed(self, error: BaseException) -> bool:
        self._end(self._cause(error), error)
        return True

    def _stop_asked(self) -> None:
        if self.group.leads:
            self.on_stop_asked()

    def _cause(self, error: BaseException) -> str:
        """The reason for the group's end. An error that MLX raises here may come from another rank's end."""
        if isinstance(error, RankLost | RuntimeError) and (blamed := self._watch.blame()) is not None:
            return blamed
        if isinstance(error, GroupError):
            return str(error)
        return f"rank {self.group.rank} failed with {type(error).__name__}: {error}"

    def _end(self, reason: str, error: BaseException | None = None) -> None:
        """Tell everyone why the ranks can't continue, and end the process: its engine's thread may never return from
        MLX. A supervisor starts all ranks again.
        """
        with self._lock:
            if self._ended:
                return
            self._ended = True
        reason = reason.rstrip(".")
        log.critical("the group of ranks ends: %s", reason, exc_info=None if isinstance(error, GroupError) else error)
        self._watch.end(reason)
        end = threading.Timer(_FAREWELL_SECONDS, os._exit, (_FAILED,))
        end.daemon = False  # the process lives until then
        end.start()
        self._on_end(reason)


def _settings_of_rank_0(settings: Settings, group: Group) -> Settings:
    """These settings with rank 0's values where all ranks need the same. A session folder is set on all or on none."""
    folder = None if settings.session_dir is None else str(settings.session_dir)
    shared, shared_folder = json.loads(group.share(json.dumps([shared_settings(settings), folder]).encode()))
    if shared_folder is None or settings.session_dir is None:
        shared["session_dir"] = None if shared_folder is None else Path(shared_folder)
    return settings.model_copy(update=shared)
