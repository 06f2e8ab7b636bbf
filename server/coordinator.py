"""How the engine's process stays in step with the other processes of its model. This one has none.

`server.group.coordinator` is the implementation for a process that was launched as one rank of several.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from server.commands import StepPlan
from server.metrics import Metrics
from server.sessions.disk import SessionDisk
from server.sessions.rank_folders import foreign_sessions
from turbocache.backend import Backend
from turbocache.mlxlm.group import Group
from turbocache.mlxlm.model import LoadedModel
from turbocache.storage.session_codec import SessionFiles
from turbocache.store import CacheStore

MakePlan = Callable[[float | None], StepPlan]
"""Plans a step. With a number it waits up to this many seconds for a command."""

_IDLE_SECONDS = 0.5


class Coordinator:
    """A process that decides by itself. Called on the engine's thread, except `ask_to_stop` and `steps`."""

    def __init__(self, group: Group | None = None) -> None:
        self.group = Group() if group is None else group
        self.on_stop_asked: Callable[[], None] = lambda: None
        """Called from any thread when another process asks for a stop."""

    # At the start.

    def choose_backend(self, choose: Callable[[], Backend], failed: dict[str, Exception]) -> Backend | None:
        """A backend that all processes can use. None: choose again; `failed` names what another process can't use."""
        return choose()

    def first_failure(self, own: Exception | None) -> Exception | None:
        """The failure of this process, or else of the first process that has one."""
        return own

    def smallest(self, n: int) -> int:
        """The smallest `n` of all processes."""
        return n

    def largest(self, n: float) -> float:
        """The largest `n` of all processes."""
        return n

    def open_disk(
        self, folder: Path, budget: int, model: LoadedModel, store: CacheStore, metrics: Metrics
    ) -> SessionDisk:
        """The sessions on disk. Raises OSError."""
        return SessionDisk(folder, budget, SessionFiles(model, store), metrics, foreign_sessions(folder, self.group))

    def start_failed(self, error: BaseException) -> BaseException:
        """Tells the others that this process does not start. Returns the error to show, perhaps another process's."""
        return error

    # In each step.

    def next(self, plan: MakePlan, idle: bool) -> StepPlan:
        """The next step. `idle`: there is no work before a command comes."""
        return plan(_IDLE_SECONDS if idle else None)

    def plan_ahead(self, plan: MakePlan) -> None:
        """Called before the batch computes a step: the next step may be planned now."""

    def verify(self, result: Callable[[], bytes]) -> None:
        """Compares the result of a step with that of the other processes."""

    def check_failure(self, error: Exception) -> None:
        """Raises `error` if other processes may have succeeded where this one failed."""

    def memory_by_rank(self, own: dict[str, Any]) -> Mapping[int, tuple[float, Mapping[str, Any]]]:
        """For each rank the seconds since it was heard, and its memory."""
        return {0: (0.0, own)}

    # At the end.

    def ask_to_stop(self) -> None:
        """Asks the process that decides to stop all."""

    def leave(self) -> None:
        """An orderly stop."""

    def thread_failed(self, error: BaseException) -> bool:
        """The engine's thread ends with an error. True if the process ends because of it."""
        return False
